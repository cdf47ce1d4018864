"""Counts word (wer), character (cer) or token (ter) errors with NIST sclite.

Hypotheses are joined to references by utterance id. Case, punctuation and Unicode form all count, as they are written.
A character is a code point; the space between two words counts as one (as in ESPnet). TER counts the pieces into which
--tokenizer splits both sides. OUT gets score.json and sclite's result.sys, .raw, .dtl, .pra, .sgml.

example:
  speechtx score --ref data/test/text --hyp exp/a/decode_test_decode/text --out exp/a/decode_test_decode/score_wer --unit wer
  speechtx score ... --against exp/b/decode_test_decode/score_wer      (is a better than b? paired bootstrap)
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of `speechtx score`."""
    parser.add_argument("--ref", type=Path, required=True, help="reference transcripts (Kaldi's text)")
    parser.add_argument("--hyp", type=Path, required=True, help="recognised transcripts; an id alone is an empty hypothesis")
    parser.add_argument("--out", type=Path, required=True, help="directory for score.json and sclite's files")
    parser.add_argument("--unit", choices=("wer", "cer", "ter"), default="wer", help="what is counted (default: wer)")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer directory, for --unit ter")
    parser.add_argument("--utt2spk", type=Path, help="speakers, for sclite's table by speaker")
    parser.add_argument("--allow-missing", action="store_true", help="count utterances without a hypothesis as deleted")
    parser.add_argument(
        "--ignore-case", action="store_true", help="fold case on both sides first (noted in score.json); not for ter"
    )
    parser.add_argument(
        "--against", type=Path, metavar="SCORE_DIR", help="another system's score on the same set, to compare with"
    )


def run(args: argparse.Namespace) -> int:
    """Scores, writes, and prints one line (more for missing utterances and for a comparison)."""
    import hashlib

    from speechtx.config.errors import ScoringError
    from speechtx.data.kaldi_table import read_table
    from speechtx.scoring.results import read_score
    from speechtx.scoring.sclite import score, write_score
    from speechtx.scoring.significance import bootstrap_interval, paired_bootstrap
    from speechtx.text.normalize import split_words, squeeze_spaces

    if args.unit == "ter" and args.ignore_case:
        raise ScoringError("--ignore-case and --unit ter exclude each other: the tokenizer cannot split words in another case")
    split = _splitter(args.unit, args.tokenizer)
    fold: Callable[[str], str] = str.casefold if args.ignore_case else str
    refs = {utt: fold(text) for utt, text in read_table(args.ref).items()}
    hyps = {utt: fold(text) for utt, text in read_table(args.hyp).items()}
    (args.out / "score.json").unlink(missing_ok=True)  # never an old score beside new files
    result = score(
        refs={utt: split(text) for utt, text in refs.items()},
        hyps={utt: split(text) for utt, text in hyps.items()},
        out_dir=args.out,
        speakers=read_table(args.utt2spk) if args.utt2spk else None,
        allow_missing=args.allow_missing,
    )
    canonical = "".join(f"{utt} {squeeze_spaces(refs[utt])}\n" for utt in sorted(refs))
    facts = {
        "set": args.ref.absolute().parent.name,
        "reference_words": sum(len(split_words(text)) for text in refs.values()),
        "reference_sha256": hashlib.sha256(canonical.encode()).hexdigest(),
        "hypothesis_sha256": hashlib.sha256(args.hyp.read_bytes()).hexdigest(),
        "ignore_case": args.ignore_case,
    }
    write_score(args.out / "score.json", result, unit=args.unit, facts=facts)
    for utt in result.missing:
        print(f"missing hypothesis, counted as deleted: {utt}")
    total = result.total
    errors = [c.errors for c in result.utterances.values()]
    reference = [c.reference for c in result.utterances.values()]
    low, high = bootstrap_interval(errors, reference)
    print(
        f"{args.unit.upper()} {result.rate:.2f} % [{low:.2f}, {high:.2f}]  {total.errors} / {total.reference}: "
        f"{total.substitutions} sub, {total.deletions} del, {total.insertions} ins; {len(errors)} utterances; {args.out}"
    )
    if args.against is not None:
        mine, other = read_score(args.out), read_score(args.against)
        mine.require_same_reference(other)
        comparison = paired_bootstrap(mine.errors, other.errors, mine.reference)
        print(
            f"against {args.against}: {comparison.difference:+.2f} % absolute [{comparison.low:+.2f}, {comparison.high:+.2f}], "
            f"better in {100 * comparison.a_better:.1f} % of draws"
            + ("" if comparison.significant else "; not a significant difference (95 %)")
        )
    return 0


def _splitter(unit: str, tokenizer_dir: Path | None) -> Callable[[str], list[str]]:
    from speechtx.config.errors import ScoringError
    from speechtx.text.normalize import split_characters, split_words

    if unit == "ter":
        if tokenizer_dir is None:
            raise ScoringError("--unit ter needs --tokenizer DIR: the pieces are what it counts")
        from speechtx.text.tokenizer import Tokenizer

        return Tokenizer.load(tokenizer_dir).encode_pieces
    return split_words if unit == "wer" else split_characters
