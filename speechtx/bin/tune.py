"""Chooses decoding weights on a development set: decodes it with every point of a grid and counts errors with NIST sclite.

The grid is YAML of keys of conf/decode.yaml with lists of values, `lm_weight: [0.0, 0.2, 0.4]`; all combinations are tried.
Audio is encoded once. OUT/tuned.yaml is the best configuration, whole, to decode with; OUT/tune.json has all points. Of equally
good ones the one with the smaller values wins, keys compared in the order of the grid's file. What is decoded already is kept
when it is run again, after a kill or with a longer grid. Never give it a test set: what was chosen on a set says nothing there.

example:
  speechtx tune --exp exp/asr --data data/dev --config conf/decode.yaml --grid conf/tune.yaml --lm exp/lm/asr/transformer \\
    --ngram exp/lm/asr/ngram --out exp/asr/tune_dev_decode
  speechtx tune ... --job 1 --num-jobs 4       (one share of four; then once: speechtx tune ... --num-jobs 4 --merge)
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from speechtx.bin.decode import add_system_arguments

if TYPE_CHECKING:
    from speechtx.search.tune import Trial

_SHOWN = 20  # points of the table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of `speechtx tune`."""
    add_system_arguments(parser)
    parser.add_argument("--data", type=Path, required=True, help="development set with features and transcripts")
    parser.add_argument("--config", type=Path, required=True, help="decoding configuration whose values are replaced")
    parser.add_argument("--grid", type=Path, required=True, help="keys and the values to try")
    parser.add_argument("--out", type=Path, required=True, help="where results go, for example EXP/tune_dev_decode")
    parser.add_argument("--unit", choices=("wer", "cer"), default="wer", help="what is counted (default wer)")
    parser.add_argument("--job", type=int, metavar="J", help="decode the J-th share only, and leave the choice for later")
    parser.add_argument("--num-jobs", type=int, default=1, metavar="N", help="number of shares (default 1)")
    parser.add_argument("--ngpu", type=int, default=0, choices=(0, 1), help="1: decode on a GPU (default 0)")
    parser.add_argument("--merge", action="store_true", help="only score what N finished jobs decoded, and choose")


def run(args: argparse.Namespace) -> int:
    """Decodes one share, or chooses; without --job and --merge, both."""
    import logging

    from speechtx.bin.decode import require_sane_jobs
    from speechtx.config.decode import DecodeConfig
    from speechtx.config.load import load_config
    from speechtx.config.tune import load_grid

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    require_sane_jobs(args)
    points = load_grid(args.grid, load_config(args.config, DecodeConfig))

    from speechtx.search.decode_dir import choose_device, share_threads
    from speechtx.search.system import System
    from speechtx.search.tune import TUNED_FILE, at_the_edge, choose, tune_job

    if not args.merge:
        share_threads(args.num_jobs)
        job = 1 if args.job is None else args.job
        count = tune_job(
            system=System.find(args.exp, weights=args.weights, lm=args.lm, ngram=args.ngram),
            data_dir=args.data,
            points=points,
            out_dir=args.out,
            job=job,
            num_jobs=args.num_jobs,
            device=choose_device(args.ngpu, job),
        )
        print(f"job {job}: {count} results with {len(points)} configurations")
    if args.merge or args.job is None:
        trials = choose(data_dir=args.data, points=points, out_dir=args.out, num_jobs=args.num_jobs, unit=args.unit)
        print("\n".join(table(trials, args.unit)))
        for key in at_the_edge(trials):
            print(f"the best {key} is the greatest that was tried: {args.grid} might go further")
        print(f"{args.out / TUNED_FILE}: {trials[0].point}, chosen on {args.data}")
    return 0


def table(trials: Sequence[Trial], unit: str) -> list[str]:
    """The best points, a line each."""
    rows = [[*trials[0].point.values, f"{unit.upper()} %", "errors"]]
    rows += [[*map(str, t.point.values.values()), f"{t.rate:.2f}", f"{t.errors} / {t.reference}"] for t in trials[:_SHOWN]]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    if len(trials) > _SHOWN:
        lines.append(f"and {len(trials) - _SHOWN} more in tune.json")
    return lines
