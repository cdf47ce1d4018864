"""Trains a model (stage 4), or continues where a killed run stopped.

Reads conf/train.yaml, the training and dev data directories with features, and a tokenizer; writes an experiment
directory. Running the same command again continues from the newest checkpoint.

example: speechtx train --config conf/train.yaml --train data/train --dev data/dev --tokenizer data/lang_bpe --exp exp/transformer
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, type=Path, metavar="FILE", help="the experiment's YAML (conf/train.yaml)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="overrides one value of the YAML; may be repeated"
    )
    parser.add_argument("--train", required=True, type=Path, metavar="DIR", help="training data directory, with features")
    parser.add_argument("--dev", required=True, type=Path, metavar="DIR", help="dev data directory, with features")
    parser.add_argument("--tokenizer", required=True, type=Path, metavar="DIR", help="tokenizer of stage 3")
    parser.add_argument("--exp", required=True, type=Path, metavar="DIR", help="experiment directory to make or to continue")
    parser.add_argument("--seed", type=int, help="overrides the YAML's seed")
    parser.add_argument(
        "--profile",
        type=int,
        default=0,
        metavar="N",
        help="take N steps only, and write where their time goes to EXP/profile.md; the experiment stands where it stood "
        "(training.compile and gradient_checkpointing are off meanwhile)",
    )
    parser.add_argument(
        "--ngpu", type=int, default=0, metavar="N", help="0: CPU; N: that many GPUs, each with batches of its own (default: 0)"
    )
    parser.add_argument(
        "--procs",
        type=int,
        default=1,
        metavar="N",
        help="on the CPU: N processes that share the batches of each step; 0: as many as pay, one a processor, at most 4, each "
        "with two utterances of a step or more (default: 1)",
    )


def run(args: argparse.Namespace) -> int:
    from speechtx.config.errors import ConfigError
    from speechtx.config.load import load_config
    from speechtx.config.schema import TrainConfig
    from speechtx.training.launch import launch, processes_that_pay
    from speechtx.training.prepare import TrainingData
    from speechtx.training.train import train

    overrides = [*args.set, *([f"seed={args.seed}"] if args.seed is not None else [])]
    config = load_config(args.config, TrainConfig, overrides)
    if args.procs < 0 or (args.procs > 1 and args.ngpu):
        raise ConfigError(f"--procs {args.procs} --ngpu {args.ngpu}: --procs is 0 or more, and is for the CPU only")
    if "RANK" not in os.environ:
        processes = args.ngpu or args.procs or processes_that_pay(args.train, config.training)
        if processes > 1:
            command = [sys.executable, "-m", "speechtx.bin.main", *sys.argv[1:]]
            launch(command, processes=processes, log_dir=args.exp / "log")
            return 0
    data = TrainingData(train=args.train, dev=args.dev, tokenizer=args.tokenizer)
    train(config, data, args.exp, ngpu=args.ngpu, share_batches=args.procs != 1 and not args.ngpu, profile=args.profile)
    return 0
