"""The command line's front door: the table of verbs, and the only place where an error becomes a message and an exit code.

Nothing but the standard library and the verb's own module is imported, so that `speechtx --help` is instant.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from types import ModuleType

from speechtx import __version__
from speechtx.config.errors import SpeechtxError

# (heading, {verb: what it does}); the module of a verb is speechtx/bin/<verb>.py.
VERBS: tuple[tuple[str, dict[str, str]], ...] = (
    ("stage 0, before anything runs", {"check": "find now what would otherwise fail an hour later"}),
    ("stage 1, data directories", {"data": "validate, fix, subset, combine, split, copy, perturb-speed"}),
    (
        "stage 2, features",
        {"fbank": "compute filterbank features", "cmvn": "mean and variance statistics, global and per speaker"},
    ),
    ("stage 3, tokens", {"tokenizer": "train the sentencepiece model"}),
    (
        "stage 4, training",
        {
            "train": "train a model, or continue where it was stopped",
            "align": "find where words are said, and which can be cut out",
        },
    ),
    ("stages 3 and 4, language models", {"lm": "n-gram, whole words, Transformer: ngram, lexicon, train, perplexity"}),
    ("stage 5, averaging", {"average": "average the best epochs' weights into model.pt"}),
    (
        "stage 6, recognition",
        {
            "tune": "choose decoding weights on the development set",
            "decode": "recognise a data directory",
            "transcribe": "recognise audio files",
        },
    ),
    (
        "stage 7, scoring",
        {
            "score": "WER, CER or TER with NIST sclite",
            "results": "write RESULTS.md from what was scored",
            "compare": "what each change of the configuration gave, a row each",
        },
    ),
    ("pictures", {"curves": "training curves as PNG", "attention": "attention maps, with and without penalty"}),
    ("recipes' plumbing", {"stamp": "tell whether a stage's inputs changed since it finished"}),
)


def help_text() -> str:
    """The answer to `speechtx --help`: every verb with one line, grouped by stage."""
    width = max(len(verb) for _, verbs in VERBS for verb in verbs)
    lines = [
        "usage: speechtx VERB [options]",
        "",
        "Recipes for end-to-end speech recognition. `speechtx VERB --help` teaches each verb.",
    ]
    for heading, verbs in VERBS:
        lines += ["", f"{heading}:"] + [f"  {verb:<{width}}  {summary}" for verb, summary in verbs.items()]
    return "\n".join([*lines, "", "  --version  print the version", "  --help     print this"])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb.

    Returns:
        The exit status: 0, 1 for an error of the input's, 2 for a wrong command line, 128 + n for signal n.
    """
    try:
        try:
            return _dispatch(list(sys.argv[1:] if argv is None else argv))
        finally:  # also after a verb's --help, which leaves by SystemExit
            sys.stdout.flush()
    except BrokenPipeError:  # `speechtx ... | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again when it flushes at exit
        return 128 + signal.SIGPIPE


def _dispatch(words: list[str]) -> int:
    if not words:
        print(help_text(), file=sys.stderr)
        return 2
    if words[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if words[0] in ("-V", "--version"):
        print(f"speechtx {__version__}")
        return 0
    known = [verb for _, verbs in VERBS for verb in verbs]
    if words[0] not in known:
        near = difflib.get_close_matches(words[0], known, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else "`speechtx --help` lists them all"
        print(f"speechtx: error: unknown verb '{words[0]}'; {hint}", file=sys.stderr)
        return 2
    return _run_verb(words[0], words[1:])


def _run_verb(verb: str, words: list[str]) -> int:
    try:
        module = importlib.import_module(f"speechtx.bin.{verb}")
        args = _parser(verb, module).parse_args(words)
        status: int = module.run(args)
        return status
    except SpeechtxError as err:
        print(f"speechtx {verb}: error: {err}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        raise  # `main` knows what to do
    except OSError as err:  # a full disk, a folder that may not be written: the machine's fault, not ours
        if err.strerror is None:
            raise
        where = "" if err.filename is None else f"{err.filename}: "
        print(f"speechtx {verb}: error: {where}{err.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"speechtx {verb}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def _parser(verb: str, module: ModuleType) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"speechtx {verb}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # an abbreviation that works today would break when a longer option is added
    )
    module.add_arguments(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
