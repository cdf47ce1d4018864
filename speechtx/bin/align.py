"""Finds where the words of a data directory are said, by the CTC output of a trained model.

Writes OUT/ctm (NIST's format: utterance, channel, start, length, word), and Kaldi's tables segments, text and utt2spk of the
runs of one to three words that the model recognises standing alone. Training can join such runs anew in every epoch
(`training.join.words: OUT`, docs/regularisation.md). Times are in seconds from the beginning of an utterance.

example: speechtx align --exp exp/align --data data/train --out exp/align/words
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of `speechtx align`."""
    parser.add_argument("--exp", required=True, type=Path, metavar="DIR", help="experiment directory, with model.pt")
    parser.add_argument("--data", required=True, type=Path, metavar="DIR", help="data directory with features and transcripts")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where ctm, segments, text and utt2spk go")
    parser.add_argument("--ngpu", type=int, default=0, choices=(0, 1), help="1: on a GPU (default 0)")


def run(args: argparse.Namespace) -> int:
    """Aligns, and says how many words can be cut out."""
    from speechtx.experiment.experiment import Experiment
    from speechtx.search.align import align_data
    from speechtx.search.decode_dir import choose_device

    counts = align_data(Experiment.open(args.exp), args.data, args.out, device=choose_device(args.ngpu, 1))
    print(f"{args.out}: {counts}")
    return 0
