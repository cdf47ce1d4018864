"""Draws the encoder's self-attention for utterances of a data directory, with the trained penalty and with it removed.

One PNG an utterance: a row a layer, a pair of maps a head, and the penalty's prior below. Both maps of a pair come from the same
queries and keys, so the difference is what the penalty does in that layer.

example:
  speechtx attention exp/asr --data data/test fcaw-cen1-b menk-an153-b --out exp/asr/attention --layers 1,6,12
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of `speechtx attention`."""
    parser.add_argument("exp", type=Path, metavar="EXP", help="experiment directory with the model")
    parser.add_argument("utterances", nargs="+", metavar="UTT", help="utterance ids of the data directory")
    parser.add_argument("--data", type=Path, required=True, help="data directory with features")
    parser.add_argument("--out", type=Path, required=True, help="directory for UTT.png")
    parser.add_argument("--layers", metavar="N,N,...", help="which layers, counted from 1 (default: all)")
    parser.add_argument("--weights", type=Path, help="weights to use (default: EXP/model.pt, the average of stage 5)")


def run(args: argparse.Namespace) -> int:
    """Draws the pictures and prints where they lie."""
    import torch

    from speechtx.config.errors import ConfigError, DataError
    from speechtx.data.loader import FeatureReader
    from speechtx.data.manifest import load_manifest, read_fbank_config, require_same_features
    from speechtx.experiment.experiment import Experiment
    from speechtx.model.subsampling import SUBSAMPLING_FACTOR
    from speechtx.report.attention_maps import encoder_maps, plot_maps

    try:
        layers = None if args.layers is None else [int(layer) for layer in args.layers.split(",")]
    except ValueError:
        raise ConfigError(f"--layers {args.layers}: expected numbers separated by commas, for example 1,6,12") from None
    exp = Experiment.open(args.exp)
    rows = {row.id: row for row in load_manifest(args.data, text=False)}
    if missing := [key for key in args.utterances if key not in rows]:
        raise DataError(f"{args.data}: no utterance {', '.join(missing)} with features")
    require_same_features(exp.fbank, args.exp, read_fbank_config(args.data), args.data)
    reader = FeatureReader(
        config=exp.config.features, num_mel_bins=exp.fbank.num_mel_bins, global_cmvn=exp.global_cmvn, data_dir=args.data
    )
    model = exp.load_model(args.weights)
    args.out.mkdir(parents=True, exist_ok=True)
    for key in args.utterances:
        maps = encoder_maps(model.encoder, torch.from_numpy(reader(rows[key])), layers)
        out = args.out / f"{key.replace('/', '_')}.png"
        plot_maps(
            maps,
            model.encoder.penalty,
            title=f"{key}: {rows[key].text}" if rows[key].text else key,
            frame_seconds=SUBSAMPLING_FACTOR * exp.fbank.frame_shift_ms / 1000.0,
            out=out,
        )
        print(out)
    return 0
