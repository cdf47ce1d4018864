"""Sums up means and variances of a data directory's features: by speaker (cmvn.scp) and over all (global_cmvn.ark).

example:
  speechtx cmvn --data data/train
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of `speechtx cmvn`."""
    parser.add_argument("--data", type=Path, required=True, help="data directory with feats.scp and utt2spk")


def run(args: argparse.Namespace) -> int:
    """Writes the statistics and prints one line of counts."""
    from speechtx.data.features import compute_cmvn

    stats, num_speakers = compute_cmvn(args.data)
    print(f"{args.data}: CMVN of {num_speakers} speakers, {stats.count:.0f} frames, {len(stats.sums)} bins")
    return 0
