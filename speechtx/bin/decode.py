"""Recognises a data directory with a trained model, in jobs, and joins what the jobs found.

A job appends to OUT/parts/JOB.jsonl; run again after a kill it continues there. --merge writes OUT/text (Kaldi's format, an empty
hypothesis is the id alone), OUT/nbest.jsonl and OUT/decode.json (configuration, failed utterances, real-time factor).
Several models, each with --exp or each with --weights, decode as an ensemble (docs/decoding.md).

An utterance that cannot be decoded (no features, NaN in them, too short, no memory) gets an empty hypothesis, is named with its
cause at the end, and stops no other; it is tried again in the next run. The exit status is 0, unless not one could be decoded.

example:
  speechtx decode --exp exp/asr --data data/test --config conf/decode.yaml --out exp/asr/decode_test_decode
  speechtx decode --exp exp/asr --data data/test --config conf/decode.yaml --out exp/asr/decode_test_decode --job 1 --num-jobs 4
  speechtx decode ... --set lm_weight=0.3 --lm exp/lm/asr/transformer
  speechtx decode --merge --data data/test --out exp/asr/decode_test_decode --num-jobs 4
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

_SHOWN = 20  # failed utterances that are named in the end


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of `speechtx decode`."""
    add_system_arguments(parser)
    parser.add_argument("--data", type=Path, required=True, help="data directory with features")
    parser.add_argument("--out", type=Path, required=True, help="where results go, for example EXP/decode_test_decode")
    parser.add_argument("--config", type=Path, help="decoding configuration; without it, the defaults")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="override one value")
    parser.add_argument("--job", type=int, metavar="J", help="decode the J-th share only, and leave the merge for later")
    parser.add_argument("--num-jobs", type=int, default=1, metavar="N", help="number of shares (default 1)")
    parser.add_argument("--ngpu", type=int, default=0, choices=(0, 1), help="1: decode on a GPU (default 0)")
    parser.add_argument("--merge", action="store_true", help="only join the parts of N finished jobs")


def add_system_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what recognises: models and language models; `speechtx tune` has the same."""
    parser.add_argument(
        "--exp", type=Path, action="append", default=[], help="experiment directory with the model; several are an ensemble"
    )
    parser.add_argument(
        "--weights",
        type=Path,
        action="append",
        default=[],
        help="weights to use (default: EXP/model.pt, the average of stage 5); several of one --exp are an ensemble",
    )
    parser.add_argument("--lm", type=Path, metavar="DIR", help="language model that lm_weight weighs")
    parser.add_argument("--ngram", type=Path, metavar="PATH", help="language model that ngram_weight weighs, or an ARPA file")


def require_sane_jobs(args: argparse.Namespace) -> None:
    """Refuses --job, --num-jobs and --merge that contradict each other.

    Raises:
        ConfigError: which, and why.
    """
    from speechtx.config.errors import ConfigError

    if args.num_jobs < 1:
        raise ConfigError(f"--num-jobs {args.num_jobs} must be at least 1")
    if args.job is None and not args.merge and args.num_jobs > 1:
        raise ConfigError(f"--num-jobs {args.num_jobs} needs --job, or --merge once all jobs are done")
    if args.merge and args.job is not None:
        raise ConfigError("--merge and --job exclude each other")


def run(args: argparse.Namespace) -> int:
    """Decodes one share, or merges; without --job and --merge, both."""
    import logging

    from speechtx.search.decode_dir import decode_job, merge_jobs, share_threads

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    require_sane_jobs(args)
    if not args.merge:
        from speechtx.config.decode import DecodeConfig
        from speechtx.config.load import load_config, parse_config
        from speechtx.search.decode_dir import choose_device
        from speechtx.search.system import System

        if args.config is not None:
            config = load_config(args.config, DecodeConfig, args.overrides)
        else:
            config = parse_config("", DecodeConfig, args.overrides, source="options")
        share_threads(args.num_jobs)
        job = 1 if args.job is None else args.job
        results = decode_job(
            system=System.find(args.exp, weights=args.weights, lm=args.lm, ngram=args.ngram),
            data_dir=args.data,
            config=config,
            out_dir=args.out,
            job=job,
            num_jobs=args.num_jobs,
            device=choose_device(args.ngpu, job),
        )
        audio, seconds = sum(r.audio_seconds for r in results), sum(r.decode_seconds for r in results)
        if results:
            rtf = f"{seconds / audio:.4f}" if audio else "undefined"
            print(f"job {job}: {len(results)} utterances, {audio:.1f} s of audio in {seconds:.1f} s, RTF {rtf}")
    if args.merge or args.job is None:
        summary = merge_jobs(data_dir=args.data, out_dir=args.out, num_jobs=args.num_jobs)
        print("\n".join(describe(summary, args.out)))
    return 0


def describe(summary: dict[str, Any], out: Path) -> list[str]:
    """The end of a decoding: what came out, how fast, and which utterances failed, with the cause."""
    failed = summary["failed"]
    rtf = f"{summary['rtf']:.4f}" if summary["rtf"] is not None else "undefined"
    lines = [f"  {utt}: {error}" for utt, error in list(failed.items())[:_SHOWN]]
    if lines:
        lines.insert(0, f"{len(failed)} utterance(s) could not be decoded; their hypotheses are empty, and will be scored so:")
    if len(failed) > _SHOWN:
        lines.append(f"  and {len(failed) - _SHOWN} more: see failed in {out}/decode.json")
    seconds = summary["wall_seconds"]
    return [
        *lines,
        f"{out}/text: {summary['num_utts']} utterances",
        f"RTF {rtf} (decoding time of all jobs / audio), {seconds:.1f} s for the longest job",
    ]
