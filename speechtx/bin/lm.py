"""Language models over the recipe's tokens: n-gram, whole words (stage 3) and Transformer (stage 4).

examples:
  speechtx lm ngram --config conf/lm.yaml --train data/train --dev data/dev --tokenizer data/tokenizer/a exp/lm/a/ngram
  speechtx lm lexicon --config conf/lm.yaml --train data/train --dev data/dev --tokenizer data/tokenizer/a exp/lm/a/lexicon
  speechtx lm train --config conf/lm.yaml --train data/train --dev data/dev --tokenizer data/tokenizer/a exp/lm/a/transformer
  speechtx lm perplexity exp/lm/a/ngram data/test
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from speechtx.config.lm import LmConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Defines one sub-command an operation."""
    commands = parser.add_subparsers(title="operations", metavar="OPERATION", required=True)

    def command(name: str, summary: str, operation: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", allow_abbrev=False)
        sub.set_defaults(operation=operation)
        return sub

    ngram = command("ngram", "estimate an n-gram (modified Kneser-Ney) and write it as an ARPA file", _ngram)
    lexicon = command("lexicon", "estimate an n-gram of whole words and list them: no other word can be recognised", _lexicon)
    train = command("train", "train a Transformer, or continue where it was stopped", _train)
    for sub in (ngram, lexicon, train):
        sub.add_argument("--config", type=Path, required=True, metavar="FILE", help="conf/lm.yaml")
        sub.add_argument(
            "--set",
            dest="overrides",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="override one value; may be repeated",
        )
        sub.add_argument(
            "--train",
            type=Path,
            required=True,
            metavar="DIR",
            help="data directory; its text is taken unless the YAML names texts",
        )
        sub.add_argument("--dev", type=Path, required=True, metavar="DIR", help="data directory whose perplexity is reported")
        sub.add_argument("--tokenizer", type=Path, required=True, metavar="DIR", help="tokenizer of stage 3")
        sub.add_argument("out", type=Path, metavar="OUT", help="the model's directory")
    train.add_argument("--ngpu", type=int, default=0, metavar="N", help="0: CPU; 1: one GPU (default: 0)")
    sections = command("sections", "print the models that a configuration asks for, one a line (recipes' plumbing)", _sections)
    sections.add_argument("--config", type=Path, required=True, metavar="FILE", help="conf/lm.yaml")
    texts = command("texts", "print the texts that a section takes, one a line (recipes' plumbing)", _texts)
    texts.add_argument("--config", type=Path, required=True, metavar="FILE", help="conf/lm.yaml")
    texts.add_argument("--train", type=Path, action="append", default=[], metavar="DIR", help="printed if the section names none")
    texts.add_argument("section", choices=("ngram", "lexicon", "transformer"))
    measure = command("perplexity", "print the perplexity of texts, per token and per word", _perplexity)
    measure.add_argument("--tokenizer", type=Path, metavar="DIR", help="needed for a bare ARPA file; else the model's own")
    measure.add_argument("lm", type=Path, metavar="LM", help="a language model's directory, or an ARPA file")
    measure.add_argument(
        "texts", type=Path, metavar="TEXT", nargs="+", help="data directory, or a file with one sentence a line and no ids"
    )


def run(args: argparse.Namespace) -> int:
    """Runs the chosen operation."""
    operation: Callable[[argparse.Namespace], int] = args.operation
    return operation(args)


def _config(path: Path, overrides: Sequence[str] = ()) -> LmConfig:
    from speechtx.config.lm import LmConfig
    from speechtx.config.load import load_config

    return load_config(path, LmConfig, overrides)


def _section(args: argparse.Namespace, name: str, example: str) -> Any:
    """That section of the configuration.

    Raises:
        ConfigError: there is none.
    """
    from speechtx.config.errors import ConfigError

    section = getattr(_config(args.config, args.overrides), name)
    if section is None:
        raise ConfigError(f"{args.config}: no section {name}; write for example `{name}: {{{example}}}`")
    return section


def _ngram(args: argparse.Namespace) -> int:
    from speechtx.training.ngram import make_ngram

    config = _section(args, "ngram", "order: 3")
    make_ngram(config, train=args.train, dev=args.dev, tokenizer=args.tokenizer, out=args.out)
    return 0


def _lexicon(args: argparse.Namespace) -> int:
    from speechtx.training.lexicon import make_lexicon

    config = _section(args, "lexicon", "order: 2")
    make_lexicon(config, train=args.train, dev=args.dev, tokenizer=args.tokenizer, out=args.out)
    return 0


def _train(args: argparse.Namespace) -> int:
    from speechtx.training.lm_train import train_language_model

    config = _section(args, "transformer", "layers: 2")
    train_language_model(config, train=args.train, dev=args.dev, tokenizer=args.tokenizer, out=args.out, ngpu=args.ngpu)
    return 0


def _sections(args: argparse.Namespace) -> int:
    for name, section in _config(args.config):
        if section is not None:
            print(name)
    return 0


def _texts(args: argparse.Namespace) -> int:
    config = getattr(_config(args.config), args.section)
    if config is None:
        return 0
    for text in (*(config.text or args.train), *getattr(config, "words", ())):
        print(Path(text, "text") if Path(text).is_dir() else text)
    return 0


def _perplexity(args: argparse.Namespace) -> int:
    from speechtx.config.errors import ConfigError
    from speechtx.experiment.language_model import load_language_model
    from speechtx.text.tokenizer import Tokenizer
    from speechtx.training.lm_text import read_text
    from speechtx.training.perplexity import perplexity

    if args.tokenizer is None and not (args.lm / "tokenizer").is_dir():
        raise ConfigError(f"{args.lm} holds no tokenizer; give --tokenizer, or the directory that `speechtx lm` made")
    tokenizer = Tokenizer.load(args.tokenizer or args.lm / "tokenizer")
    model = load_language_model(args.lm, tokens=tokenizer.pieces)
    for text in args.texts:
        print(perplexity(model, read_text((text,), tokenizer)))
    return 0
