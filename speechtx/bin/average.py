"""Averages the weights of the best, or the last, epochs into model.pt (stage 5).

Which epochs is decided by training.average of the experiment's config.yaml: the best by dev accuracy or dev loss, or the last.

example: speechtx average --exp exp/transformer
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--exp", required=True, type=Path, metavar="DIR", help="experiment directory")


def run(args: argparse.Namespace) -> int:
    from speechtx.experiment.experiment import Experiment
    from speechtx.training.averaging import average_checkpoints

    config = Experiment.open(args.exp).config.training.average
    epochs = average_checkpoints(args.exp, config)
    print(f"{args.exp}/model.pt: mean of {len(epochs)} epochs by {config.by}: {' '.join(map(str, epochs))}")
    return 0
