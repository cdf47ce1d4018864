"""Draws an experiment's training curves: loss, its parts, token accuracy and learning rate by epoch.

example:
  speechtx curves exp/asr
  speechtx curves exp/asr --out /tmp/curves.png
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of `speechtx curves`."""
    parser.add_argument("exp", type=Path, metavar="EXP", help="experiment directory with metrics.jsonl")
    parser.add_argument("--out", type=Path, help="PNG to write (default EXP/curves.png)")


def run(args: argparse.Namespace) -> int:
    """Draws the picture and prints where it lies."""
    from speechtx.report.curves import plot_curves

    out = args.out or args.exp / "curves.png"
    out.parent.mkdir(parents=True, exist_ok=True)
    plot_curves(args.exp / "metrics.jsonl", out)
    print(out)
    return 0
