"""Stage 2 for one data directory: features of its utterances in shards, the shards joined, statistics for normalisation.

Shard J of N writes `feats.J.ark`, `feats.J.scp`, `feats.J.lengths` (utterance, frames, seconds), `feats.J.skipped` (utterance,
why) and, while it runs, `feats.J.progress` (utterances done, utterances in all, seconds of audio). Joining turns them into the
directory's tables.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from speechtx.config.atomic import write_text
from speechtx.config.errors import AudioError, DataError
from speechtx.config.load import dump_config
from speechtx.config.schema import FbankConfig
from speechtx.data.ark import ArkWriter, read_matrix, read_scp
from speechtx.data.kaldi_table import Segment, is_pipe, read_segments, read_table, read_utt2spk
from speechtx.frontend.audio import load_audio
from speechtx.frontend.cmvn import CmvnStats
from speechtx.frontend.fbank import DEFAULT_BACKEND, Backend, Fbank

# A stage that loses more of its data than this has failed (Kaldi's steps/make_fbank.sh draws the same line).
MIN_EXTRACTED = 0.95
_PROGRESS_SECONDS = 0.5

Item = TypeVar("Item")


@dataclass(frozen=True)
class Source:
    """What an utterance is made of."""

    utterance: str
    audio: str  # file, or command ending in |
    start: float  # seconds into the recording
    end: float | None
    speed: float

    def samples(self, config: FbankConfig, *, allow_pipes: bool = False) -> np.ndarray:
        """(N,) float32 at the rate of the features and the speed of the utterance; raises AudioError, see `load_audio`."""
        return load_audio(
            self.audio,
            sample_rate=config.sample_rate,
            resample=config.resample,
            start=self.start,
            end=self.end,
            speed=self.speed,
            allow_pipes=allow_pipes,
        )


@dataclass(frozen=True)
class Extracted:
    """What came out of a shard or of a directory."""

    utterances: int
    skipped: dict[str, str]  # utterance -> cause
    frames: int
    seconds: float  # of audio

    @property
    def total(self) -> int:
        return self.utterances + len(self.skipped)


def read_sources(data_dir: str | Path, *, allow_pipes: bool = False) -> list[Source]:
    """Utterances of a data directory in C order, from wav.scp, segments and utt2speed.

    Raises:
        DataError: a table is missing or malformed, a segment's recording is unknown, a speed is no number, or wav.scp holds a
            command that may not run.
    """
    data_dir = Path(data_dir)
    wavs = read_table(data_dir / "wav.scp")
    for key, audio in wavs.items():
        if is_pipe(audio) and not allow_pipes:
            raise DataError(
                f"{data_dir / 'wav.scp'}: {key}: a command ({audio}); allow it with --allow-pipes if you trust who wrote it"
            )
    segments_path, speeds_path = data_dir / "segments", data_dir / "utt2speed"
    if segments_path.exists():
        pieces = read_segments(segments_path)
    else:
        pieces = {key: Segment(recording=key, start=0.0, end=None) for key in wavs}
    speeds = read_table(speeds_path) if speeds_path.exists() else {}
    sources = []
    for utterance in sorted(pieces):
        piece = pieces[utterance]
        if piece.recording not in wavs:
            raise DataError(
                f"{segments_path}: utterance {utterance}: recording {piece.recording} is not in {data_dir / 'wav.scp'}"
            )
        try:
            speed = float(speeds.get(utterance, "1"))
        except ValueError:
            raise DataError(f"{speeds_path}: utterance {utterance}: {speeds[utterance]!r} is not a number") from None
        sources.append(Source(utterance, wavs[piece.recording], piece.start, piece.end, speed))
    if not sources:
        raise DataError(f"{data_dir}: holds no utterance")
    return sources


def shard(sources: list[Source], job: int, num_jobs: int) -> list[Source]:
    """Piece `job` (from 1) of `num_jobs` contiguous pieces whose sizes differ by at most one."""
    if not 1 <= job <= num_jobs:
        raise DataError(f"job {job} of {num_jobs}: the job must be from 1 to the number of jobs")
    return sources[len(sources) * (job - 1) // num_jobs : len(sources) * job // num_jobs]


def extract_shard(
    sources: list[Source],
    *,
    config: FbankConfig,
    ark: str | Path,
    scp: str | Path,
    compress: bool = False,
    backend: Backend = DEFAULT_BACKEND,
    allow_pipes: bool = False,
) -> Extracted:
    """Computes features of some utterances; those that cannot be used are named on stderr and in `.skipped`, and left out.

    Args:
        sources: the utterances.
        config: features to compute.
        ark: archive to write.
        scp: its table; the other outputs have its name with another suffix.
        compress: Kaldi's 8-bit compression.
        backend: library that computes.
        allow_pipes: whether commands in wav.scp may run.
    """
    scp = Path(scp)
    fbank = Fbank(config=config, backend=backend)
    lengths: list[str] = []
    skipped: dict[str, str] = {}
    frames, seconds = 0, 0.0
    progress = _Progress(scp.with_suffix(".progress"), len(sources))
    with ArkWriter(ark=ark, scp=scp, compress=compress) as writer:
        for number, source in enumerate(_with_progress(sources, "fbank"), start=1):
            try:
                samples = source.samples(config, allow_pipes=allow_pipes)
                feats = _finite_feats(fbank, samples, source.audio)
            except AudioError as err:
                skipped[source.utterance] = " ".join(str(err).split())
                print(f"skipped {source.utterance}: {err}", file=sys.stderr, flush=True)
            else:
                writer.write(source.utterance, feats)
                duration = len(samples) / config.sample_rate
                lengths.append(f"{source.utterance} {len(feats)} {duration:.3f}\n")
                frames += len(feats)
                seconds += duration
            progress.update(number, seconds)
        write_text(scp.with_suffix(".lengths"), "".join(lengths))
        write_text(scp.with_suffix(".skipped"), _lines(skipped))
    return Extracted(len(lengths), skipped, frames, seconds)


def merge_shards(data_dir: str | Path, *, config: FbankConfig, num_jobs: int) -> Extracted:
    """Joins what the shards in `<data_dir>/fbank` wrote into the directory's feats.scp, utt2num_frames, utt2dur and fbank.yaml.

    Utterances that were skipped are missing from these tables and listed with their causes in `fbank/skipped.txt`; `text` and the
    other tables stay as they were.

    Raises:
        DataError: a shard is missing or incomplete, or less than `MIN_EXTRACTED` of the utterances have features; then none of
            the directory's tables is written.
    """
    data_dir = Path(data_dir)
    parts = [data_dir / "fbank" / f"feats.{job}.scp" for job in range(1, num_jobs + 1)]
    locations: dict[str, str] = {}
    lengths: dict[str, str] = {}
    skipped: dict[str, str] = {}
    for part in parts:
        locations |= read_scp(part)
        lengths |= read_table(part.with_suffix(".lengths"))
        skipped |= read_table(part.with_suffix(".skipped"))
    wanted = {source.utterance for source in read_sources(data_dir, allow_pipes=True)}
    if lost := wanted ^ (locations.keys() | skipped.keys()):
        raise DataError(
            f"{data_dir}: the shards in fbank/ do not belong to it: {len(lost)} utterances differ, for example {min(lost)}"
        )
    if locations.keys() != lengths.keys():
        raise DataError(f"{data_dir}/fbank: archives and lengths of the shards disagree; run the stage again")
    write_text(data_dir / "fbank" / "skipped.txt", _lines(skipped))
    if len(locations) < MIN_EXTRACTED * len(wanted):
        raise DataError(_too_few(data_dir, len(locations), len(wanted), skipped))
    rows = {key: value.split() for key, value in lengths.items()}
    write_text(data_dir / "utt2num_frames", _lines({key: row[0] for key, row in rows.items()}))
    write_text(data_dir / "utt2dur", _lines({key: row[1] for key, row in rows.items()}))
    write_text(data_dir / "fbank.yaml", dump_config(config))
    write_text(data_dir / "feats.scp", _lines(locations))  # last: whoever sees it finds the others
    for part in parts:
        for suffix in (".scp", ".lengths", ".skipped", ".progress"):
            part.with_suffix(suffix).unlink(missing_ok=True)
    frames = sum(int(row[0]) for row in rows.values())
    return Extracted(len(locations), skipped, frames, sum(float(row[1]) for row in rows.values()))


def compute_cmvn(data_dir: str | Path) -> tuple[CmvnStats, int]:
    """Writes cmvn.scp (by speaker, into fbank/cmvn.ark) and global_cmvn.ark (key `global`) of a directory that has features.

    Returns:
        The statistics of the whole directory, and the number of speakers.

    Raises:
        DataError: no features, an utterance without a speaker, or damaged features.
    """
    data_dir = Path(data_dir)
    locations = read_scp(data_dir / "feats.scp")
    speakers = read_utt2spk(data_dir / "utt2spk")
    stats: dict[str, CmvnStats] = {}
    for utterance, location in _with_progress(locations.items(), "cmvn"):
        if utterance not in speakers:
            raise DataError(f"{data_dir / 'utt2spk'}: utterance {utterance} of feats.scp has no speaker")
        own = CmvnStats.from_feats(read_matrix(location, key=utterance))
        before = stats.get(speakers[utterance])
        stats[speakers[utterance]] = own if before is None else before + own
    if not stats:
        raise DataError(f"{data_dir / 'feats.scp'}: holds no utterance")
    (data_dir / "fbank").mkdir(exist_ok=True)
    with ArkWriter(ark=data_dir / "fbank" / "cmvn.ark", scp=data_dir / "cmvn.scp") as writer:
        for speaker in sorted(stats):
            writer.write(speaker, stats[speaker].to_matrix())
    ordered = [stats[speaker] for speaker in sorted(stats)]
    whole = sum(ordered[1:], start=ordered[0])
    with ArkWriter(ark=data_dir / "global_cmvn.ark") as writer:
        writer.write("global", whole.to_matrix())
    return whole, len(stats)


def _finite_feats(fbank: Fbank, samples: np.ndarray, audio: str) -> np.ndarray:
    try:
        feats = fbank(samples)
    except AudioError as err:
        raise AudioError(f"{audio}: {err}") from None
    if not np.isfinite(feats).all():
        raise AudioError(f"{audio}: its features hold NaN or infinite values")
    return feats


def _too_few(data_dir: Path, extracted: int, wanted: int, skipped: dict[str, str]) -> str:
    first = "".join(f"\n  {utterance}: {cause}" for utterance, cause in list(skipped.items())[:5])
    return (
        f"{data_dir}: features of only {extracted} of {wanted} utterances, less than {MIN_EXTRACTED:.0%}; all that were skipped "
        f"are in {data_dir}/fbank/skipped.txt, the first:{first}\nRepair the recordings, or remove these utterances"
    )


def _lines(table: dict[str, str]) -> str:
    """A table's text in C order."""
    return "".join(f"{key} {table[key]}\n" for key in sorted(table))


class _Progress:
    """Tells whoever watches how far a shard is: a small file, rewritten twice a second."""

    def __init__(self, path: Path, total: int) -> None:
        self._path, self._total, self._written = path, total, 0.0
        self.update(0, 0.0)

    def update(self, done: int, seconds: float) -> None:
        if done == self._total or time.monotonic() - self._written > _PROGRESS_SECONDS:
            self._path.write_text(f"{done} {self._total} {seconds:.1f}\n")  # only looked at: need not survive a crash
            self._written = time.monotonic()


def _with_progress(items: Collection[Item], what: str) -> Iterable[Item]:
    """A progress bar on a terminal, nothing elsewhere."""
    from tqdm import tqdm

    return tqdm(items, unit="utt", desc=what, leave=False, disable=None)
