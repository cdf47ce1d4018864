"""Computes filterbank features: one shard of a data directory's utterances, or joins the shards into its tables.

utils/steps/fbank.sh runs both; by hand:
  speechtx fbank --data data/train --config conf/fbank.yaml --job 1 --num-jobs 4
  speechtx fbank --data data/train --config conf/fbank.yaml --num-jobs 4 --merge
Without --out-ark and --out-scp, shard J is written to DATA/fbank/feats.J.ark and feats.J.scp, where --merge looks for it.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of `speechtx fbank`."""
    parser.add_argument(
        "--data", type=Path, required=True, help="data directory: wav.scp, and segments and utt2speed if there are"
    )
    parser.add_argument("--config", type=Path, help="features (fbank.yaml); without it the defaults: 80 bins, 16 kHz")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="override one value")
    parser.add_argument("--job", type=int, default=1, metavar="J", help="which shard, from 1 (default 1)")
    parser.add_argument("--num-jobs", type=int, default=1, metavar="N", help="how many shards (default 1)")
    parser.add_argument("--out-ark", type=Path, help="archive to write")
    parser.add_argument("--out-scp", type=Path, help="its table")
    parser.add_argument("--compress", action="store_true", help="Kaldi's lossy 8-bit compression: a quarter of the size")
    parser.add_argument("--backend", choices=("kaldi-native-fbank", "torchaudio"), help="library that computes the features")
    parser.add_argument("--allow-pipes", action="store_true", help="run the commands in wav.scp; only for data you trust")
    parser.add_argument(
        "--merge", action="store_true", help="join the shards into feats.scp, utt2num_frames, utt2dur, fbank.yaml"
    )


def run(args: argparse.Namespace) -> int:
    """Extracts one shard, or joins them, and prints one line of counts."""
    import time

    from speechtx.config.errors import ConfigError
    from speechtx.config.load import load_config, parse_config
    from speechtx.config.schema import FbankConfig
    from speechtx.data.features import extract_shard, merge_shards, read_sources, shard
    from speechtx.frontend.fbank import DEFAULT_BACKEND

    config = (
        load_config(args.config, FbankConfig, args.overrides)
        if args.config
        else parse_config("", FbankConfig, args.overrides, source="options")
    )
    if args.merge:
        result = merge_shards(args.data, config=config, num_jobs=args.num_jobs)
        minutes = result.seconds / 60
        lost = f", {len(result.skipped)} skipped ({args.data}/fbank/skipped.txt)" if result.skipped else ""
        print(f"{args.data}: {result.utterances} of {result.total} utterances, {minutes:.1f} min, {result.frames} frames{lost}")
        return 0
    if (args.out_ark is None) != (args.out_scp is None):
        raise ConfigError("--out-ark and --out-scp go together")
    started = time.monotonic()
    directory = args.data / "fbank"
    if args.out_ark is None or args.out_scp is None:
        directory.mkdir(exist_ok=True)
    result = extract_shard(
        shard(read_sources(args.data, allow_pipes=args.allow_pipes), args.job, args.num_jobs),
        config=config,
        ark=args.out_ark or directory / f"feats.{args.job}.ark",
        scp=args.out_scp or directory / f"feats.{args.job}.scp",
        compress=args.compress,
        backend=args.backend or DEFAULT_BACKEND,
        allow_pipes=args.allow_pipes,
    )
    took = time.monotonic() - started
    print(
        f"{result.utterances} of {result.total} utterances, {result.seconds:.0f} s of audio in {took:.1f} s "
        f"({result.seconds / max(took, 1e-9):.0f} x real time), {len(result.skipped)} skipped"
    )
    return 0
