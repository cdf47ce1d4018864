"""Trains the sentencepiece tokenizer of stage 3, and reports what of other texts it does not know.

example:
  speechtx tokenizer --config conf/train.yaml --text data/train/text --out exp/bpe --report data/train_dev/text
  speechtx tokenizer --out exp/bpe --report data/test/text      (reports only; trains nothing)
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of `speechtx tokenizer`."""
    parser.add_argument("--config", type=Path, help="training configuration; its section `tokenizer` is used")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="override one value")
    parser.add_argument("--text", type=Path, help="training transcripts (Kaldi's text); without it --out is only opened")
    parser.add_argument("--out", type=Path, required=True, help="directory for bpe.model, tokens.txt, sentencepiece.log")
    parser.add_argument(
        "--report", type=Path, action="append", default=[], metavar="TEXT", help="count <unk> in these transcripts"
    )


def run(args: argparse.Namespace) -> int:
    """Trains if `--text` is given, then prints one line of counts for every text."""
    from speechtx.config.errors import ConfigError
    from speechtx.config.load import load_config, parse_config
    from speechtx.config.schema import TrainConfig
    from speechtx.data.kaldi_table import read_table
    from speechtx.text.tokenizer import Tokenizer, report_unknown, train_tokenizer

    if args.text is None:
        if args.config or args.overrides or not args.report:
            raise ConfigError("nothing to do: give --text to train a tokenizer, or only --out and --report to count <unk>")
        tokenizer = Tokenizer.load(args.out)
    else:
        if args.config is not None:
            config = load_config(args.config, TrainConfig, args.overrides).tokenizer
        else:
            config = parse_config("", TrainConfig, args.overrides, source="options").tokenizer
        tokenizer = train_tokenizer(read_table(args.text).values(), config=config, out_dir=args.out)
        print(f"{args.out}: {config.type}, {tokenizer.vocab_size} tokens with <blank>, <unk> and <sos/eos>")
    for path in ([args.text] if args.text else []) + args.report:
        print(f"{path}: {report_unknown(tokenizer, read_table(path))}")
    return 0
