"""Choosing decoding weights on a development set: each point of a grid is decoded and scored by sclite, the best is kept."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from speechtx.config.atomic import write_text
from speechtx.config.decode import DecodeConfig
from speechtx.config.errors import DataError
from speechtx.config.load import config_hash, dump_config
from speechtx.config.tune import GridPoint
from speechtx.data.kaldi_table import read_table
from speechtx.data.manifest import Utterance
from speechtx.scoring.sclite import score
from speechtx.search.batch_decoder import BatchDecoder
from speechtx.search.decode_dir import job_share, merge_jobs, open_decoder, run_keys
from speechtx.search.parts import PartWriter, data_digest, only_one_job, read_parts
from speechtx.search.progress import Progress
from speechtx.search.system import System
from speechtx.text.normalize import split_characters, split_words

TUNED_FILE = "tuned.yaml"
REPORT_FILE = "tune.json"
SPLITTERS: dict[str, Callable[[str], list[str]]] = {"wer": split_words, "cer": split_characters}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """What one point of the grid scored.

    Attributes:
        point: its values.
        errors: substitutions, deletions and insertions.
        reference: units of the references.
        failed: utterances that could not be decoded, and count as empty.
        sclite: the version that counted.
    """

    point: GridPoint
    errors: int
    reference: int
    failed: int
    sclite: str

    @property
    def rate(self) -> float:
        """Errors in percent of the reference."""
        return 100.0 * self.errors / self.reference


def tune_job(
    *, system: System, data_dir: Path, points: Sequence[GridPoint], out_dir: Path, job: int, num_jobs: int, device: str
) -> int:
    """Decodes the share of one job with every point; each utterance is read and encoded once.

    Each point is a decoding of its own in `out_dir/points/HASH`, so that whatever was decoded with the same model, language
    models, data and values is kept, when the job was killed as well as when the grid has changed.

    Returns:
        How many results were missing and are there now.

    Raises:
        ConfigError, DataError, ExperimentError: see `decode_dir.decode_job`.
    """
    share = job_share(system.exp, data_dir, job=job, num_jobs=num_jobs)
    keys = run_keys(system, [point.config for point in points], data_dir, num_jobs)
    with ExitStack() as stack:
        stack.enter_context(only_one_job(out_dir, job))
        parts: list[PartWriter] = []
        for point, key in zip(points, keys, strict=True):
            path = point_dir(out_dir, point.config) / "parts" / f"{job}.jsonl"
            parts.append(PartWriter(path, key=key, device=device, threads=torch.get_num_threads()))
            stack.callback(parts[-1].close)
        todo = _group_by_missing(share, parts)
        total = sum(len(indices) * len(utterances) for indices, utterances in todo.items())
        if (there := len(points) * len(share) - total) > 0:
            log.info("job %d: %d results are there already, %d remain", job, there, total)
        if total:
            decoder = open_decoder(system, [point.config for point in points], data_dir, device)
            with Progress(name=f"job {job}", total=total, path=out_dir / f"{job}.progress") as progress:
                _decode_missing(decoder, parts, todo, progress)
    return total


def _group_by_missing(share: Sequence[Utterance], parts: Sequence[PartWriter]) -> dict[tuple[int, ...], list[Utterance]]:
    """Utterances by the points that have not decoded them yet."""
    groups: dict[tuple[int, ...], list[Utterance]] = {}
    for utterance in share:
        missing = tuple(i for i, part in enumerate(parts) if utterance.id not in part.done)
        if missing:
            groups.setdefault(missing, []).append(utterance)
    return groups


def _decode_missing(
    decoder: BatchDecoder, parts: Sequence[PartWriter], todo: dict[tuple[int, ...], list[Utterance]], progress: Progress
) -> None:
    for indices, utterances in todo.items():
        for place, batch in decoder.only(indices).batches(utterances):
            parts[indices[place]].write(batch)
            progress.add(batch)


def choose(*, data_dir: Path, points: Sequence[GridPoint], out_dir: Path, num_jobs: int, unit: str) -> list[Trial]:
    """Scores all points on the transcripts of `data_dir` and writes `tuned.yaml` and `tune.json`.

    Of points with equally few errors the one with the smaller values is chosen, keys compared in the order of the grid's file.

    Args:
        data_dir: the development set.
        points: of the grid.
        out_dir: where all jobs have run.
        num_jobs: their number.
        unit: wer or cer.

    Returns:
        All points, best first; the first is the one that was written.

    Raises:
        DataError: a job has not run, or ran on other data.
        ScoringError: references and hypotheses do not join, or sclite is missing.
    """
    refs = {utt: SPLITTERS[unit](text) for utt, text in read_table(data_dir / "text").items()}
    digest = data_digest(data_dir)
    trials = [_score(point, refs, digest, data_dir, out_dir, num_jobs, unit) for point in points]
    trials.sort(key=lambda trial: (trial.errors, trial.point.rank))
    system = asdict(read_parts(point_dir(out_dir, trials[0].point.config), num_jobs)[0].key.system)
    report = _report(trials, data_dir, unit) | system
    write_text(out_dir / REPORT_FILE, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    write_text(out_dir / TUNED_FILE, _header(trials, data_dir, unit) + dump_config(trials[0].point.config))
    return trials


def _score(
    point: GridPoint, refs: dict[str, list[str]], digest: str, data_dir: Path, out_dir: Path, num_jobs: int, unit: str
) -> Trial:
    folder = point_dir(out_dir, point.config)
    for part in read_parts(folder, num_jobs):
        if part.key.data_sha256 != digest or part.key.config != point.config.model_dump(mode="json"):
            raise DataError(
                f"{folder}: was decoded from other data than {data_dir} holds now; run the jobs of `speechtx tune` again"
            )
    failed = merge_jobs(data_dir=data_dir, out_dir=folder, num_jobs=num_jobs)["failed"]
    hyps = {utt: SPLITTERS[unit](text) for utt, text in read_table(folder / "text").items()}
    found = score(refs=refs, hyps=hyps, out_dir=folder / f"score_{unit}")
    return Trial(point, found.total.errors, found.total.reference, len(failed), found.sclite)


def _report(trials: Sequence[Trial], data_dir: Path, unit: str) -> dict[str, Any]:
    best = trials[0]
    text = hashlib.sha256((data_dir / "text").read_bytes()).hexdigest()
    return {
        "data": str(data_dir),
        "set": data_dir.absolute().name,
        "unit": unit,
        "sclite": best.sclite,
        "text_sha256": text,
        "reference_units": best.reference,
        "grid": _grid(trials),
        "chosen": best.point.values,
        "config": best.point.config.model_dump(mode="json"),
        "errors": best.errors,
        "rate": best.rate,
        "points": [
            {**trial.point.values, "errors": trial.errors, "rate": trial.rate, "failed": trial.failed} for trial in trials
        ],
    }


def _header(trials: Sequence[Trial], data_dir: Path, unit: str) -> str:
    best = trials[0]
    equal = sum(trial.errors == best.errors for trial in trials)
    lines = [
        f"Written by `speechtx tune`: the best of {len(trials)} configurations on {data_dir},",
        f"{unit.upper()} {best.rate:.2f} % ({best.errors} / {best.reference}) by NIST {best.sclite}.",
        "Chosen: " + ", ".join(f"{key} {value} among {_grid(trials)[key]}" for key, value in best.point.values.items()) + ".",
    ]
    if equal > 1:
        lines.append(f"{equal} configurations have as few errors; this one has the smallest values, keys compared in this order.")
    return "".join(f"# {line}\n" for line in lines)


def _grid(trials: Sequence[Trial]) -> dict[str, list[Any]]:
    """The values of every key, in the order of their ranks."""
    in_order = sorted(trials, key=lambda trial: trial.point.rank)
    keys = list(trials[0].point.values)
    return {key: list(dict.fromkeys(trial.point.values[key] for trial in in_order)) for key in keys}


def at_the_edge(trials: Sequence[Trial]) -> list[str]:
    """Keys whose chosen number is the greatest that was tried, of several: a greater one may be better still."""
    grid = _grid(trials)
    best = trials[0].point.values
    return [key for key, values in grid.items() if len(values) > 1 and isinstance(best[key], float) and best[key] == values[-1]]


def point_dir(out_dir: Path, config: DecodeConfig) -> Path:
    """Where the results of one point lie."""
    return out_dir / "points" / config_hash(config)[:16]
