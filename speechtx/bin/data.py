"""Work on data directories: validate, fix, subset, combine, split, copy, perturb-speed.

A data directory holds Kaldi's tables (wav.scp, text, utt2spk, spk2utt, ...); docs/data_dir.md shows each file.

  speechtx data validate data/train
  speechtx data fix data/train
  speechtx data subset --first data/train 100 data/train_100
  speechtx data combine data/all data/train_a data/train_b
  speechtx data split data/train 4
  speechtx data copy --utt-prefix lab- --spk-prefix lab- data/train data/train_lab
  speechtx data perturb-speed --speeds 0.9,1.0,1.1 data/train data/train_sp
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from speechtx.data.kaldi_dir_ops import Written


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Defines one sub-command an operation."""
    commands = parser.add_subparsers(title="operations", metavar="OPERATION", required=True)

    def command(name: str, summary: str, operation: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", allow_abbrev=False)
        sub.set_defaults(operation=operation, usage_error=sub.error)
        return sub

    _add_validate(
        command("validate", "list everything that is wrong, by file, line and entry; status 1 if anything is", _validate)
    )
    fix = command("fix", "sort, clean and reconcile the tables in place; the old ones are kept in DIR/.backup", _fix)
    fix.add_argument("dir", metavar="DIR")
    fix.add_argument("--drop-missing-audio", action="store_true", help="also drop utterances whose audio file does not exist")
    _add_subset(command("subset", "take some of the utterances", _subset))
    combine = command("combine", "join directories with different utterances", _combine)
    combine.add_argument("dest", metavar="DEST")
    combine.add_argument("sources", metavar="SRC", nargs="+")
    split = command("split", "split into DIR/splitN/1 ... DIR/splitN/N, equally long", _split)
    split.add_argument("--per-utt", action="store_true", help="ignore speakers; the parts go to DIR/splitNutt")
    split.add_argument("dir", metavar="DIR")
    split.add_argument("num", metavar="N", type=_positive)
    copy = command("copy", "copy, with prefixes and suffixes for ids if wanted", _copy)
    for option in ("--utt-prefix", "--spk-prefix", "--utt-suffix", "--spk-suffix"):
        # `--utt-prefix=-x` is the way to give one that begins with a dash.
        copy.add_argument(option, default="", metavar="STR")
    copy.add_argument("src", metavar="SRC")
    copy.add_argument("dest", metavar="DEST")
    perturb = command("perturb-speed", "repeat utterances at other speeds, applied when features are computed", _perturb_speed)
    perturb.add_argument("--speeds", type=_speeds, default=[0.9, 1.0, 1.1], metavar="F,F,...", help="default: 0.9,1.0,1.1")
    perturb.add_argument("src", metavar="SRC")
    perturb.add_argument("dest", metavar="DEST")


def run(args: argparse.Namespace) -> int:
    """Runs the chosen operation."""
    operation: Callable[[argparse.Namespace], int] = args.operation
    return operation(args)


def _add_validate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dir", metavar="DIR")
    parser.add_argument("--feats", action=argparse.BooleanOptionalAction, default=False, help="require feats.scp")
    parser.add_argument("--no-text", dest="text", action="store_false", help="do not require text")
    parser.add_argument("--no-wav", dest="wav", action="store_false", help="do not require wav.scp")
    parser.add_argument("--no-files", dest="files", action="store_false", help="do not look whether audio and archives exist")
    parser.add_argument("--no-spk-sort", dest="spk_sort", action="store_false", help="do not warn about the order of speakers")
    parser.add_argument("--allow-pipes", action="store_true", help="accept commands in wav.scp (they do not run here)")
    parser.add_argument("--limit", type=_positive, default=10, help="problems of a sort to spell out a file (default: 10)")


def _add_subset(parser: argparse.ArgumentParser) -> None:
    parser.usage = (
        "speechtx data subset [--first | --last | --shortest | --per-spk] SRC N DEST\n"
        "       speechtx data subset (--utt-list FILE | --spk-list FILE) SRC DEST"
    )
    how = parser.add_mutually_exclusive_group()
    for mode, summary in {
        "first": "the first N (default: N spread evenly)",
        "last": "the last N",
        "shortest": "the N shortest",
        "per-spk": "at most N of each speaker, the first ones",
    }.items():
        how.add_argument(f"--{mode}", dest="mode", action="store_const", const=mode, help=summary)
    how.add_argument("--utt-list", metavar="FILE", help="the utterances that its lines begin with")
    how.add_argument("--spk-list", metavar="FILE", help="all utterances of the speakers that its lines begin with")
    parser.add_argument("words", nargs="+", metavar="SRC [N] DEST")


def _validate(args: argparse.Namespace) -> int:
    from speechtx.data.kaldi_dir import validate_data_dir

    summary = validate_data_dir(
        args.dir,
        feats=args.feats,
        text=args.text,
        wav=args.wav,
        allow_pipes=args.allow_pipes,
        check_files=args.files,
        speaker_order=args.spk_sort,
        limit=args.limit,
    )
    for warning in summary.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    recordings = f", {summary.recordings:,} recordings" if summary.recordings else ""
    print(f"{args.dir}: valid, {summary.utterances:,} utterances of {summary.speakers:,} speakers{recordings}")
    return 0


def _fix(args: argparse.Namespace) -> int:
    from speechtx.data.kaldi_dir_fix import fix_data_dir

    report = fix_data_dir(args.dir, drop_missing_audio=args.drop_missing_audio)
    for what, count in report.repairs.items():
        print(f"{args.dir}/{what}: {count:,}")
    for number, (utt, reason) in enumerate(report.dropped.items()):
        if number == 20:
            print(f"  and {len(report.dropped) - 20:,} more")
            break
        print(f"  dropped {utt}: {reason}")
    done = f"{args.dir}: {report.kept:,} utterances kept, {len(report.dropped):,} dropped"
    print(f"{done}; the old tables are in {report.backup}" if report.changed else f"{done}; nothing to change")
    return 0


def _subset(args: argparse.Namespace) -> int:
    from speechtx.data.kaldi_dir_ops import subset_data_dir

    listed = args.utt_list is not None or args.spk_list is not None
    if len(args.words) != (2 if listed else 3):
        args.usage_error("expected SRC DEST with a list" if listed else "expected SRC N DEST (or SRC DEST with a list)")
    src, *number, dest = args.words
    num = None
    if number:
        try:
            num = _positive(number[0])
        except argparse.ArgumentTypeError as err:
            args.usage_error(str(err))
    written = subset_data_dir(src, dest, num=num, mode=args.mode or "spread", utt_list=args.utt_list, spk_list=args.spk_list)
    return _tell(written)


def _combine(args: argparse.Namespace) -> int:
    from speechtx.data.kaldi_dir_ops import combine_data_dirs

    return _tell(combine_data_dirs(args.dest, args.sources))


def _split(args: argparse.Namespace) -> int:
    from speechtx.data.kaldi_dir_ops import split_data_dir

    parts, notes = split_data_dir(args.dir, args.num, per_utt=args.per_utt)
    _warn(notes)
    print(f"{parts[0].parent}: {len(parts)} part{'s' * (len(parts) > 1)}")
    return 0


def _copy(args: argparse.Namespace) -> int:
    from speechtx.data.kaldi_dir_ops import copy_data_dir

    affixes = {name: getattr(args, name) for name in ("utt_prefix", "spk_prefix", "utt_suffix", "spk_suffix")}
    return _tell(copy_data_dir(args.src, args.dest, **affixes))


def _perturb_speed(args: argparse.Namespace) -> int:
    from speechtx.data.kaldi_dir_ops import perturb_speed

    return _tell(perturb_speed(args.src, args.dest, speeds=args.speeds))


def _tell(written: Written) -> int:
    _warn(written.notes)
    print(f"{written.path}: {written.utterances:,} utterances")
    return 0


def _warn(notes: Iterable[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 10**12):
        raise argparse.ArgumentTypeError(f"expected a positive whole number, found '{text}'")
    return int(text)


def _speeds(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected factors such as 0.9,1.0,1.1, found '{text}'") from None
