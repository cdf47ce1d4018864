"""Looks at the attention of a trained model, for utterances of a data directory.

Without --measure: one PNG an utterance. A row a layer with its diagonality, a pair of maps a head, and the penalty's prior below.
Both maps of a pair come from the same queries and keys, so the difference is what the penalty does in that layer. With --cross
also UTT.cross.png, the decoder's attention to the encoder while it is fed the transcript.

With --measure: a table of the encoder's layers over all utterances named, or the whole directory: the greatest |q.k|/sqrt(d_k)
(logit_bound of `window: auto`), diagonality, mean distance, the weight outside windows (mean and greatest of all queries), and
the window that the penalty proves to lose at most 0.001 as long as no logit exceeds that bound.

examples:
  speechtx attention exp/asr --data data/test fcaw-cen1-b menk-an153-b --out exp/asr/attention --layers 0,5,11 --cross
  speechtx attention exp/asr --data data/test --measure --out exp/asr/attention
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from speechtx.data.loader import FeatureReader
    from speechtx.data.manifest import Utterance
    from speechtx.experiment.experiment import Experiment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of `speechtx attention`."""
    parser.add_argument("exp", type=Path, metavar="EXP", help="experiment directory with the model")
    utterances = parser.add_argument(
        "utterances",
        nargs="+",
        default=[],
        metavar="UTT",
        help="utterance ids of the data directory; with --measure, none means all",
    )
    utterances.required = False  # nargs="*" would be content with nothing as soon as an option follows EXP, and refuse later ids
    parser.add_argument("--data", type=Path, required=True, help="data directory with features")
    parser.add_argument("--out", type=Path, help="directory for UTT.png or attention.json; --measure can do without")
    parser.add_argument("--layers", metavar="N,N,...", help="which layers, counted from 0 (default: all)")
    parser.add_argument(
        "--cross", action="store_true", help="draw the decoder's attention to the encoder as well (all its layers)"
    )
    parser.add_argument("--measure", action="store_true", help="print the table instead of drawing; --out takes it as JSON")
    parser.add_argument("--weights", type=Path, help="weights to use (default: EXP/model.pt, the average of stage 5)")


def run(args: argparse.Namespace) -> int:
    """Draws the pictures and prints where they lie, or prints the table."""
    from speechtx.config.errors import ConfigError, DataError
    from speechtx.data.loader import FeatureReader
    from speechtx.data.manifest import load_manifest, read_fbank_config, require_same_features
    from speechtx.experiment.experiment import Experiment

    try:
        layers = None if args.layers is None else [int(layer) for layer in args.layers.split(",")]
    except ValueError:
        raise ConfigError(f"--layers {args.layers}: expected numbers separated by commas, for example 0,5,11") from None
    if args.measure and args.cross:
        raise ConfigError("--cross draws and --measure does not; give one of them")
    if not args.measure and not (args.utterances and args.out):
        raise ConfigError("name the utterances to draw and --out for the pictures, or give --measure")
    exp = Experiment.open(args.exp)
    rows = {row.id: row for row in load_manifest(args.data, text=args.cross)}
    if missing := [key for key in args.utterances if key not in rows]:
        raise DataError(f"{args.data}: no utterance {', '.join(missing)} with features")
    require_same_features(exp.fbank, args.exp, read_fbank_config(args.data), args.data)
    reader = FeatureReader(
        config=exp.config.features, num_mel_bins=exp.fbank.num_mel_bins, global_cmvn=exp.global_cmvn, data_dir=args.data
    )
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
    chosen = [rows[key] for key in args.utterances] or list(rows.values())
    return (_measure if args.measure else _draw)(args, exp, chosen, reader, layers)


def _draw(
    args: argparse.Namespace, exp: Experiment, utterances: list[Utterance], reader: FeatureReader, layers: list[int] | None
) -> int:
    import torch

    from speechtx.report.attention_maps import plot_cross_maps, plot_maps
    from speechtx.report.attention_probe import cross_maps, encoder_maps

    model = exp.load_model(args.weights)
    for row in utterances:
        feats = torch.from_numpy(reader(row))
        title = f"{row.id}: {row.text}" if row.text else row.id
        out = args.out / f"{file_name(row.id)}.png"
        plot_maps(encoder_maps(model.encoder, feats, layers), title=title, frame_seconds=_frame_seconds(exp), out=out)
        print(out)
        if args.cross:
            maps = cross_maps(model, feats, exp.tokenizer.encode(row.text))
            pieces = [*exp.tokenizer.encode_pieces(row.text), "<eos>"]  # which a decoder of type mask_ctc has no row for
            rows = pieces[: maps[0].trained.shape[1]]
            plot_cross_maps(maps, rows, title=title, frame_seconds=_frame_seconds(exp), out=out.with_suffix(".cross.png"))
            print(out.with_suffix(".cross.png"))
    return 0


def file_name(utterance: str) -> str:
    """An utterance's id as the beginning of its pictures' names, different for different ids: `a/b` is written a%2Fb.

    So is an id's own `.cross` at its end, which would make its picture that of another utterance's decoder.
    """
    return re.sub(r"[%/]|\.(?=cross\Z)", lambda sign: f"%{ord(sign[0]):02X}", utterance)


def _measure(
    args: argparse.Namespace, exp: Experiment, utterances: list[Utterance], reader: FeatureReader, layers: list[int] | None
) -> int:
    import torch
    from tqdm import tqdm

    from speechtx.report.attention_locality import format_table, measure, write_json

    def features() -> Iterator[Tensor]:
        for row in tqdm(utterances, desc="attention", unit="utt", delay=2.0, disable=None):
            yield torch.from_numpy(reader(row))

    measured = measure(exp.load_model(args.weights).encoder, features(), layers)
    print(format_table(measured, frame_seconds=_frame_seconds(exp)))
    if args.out is not None:
        out = args.out / "attention.json"
        write_json(measured, utterances=len(utterances), frame_seconds=_frame_seconds(exp), out=out)
        print(out)
    return 0


def _frame_seconds(exp: Experiment) -> float:
    return exp.config.model.encoder.subsampling.factor * exp.fbank.frame_shift_ms / 1000.0
