"""Writes RESULTS.md from everything that was scored in an experiment, and prints its table.

Several experiments (the same recipe with other seeds) give one page with the mean, the least and the greatest.

example:
  speechtx results --exp exp/transformer --note "Synthetic speech: says nothing about real recordings."
  speechtx results --exp exp/a_seed1 --exp exp/a_seed2 --exp exp/a_seed3 --out RESULTS.md
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of `speechtx results`."""
    parser.add_argument(
        "--exp", type=Path, action="append", required=True, metavar="DIR", help="experiment directory (repeatable)"
    )
    parser.add_argument("--out", type=Path, help="the page (default: RESULTS.md in the experiment, if there is one only)")
    parser.add_argument(
        "--current-only", action="store_true", help="leave out, and list, what was decoded again but not yet scored again"
    )
    parser.add_argument("--note", default="", metavar="TEXT", help="a plain statement for the top of the page")


def run(args: argparse.Namespace) -> int:
    """Reads, writes, and prints the table."""
    import shlex
    import sys
    from datetime import date

    from speechtx.config.atomic import write_text
    from speechtx.config.errors import ScoringError
    from speechtx.scoring.page import render, score_table
    from speechtx.scoring.results import read_experiment, stale_scores

    if args.out is None and len(args.exp) > 1:
        raise ScoringError("several experiments have no one place for the page: say where with --out")
    out = args.out or args.exp[0] / "RESULTS.md"
    experiments = [read_experiment(exp, current_only=args.current_only) for exp in args.exp]
    if args.current_only:
        for path in (path for exp in args.exp for path in sorted(exp.glob("decode_*")) if stale_scores(path)):
            print(f"left out until it is scored again: {path}", file=sys.stderr)
    command = ["speechtx", "results", *(word for exp in args.exp for word in ("--exp", str(exp)))]
    command += (["--out", str(args.out)] if args.out else []) + (["--note", args.note] if args.note else [])
    page = render(experiments, note=args.note, command=shlex.join(command), date=date.today().isoformat())
    write_text(out, page)
    print("\n".join(score_table(experiments)))
    print(f"written to {out}")
    return 0
