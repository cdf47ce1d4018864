"""Compares experiments that differ in a few values of their configuration: what each change gave, a row each.

Experiments that differ in nothing but their seed are one row, with the mean over seeds. The first one's configuration is what
the others are compared with; each difference is over the seeds that both have, with its 95 % interval. The set is the one that
training was watched on (--dev of the training) unless --set names another: choose by it, not by the test set.

example:
  speechtx compare exp/train exp/train_training.specaugmentnull
  speechtx compare exp/base_seed1 exp/base_seed2 exp/wide_seed1 exp/wide_seed2 --decoding decode_ctc --out comparison.md
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of `speechtx compare`."""
    parser.add_argument("exps", nargs="+", type=Path, metavar="EXP", help="experiment directories, decoded and scored")
    parser.add_argument(
        "--set", dest="test_set", metavar="NAME", help="scored data directory to compare on (default: the dev set)"
    )
    parser.add_argument(
        "--decoding",
        action="append",
        default=[],
        metavar="NAME",
        help="decoding to compare, as `decode_ctc`; may be repeated (default: all that the first experiment has)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="a Markdown page, with the command that made it")


def run(args: argparse.Namespace) -> int:
    """Reads, prints the table, and writes the page if one is wanted."""
    import shlex

    from speechtx.config.atomic import write_text
    from speechtx.scoring.comparison import compared_decodings, compared_set, comparison_rows, read_groups, render
    from speechtx.scoring.page import aligned

    groups = read_groups(args.exps)
    test_set = compared_set(groups, args.test_set)
    lines = aligned(comparison_rows(groups, test_set, compared_decodings(groups, test_set, args.decoding)))
    print("\n".join(lines))
    if args.out is not None:
        command = ["speechtx", "compare", *map(str, args.exps)]
        command += ["--set", args.test_set] if args.test_set else []
        command += [word for name in args.decoding for word in ("--decoding", name)]
        command += ["--out", str(args.out)]
        write_text(args.out, render(groups, lines, test_set=test_set, command=shlex.join(command)))
        print(f"written to {args.out}")
    return 0
