"""Decoding a data directory: one job of several, and the merge."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from speechtx import __version__
from speechtx.config.decode import DecodeConfig
from speechtx.config.errors import ConfigError, DataError
from speechtx.data.kaldi_table import read_utt2spk
from speechtx.data.loader import FeatureReader
from speechtx.data.manifest import Utterance, load_manifest, read_fbank_config, require_same_features
from speechtx.experiment.experiment import Experiment
from speechtx.search.batch_decoder import BatchDecoder
from speechtx.search.parts import Decoded, PartWriter, RunKey, data_digest, merge_parts, only_one_job, read_parts
from speechtx.search.progress import Progress
from speechtx.search.system import System

log = logging.getLogger(__name__)


def decode_job(
    *, system: System, data_dir: Path, config: DecodeConfig, out_dir: Path, job: int, num_jobs: int, device: str
) -> list[Decoded]:
    """Decodes the share of one job into `out_dir/parts/JOB.jsonl`; utterances that are there already are not decoded again.

    An utterance that cannot be decoded is logged and gets an empty n-best list with the cause.

    Returns:
        What was decoded by this call.

    Raises:
        ConfigError: job out of range, a search that needs a decoder this model does not have, a weight without its model.
        DataError: the data directory has no features, or they were computed otherwise than the model's.
        ExperimentError: the experiment is incomplete, or a language model does not fit it.
    """
    share = job_share(system.exp, data_dir, job=job, num_jobs=num_jobs)
    (key,) = run_keys(system, [config], data_dir, num_jobs)
    results: list[Decoded] = []
    with ExitStack() as stack:
        stack.enter_context(only_one_job(out_dir, job))
        part = PartWriter(out_dir / "parts" / f"{job}.jsonl", key=key, device=device, threads=torch.get_num_threads())
        stack.callback(part.close)
        todo = [utterance for utterance in share if utterance.id not in part.done]
        if part.done:
            log.info("job %d: %d utterances are decoded already, %d remain", job, len(part.done), len(todo))
        if todo:
            decoder = open_decoder(system, [config], data_dir, device)
            with Progress(name=f"job {job}", total=len(todo), path=part.path.with_suffix(".progress")) as progress:
                for _, batch in decoder.batches(todo):
                    part.write(batch)
                    results += batch
                    progress.add(batch)
    return results


def job_share(exp: Experiment, data_dir: Path, *, job: int, num_jobs: int) -> list[Utterance]:
    """Every num_jobs-th utterance by length, so that jobs take equally long.

    Raises:
        ConfigError: job out of range.
        DataError: the data directory has no features, or they were computed otherwise than the model's.
    """
    if not 1 <= job <= num_jobs:
        raise ConfigError(f"--job {job} is not between 1 and --num-jobs {num_jobs}")
    require_same_features(exp.fbank, exp.path, read_fbank_config(data_dir), data_dir)
    return sorted(load_manifest(data_dir, text=False), key=lambda u: (-u.num_frames, u.id.encode()))[job - 1 :: num_jobs]


def run_keys(system: System, configs: Sequence[DecodeConfig], data_dir: Path, num_jobs: int) -> list[RunKey]:
    """What the results of decoding with each configuration depend on."""
    data = data_digest(data_dir)
    return [
        RunKey(system=identity, config=config.model_dump(mode="json"), data_sha256=data, num_jobs=num_jobs, version=__version__)
        for config, identity in zip(configs, system.identify(configs), strict=True)
    ]


def open_decoder(system: System, configs: Sequence[DecodeConfig], data_dir: Path, device: str) -> BatchDecoder:
    """Loads model, language models and feature reader."""
    exp = system.exp
    reader = FeatureReader(
        config=exp.config.features, num_mel_bins=exp.fbank.num_mel_bins, global_cmvn=exp.global_cmvn, data_dir=data_dir
    )
    model, scorers = system.load(configs, device)
    return BatchDecoder(model=model, exp=exp, reader=reader, configs=configs, scorers=scorers, device=device)


def merge_jobs(*, data_dir: Path, out_dir: Path, num_jobs: int) -> dict[str, Any]:
    """Joins the jobs' parts; see `parts.merge_parts`. Utterances without features are named and get an empty hypothesis.

    Raises:
        DataError: a job has not run, an utterance of the data directory was not decoded exactly once, or none could be decoded.
    """
    parts = read_parts(out_dir, num_jobs)
    with_features = {utterance.id for utterance in load_manifest(data_dir, text=False)}
    without = [utt for utt in read_utt2spk(data_dir / "utt2spk") if utt not in with_features]
    parts[0].results.extend(Decoded(utt, [], 0.0, 0.0, "no features: stage fbank skipped it") for utt in without)
    summary = merge_parts(out_dir, parts=parts, expected=[*with_features, *without], data_dir=str(data_dir))
    failed = summary["failed"]
    if len(failed) == summary["num_utts"]:
        utt, error = next(iter(failed.items()))
        raise DataError(f"{out_dir}: not one of {len(failed)} utterances of {data_dir} could be decoded; {utt}: {error}")
    return summary


def choose_device(ngpu: int, job: int = 1) -> str:
    """The device of one job: the CPU, or its GPU in turn.

    Raises:
        ConfigError: a GPU is asked for and there is none.
    """
    if ngpu == 0:
        return "cpu"
    if not torch.cuda.is_available():
        raise ConfigError("--ngpu 1, but PyTorch sees no CUDA device; use --ngpu 0, or check `nvidia-smi` and the PyTorch build")
    return f"cuda:{(job - 1) % torch.cuda.device_count()}"


def share_threads(num_jobs: int) -> None:
    """Gives this job its share of the processors, unless OMP_NUM_THREADS says otherwise."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // num_jobs))
