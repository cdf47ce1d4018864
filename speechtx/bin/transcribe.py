"""Recognises audio files with a trained model and prints one line a file: the file, a tab, the text.

With --json, one JSON object a file: its n best hypotheses, each with text, tokens, score and the parts of the score. Files at
another sample rate than the model's are resampled, and a note on stderr says so. A file that cannot be used is named on stderr,
the others are done, and the exit status is 1.

example:
  speechtx transcribe exp/asr a.wav b.flac
  speechtx transcribe exp/asr --json --nbest 5 a.wav
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of `speechtx transcribe`."""
    parser.add_argument("exp", type=Path, help="experiment directory with the model")
    parser.add_argument("audio", nargs="+", help="audio files: wav, flac, NIST sphere")
    parser.add_argument("--config", type=Path, help="decoding configuration; without it, the defaults for such a model")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="override one value")
    parser.add_argument("--nbest", type=int, metavar="N", help="that many hypotheses a file (with --json)")
    parser.add_argument("--json", action="store_true", help="print hypotheses with scores as JSON lines")
    parser.add_argument(
        "--weights", type=Path, action="append", help="weights to use (default: EXP/model.pt); several are an ensemble"
    )
    parser.add_argument("--lm", type=Path, metavar="DIR", help="language model that lm_weight weighs")
    parser.add_argument("--ngram", type=Path, metavar="PATH", help="language model that ngram_weight weighs, or an ARPA file")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: a GPU where there is one)")


def run(args: argparse.Namespace) -> int:
    """Prints each file's hypothesis as soon as it is known; 1 if any file could not be used."""
    import json
    import logging
    import sys

    from speechtx.config.decode import DecodeConfig
    from speechtx.config.errors import AudioError, ConfigError
    from speechtx.config.load import load_config, parse_config
    from speechtx.experiment.experiment import Experiment
    from speechtx.search.transcribe import default_search, load_recognizer

    if args.nbest is not None and not args.json:
        raise ConfigError("--nbest needs --json: text output has one line a file")
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # to stderr
    overrides = args.overrides + ([f"nbest={args.nbest}"] if args.nbest is not None else [])
    decode = None
    if args.config is not None:
        decode = load_config(args.config, DecodeConfig, overrides)
    elif overrides:
        suits = default_search(Experiment.open(args.exp)).model_dump(exclude_defaults=True)
        overrides = [*(f"{key}={value}" for key, value in suits.items()), *overrides]
        decode = parse_config("", DecodeConfig, overrides, source="options")
    recognizer = load_recognizer(args.exp, weights=args.weights, device=args.device, decode=decode, lm=args.lm, ngram=args.ngram)
    status = 0
    for name, found in zip(args.audio, recognizer.transcribe_each(args.audio), strict=True):
        if isinstance(found, AudioError):
            print(f"speechtx transcribe: error: {found}", file=sys.stderr)
            status = 1
        elif args.json:
            print(json.dumps({"audio": name, "nbest": [h.to_json() for h in found]}, ensure_ascii=False), flush=True)
        else:
            print(f"{name}\t{found[0].text}", flush=True)
    return status
