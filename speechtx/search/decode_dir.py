"""Decoding a data directory: one job of several, and the merge."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from speechtx import __version__
from speechtx.config.decode import DecodeConfig
from speechtx.config.errors import ConfigError, DataError
from speechtx.data.batching import make_batches
from speechtx.data.kaldi_table import read_utt2spk
from speechtx.data.loader import FeatureReader, collate
from speechtx.data.manifest import Utterance, load_manifest, read_fbank_config, require_same_features
from speechtx.experiment.experiment import Experiment
from speechtx.model.recognizer import Recognizer
from speechtx.model.subsampling import subsampled_length
from speechtx.search.beam import check_weights
from speechtx.search.decode import decode_batch
from speechtx.search.parts import Decoded, PartWriter, RunKey, merge_parts, read_parts

_MAX_UTTS = 64  # utterances a batch; more gains nothing and costs memory in beam * vocabulary
_LOG_SECONDS = 30.0  # between two lines of progress where there is no terminal

log = logging.getLogger(__name__)


def decode_job(
    *, exp: Experiment, data_dir: Path, config: DecodeConfig, out_dir: Path, job: int, num_jobs: int, device: str, weights: Path
) -> list[Decoded]:
    """Decodes the share of one job into `out_dir/parts/JOB.jsonl`; utterances that are there already are not decoded again.

    The share is every num_jobs-th utterance by length, so that jobs take equally long. An utterance that cannot be decoded is
    logged and gets an empty n-best list with the cause.

    Returns:
        What was decoded by this call.

    Raises:
        ConfigError: job out of range, or a search that needs a decoder this model does not have.
        DataError: the data directory has no features, or they were computed otherwise than the model's.
        ExperimentError: the experiment is incomplete.
    """
    if not 1 <= job <= num_jobs:
        raise ConfigError(f"--job {job} is not between 1 and --num-jobs {num_jobs}")
    fbank = exp.fbank
    require_same_features(fbank, exp.path, read_fbank_config(data_dir), data_dir)
    by_length = sorted(load_manifest(data_dir, text=False), key=lambda u: (-u.num_frames, u.id.encode()))
    reader = FeatureReader(
        config=exp.config.features, num_mel_bins=fbank.num_mel_bins, global_cmvn=exp.global_cmvn, data_dir=data_dir
    )
    model = exp.load_model(weights, device)
    check_weights(model, config)
    part = PartWriter(
        out_dir / "parts" / f"{job}.jsonl",
        key=RunKey(
            weights=weights.name,
            weights_sha256=_sha256(weights),
            config=config.model_dump(mode="json"),
            feats_sha256=_sha256(data_dir / "feats.scp"),
            num_jobs=num_jobs,
            version=__version__,
        ),
        device=device,
        threads=torch.get_num_threads(),
    )
    todo = [utterance for utterance in by_length[job - 1 :: num_jobs] if utterance.id not in part.done]
    if part.done:
        log.info("job %d: %d utterances are decoded already, %d remain", job, len(part.done), len(todo))
    decoder = _Decoder(model=model, reader=reader, exp=exp, config=config, device=device)
    results: list[Decoded] = []
    try:
        for batch in _with_progress(decoder.batches(todo), total=len(todo), name=f"job {job}"):
            part.write(batch)
            results += batch
    finally:
        part.close()
    return results


def merge_jobs(*, data_dir: Path, out_dir: Path, num_jobs: int) -> dict[str, Any]:
    """Joins the jobs' parts; see `parts.merge_parts`. Utterances without features are named and get an empty hypothesis.

    Raises:
        DataError: a job has not run, or an utterance of the data directory was not decoded exactly once.
    """
    parts = read_parts(out_dir, num_jobs)
    with_features = {utterance.id for utterance in load_manifest(data_dir, text=False)}
    without = [utt for utt in read_utt2spk(data_dir / "utt2spk") if utt not in with_features]
    parts[0].results.extend(Decoded(utt, [], 0.0, 0.0, "no features: stage fbank skipped it") for utt in without)
    summary = merge_parts(out_dir, parts=parts, expected=[*with_features, *without], data_dir=str(data_dir))
    for utt, error in summary["failed"].items():
        log.warning("%s: not decoded, its hypothesis is empty: %s", utt, error)
    return summary


@dataclass
class _Decoder:
    """Reads and decodes utterances batch by batch."""

    model: Recognizer
    reader: FeatureReader
    exp: Experiment
    config: DecodeConfig
    device: str

    def batches(self, utterances: Sequence[Utterance]) -> Iterator[list[Decoded]]:
        lengths = [utterance.num_frames for utterance in utterances]
        budget = max([self.config.frames_per_batch, *lengths])
        for indices in make_batches(lengths, frames_per_batch=budget, max_utts=_MAX_UTTS):
            yield self._batch([utterances[i] for i in indices])

    def _batch(self, utterances: Sequence[Utterance]) -> list[Decoded]:
        start = time.perf_counter()
        readable: list[Utterance] = []
        feats: list[np.ndarray] = []
        errors: dict[str, str] = {}
        for utterance in utterances:
            try:
                feats.append(self._features(utterance))
                readable.append(utterance)
            except DataError as err:
                errors[utterance.id] = str(err)
        found: dict[str, list[Any]] = {}
        if readable:
            batch = collate([u.id for u in readable], feats, [[] for _ in readable])
            nbests = decode_batch(self.model, batch.feats.to(self.device), batch.feat_lens.to(self.device), self.config)
            found = {
                utt: [h.with_text(self.exp.tokenizer.decode) for h in nbest] for utt, nbest in zip(batch.ids, nbests, strict=True)
            }
            errors |= {utt: "the model's output is not finite" for utt, nbest in found.items() if not nbest}
        for utt, error in errors.items():
            log.warning("%s: not decoded, its hypothesis is empty: %s", utt, error)
        seconds = time.perf_counter() - start
        frames = sum(utterance.num_frames for utterance in utterances) or 1
        shift = self.exp.fbank.frame_shift_ms / 1000
        return [
            Decoded(u.id, found.get(u.id, []), u.num_frames * shift, seconds * u.num_frames / frames, errors.get(u.id))
            for u in utterances
        ]

    def _features(self, utterance: Utterance) -> np.ndarray:
        if subsampled_length(utterance.num_frames, self.exp.config.model.encoder.subsampling.factor) < 1:
            raise DataError(f"utterance {utterance.id}: {utterance.num_frames} frames are too short for the model's subsampling")
        return self.reader(utterance)


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


def _with_progress(batches: Iterator[list[Decoded]], *, total: int, name: str) -> Iterator[list[Decoded]]:
    """A bar with rate and ETA on a terminal; elsewhere a line now and then."""
    start = reported = time.monotonic()
    count = 0
    with tqdm(total=total, desc=name, unit="utt", disable=None, dynamic_ncols=True) as bar:
        for batch in batches:
            yield batch
            count += len(batch)
            bar.update(len(batch))
            now = time.monotonic()
            if bar.disable and now - reported > _LOG_SECONDS:
                log.info("%s: %d of %d utterances, %.0f s left", name, count, total, (now - start) / count * (total - count))
                reported = now


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
