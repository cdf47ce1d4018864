"""The files of a decoding in several jobs: one part a job that survives a kill, and what is made of all parts.

`parts/J.jsonl` begins with one line that says what is being decoded with what; then follows one line an utterance as soon as
it is decoded. A job that starts again keeps the lines of a part that says the same, and decodes what is missing.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from speechtx.config.atomic import replacing
from speechtx.config.errors import DataError
from speechtx.search.hypothesis import Hypothesis
from speechtx.search.system import SystemId, sha256

log = logging.getLogger(__name__)

_TABLES = ("feats.scp", "utt2num_frames", "utt2spk", "global_cmvn.ark")  # the statistics change whenever any feature does


@dataclass(frozen=True)
class RunKey:
    """What must be equal for two jobs' results to belong to one decoding."""

    system: SystemId
    config: dict[str, Any]  # DecodeConfig
    data_sha256: str  # of the data directory's tables, see `data_digest`
    num_jobs: int
    version: str

    @staticmethod
    def from_json(fields: dict[str, Any]) -> RunKey:
        """The inverse of `dataclasses.asdict`."""
        return RunKey(**{**fields, "system": SystemId.from_json(fields["system"])})


@dataclass(frozen=True)
class Decoded:
    """One utterance's result; `error` says why there is none."""

    utt: str
    nbest: list[Hypothesis]
    audio_seconds: float
    decode_seconds: float
    error: str | None = None

    @property
    def text(self) -> str:
        return self.nbest[0].text if self.nbest else ""

    def to_json(self) -> dict[str, Any]:
        found = {"utt": self.utt, "nbest": [h.to_json() for h in self.nbest], "error": self.error}
        return {**found, "audio_seconds": round(self.audio_seconds, 3), "decode_seconds": round(self.decode_seconds, 6)}

    @staticmethod
    def from_json(line: dict[str, Any]) -> Decoded:
        return Decoded(**{**line, "nbest": [Hypothesis.from_json(h) for h in line["nbest"]]})


def data_digest(data_dir: Path) -> str:
    """The digest of what a decoding reads of a data directory; a table that is not there counts as such."""
    tables = [f"{name} {sha256(data_dir / name) if (data_dir / name).is_file() else '-'}\n" for name in _TABLES]
    return hashlib.sha256("".join(tables).encode()).hexdigest()


@contextlib.contextmanager
def only_one_job(out_dir: Path, job: int) -> Iterator[None]:
    """Holds one job's share for this process until the block ends or the process dies; waits while another has it.

    A recipe killed by SIGKILL leaves its jobs at work, and is often started again at once: what they decode is then found done.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    with open(out_dir / f".{job}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("%s: another process is at job %d here; waiting for its end", out_dir, job)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class PartWriter:
    """Appends results to one part, continuing it where it was left; under `only_one_job`."""

    def __init__(self, path: Path, *, key: RunKey, device: str, threads: int) -> None:
        """Continues a part, or begins one anew if it is another decoding's.

        `done` holds the utterances that need no work. Those that failed do: what was in their way, a file that could not be read
        or memory that was not free, may be gone.
        """
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        found = read_part(path) if path.is_file() else None
        there = found.results if found and found.key == key else []
        kept = list({result.utt: result for result in there if result.error is None}.values())
        self.done = {result.utt for result in kept}
        if found is not None and found.key == key and len(kept) == len(found.results):
            os.truncate(path, found.num_bytes)  # a line that a kill broke off
        else:
            header = {"key": asdict(key), "device": device, "threads": threads}
            with replacing(path) as stream:
                stream.write(json.dumps(header, ensure_ascii=False) + "\n")
                stream.writelines(map(_line, kept))
        self._stream = path.open("a", encoding="utf-8", newline="\n")

    def write(self, results: Sequence[Decoded]) -> None:
        """Appends results so that they survive whatever happens to this process or machine next."""
        self._stream.writelines(map(_line, results))
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self.done.update(result.utt for result in results)

    def close(self) -> None:
        self._stream.close()


def _line(result: Decoded) -> str:
    return json.dumps(result.to_json(), ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class Part:
    """A part as it was read: `num_bytes` of it are whole lines."""

    key: RunKey
    device: str
    threads: int
    results: list[Decoded]
    num_bytes: int


def read_part(path: Path) -> Part | None:
    """Reads a part up to the last whole line; None if not even its first line is whole and ours.

    Raises:
        DataError: a whole line in the middle is not what `PartWriter` writes.
    """
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    lines = whole.split(b"\n")[:-1]
    try:
        header = json.loads(lines[0])
        part = Part(RunKey.from_json(header["key"]), header["device"], header["threads"], [], len(whole))
    except (IndexError, ValueError, KeyError, TypeError):
        return None
    for number, line in enumerate(lines[1:], start=2):
        try:
            part.results.append(Decoded.from_json(json.loads(line)))
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{path}:{number}: not a result of `speechtx decode`; delete the file and decode again") from None
    return part


def read_parts(out_dir: Path, num_jobs: int) -> list[Part]:
    """Reads the parts of all jobs.

    Raises:
        DataError: a part is missing, or parts come from different decodings.
    """
    parts: list[Part] = []
    for job in range(1, num_jobs + 1):
        path = out_dir / "parts" / f"{job}.jsonl"
        part = read_part(path) if path.is_file() else None
        if part is None:
            raise DataError(f"{path}: missing; job {job} of {num_jobs} has not run (its log is {out_dir}/log/decode.{job}.log)")
        if part.key.num_jobs != num_jobs:
            raise DataError(f"{path}: made by a decoding in {part.key.num_jobs} jobs, not {num_jobs}; decode again")
        if parts and part.key != parts[0].key:
            names = ", ".join(f.name for f in fields(RunKey) if getattr(part.key, f.name) != getattr(parts[0].key, f.name))
            raise DataError(f"{path}: differs from {out_dir}/parts/1.jsonl in {names}; run job {job} again")
        parts.append(part)
    return parts


def merge_parts(out_dir: Path, *, parts: Sequence[Part], expected: Sequence[str], data_dir: str) -> dict[str, Any]:
    """Joins parts to `text`, `nbest.jsonl` and `decode.json`, sorted by utterance id in C order.

    Args:
        out_dir: where the three files go.
        parts: of all jobs.
        expected: the data directory's utterances; each must be in the parts exactly once.
        data_dir: named in decode.json and in errors.

    Returns:
        What was written to decode.json.

    Raises:
        DataError: utterances are missing, unknown, or decoded twice.
    """
    results = sorted((result for part in parts for result in part.results), key=lambda r: r.utt.encode())
    _require_each_once([result.utt for result in results], expected, out_dir, data_dir)
    audio = sum(result.audio_seconds for result in results)
    seconds = sum(result.decode_seconds for result in results)
    summary = {
        "data": data_dir,
        **asdict(parts[0].key.system),  # members (their weights), lm, ngram: paths and SHA-256; experiments_sha256
        "config": parts[0].key.config,
        "num_utts": len(results),
        "failed": {result.utt: result.error for result in results if result.error},
        "audio_seconds": round(audio, 3),
        "decode_seconds": round(seconds, 3),  # summed over jobs: reading features, encoder, search; not loading the model
        "rtf": round(seconds / audio, 6) if audio else None,
        "wall_seconds": round(max(sum(result.decode_seconds for result in part.results) for part in parts), 3),  # the longest job
        "num_jobs": len(parts),
        "device": parts[0].device,
        "threads": parts[0].threads,  # of each job
    }
    with replacing(out_dir / "text") as stream:
        stream.writelines(f"{result.utt} {result.text}".rstrip(" ") + "\n" for result in results)
    with replacing(out_dir / "nbest.jsonl") as stream:
        for result in results:
            line = {"utt": result.utt, "nbest": [h.to_json() for h in result.nbest], "error": result.error}
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")
    with replacing(out_dir / "decode.json") as stream:
        stream.write(json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    return summary


def _require_each_once(decoded: Sequence[str], expected: Sequence[str], out_dir: Path, data_dir: str) -> None:
    seen, wanted = set(decoded), set(expected)
    twice = sorted({utt for i, utt in enumerate(decoded) if i and decoded[i - 1] == utt})
    for problem, utts in (
        (f"of {data_dir} were not decoded", wanted - seen),
        (f"are not in {data_dir}", seen - wanted),
        ("were decoded twice", twice),
    ):
        if utts:
            names = ", ".join(sorted(utts)[:5]) + (" ..." if len(utts) > 5 else "")
            raise DataError(f"{out_dir}/parts: {len(utts)} utterance(s) {problem}: {names}; run the decode jobs again")
