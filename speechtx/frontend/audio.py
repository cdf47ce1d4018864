"""Reading one recording, or a piece of it, as samples; every way in which a file can be unusable has its own message."""

from __future__ import annotations

import functools
import io
import math
import struct
import subprocess
from pathlib import Path
from typing import BinaryIO

import numpy as np

from speechtx.config.errors import AudioError
from speechtx.frontend.perturb import change_speed

# A segment may end this many seconds after its recording does (rounding in transcripts): it is cut there, as Kaldi's
# extract-segments does.
MAX_OVERSHOOT = 0.5
# Programs that write WAV to a pipe cannot know its length and put a huge number; from here on it means "to the end".
_STREAMED_SIZE = 0x7FFFF000


def load_audio(
    source: str,
    *,
    sample_rate: int,
    resample: bool = False,
    start: float = 0.0,
    end: float | None = None,
    speed: float = 1.0,
    allow_pipes: bool = False,
) -> np.ndarray:
    """Reads mono samples of a wav, flac, NIST sphere (PCM) or any other file that libsndfile knows.

    Args:
        source: a file, or a shell command followed by `|` whose output is such a file, as in Kaldi's wav.scp.
        sample_rate: Hz, of the samples returned.
        resample: convert recordings of other rates; otherwise they are errors.
        start: seconds into the recording.
        end: seconds, None for the end of the recording; at most `MAX_OVERSHOOT` beyond it.
        speed: factor of speed perturbation, applied last.
        allow_pipes: whether a command may run.

    Returns:
        (N,) float32 in [-1, 1], N > 0.

    Raises:
        AudioError: the recording is missing, empty, corrupt, truncated, of several channels, at another rate, or holds
            NaN; the piece lies outside it; or a command may not run, or failed. The message begins with the source.
    """
    source = source.strip()
    if source.endswith("|"):
        if not allow_pipes:
            raise AudioError(f"{source}: a command instead of a file; allow it with --allow-pipes if you trust who wrote it")
        samples, rate = _decode(io.BytesIO(_run_command(source[:-1].strip())), source, start, end)
    else:
        path = Path(source)
        try:
            with path.open("rb") as stream:
                _require_complete(stream, source)
                samples, rate = _decode(stream, source, start, end)
        except OSError as err:
            raise AudioError(f"{source}: cannot be read: {err.strerror or err}") from None
    if rate != sample_rate:
        if not resample:
            raise AudioError(
                f"{source}: its sample rate is {rate} Hz, not {sample_rate}; set `resample: true` or change `sample_rate`"
            )
        import soxr

        samples = np.asarray(soxr.resample(samples, rate, sample_rate), dtype=np.float32)
    return change_speed(samples, speed)


def _decode(stream: BinaryIO, source: str, start: float, end: float | None) -> tuple[np.ndarray, int]:
    """Samples of [start, end) seconds, and their rate."""
    import soundfile

    try:
        with soundfile.SoundFile(stream) as sound:
            rate, channels, total = sound.samplerate, sound.channels, sound.frames
            if channels != 1:
                raise AudioError(f"{source}: has {channels} channels; split them, for example with `sox IN OUT remix 1`")
            if total == 0:
                raise AudioError(f"{source}: holds no samples")
            first, last = _piece(source, rate, total, start, end)
            if first:
                sound.seek(first)
            samples = sound.read(last - first, dtype="float32")
    except soundfile.SoundFileError as err:
        raise AudioError(f"{source}: not an audio file that can be decoded: {_cause(err)}") from None
    if len(samples) < last - first:
        raise AudioError(f"{source}: truncated or corrupt: {last - first} samples expected, {len(samples)} could be decoded")
    if not np.isfinite(samples).all():
        raise AudioError(f"{source}: holds NaN or infinite samples, the first at {first + int(np.argmin(np.isfinite(samples)))}")
    return samples, rate


def _piece(source: str, rate: int, total: int, start: float, end: float | None) -> tuple[int, int]:
    """First sample and the one after the last, of [start, end) seconds in a recording of `total` samples."""
    if not 0.0 <= start < math.inf or (end is not None and not start < end < math.inf):
        raise AudioError(f"{source}: a piece from {start} to {end} s is empty or runs backwards")
    first = round(start * rate)
    last = total if end is None else round(end * rate)
    if first >= total or last > total + MAX_OVERSHOOT * rate:
        raise AudioError(f"{source}: the piece from {start} to {end} s lies outside a recording of {total / rate:.3f} s")
    last = min(last, total)
    if last <= first:
        raise AudioError(f"{source}: the piece from {start} to {end} s is shorter than one sample")
    return first, last


@functools.lru_cache(maxsize=1)
def _run_command(command: str) -> bytes:
    """Output of a command of wav.scp; the last one is kept, because the segments of one recording follow each other."""
    done = subprocess.run(command, shell=True, stdin=subprocess.DEVNULL, capture_output=True)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()[-500:] or "(no message)"
        raise AudioError(f"{command} |: exit status {done.returncode}: {said}")
    return done.stdout


def _require_complete(stream: BinaryIO, source: str) -> None:
    """Compares the length that a wav or sphere header declares with the file's; libsndfile silently reads what there is."""
    size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    if size == 0:
        raise AudioError(f"{source}: the file is empty")
    head = stream.read(12)
    if head[:4] == b"RIFF" and head[8:] == b"WAVE":
        declared = _wav_length(stream)
    elif head[:7] == b"NIST_1A":
        declared = _sphere_length(stream)
    else:  # flac and the other compressed formats notice while they are decoded
        declared = 0
    if declared > size:
        raise AudioError(f"{source}: truncated: its header announces {declared} bytes, the file has {size}")
    stream.seek(0)


def _wav_length(stream: BinaryIO) -> int:
    """Where the data chunk ends according to its header, in bytes from the start; 0 if it does not say."""
    while len(chunk := stream.read(8)) == 8:
        name, length = struct.unpack("<4sI", chunk)
        if name == b"data":
            return stream.tell() + length if length < _STREAMED_SIZE else 0
        stream.seek(length + length % 2, io.SEEK_CUR)  # chunks are padded to even lengths
    return 0


def _sphere_length(stream: BinaryIO) -> int:
    """Where uncompressed samples end according to the header (lines `name -type value`), in bytes; 0 if it does not say."""
    stream.seek(8)
    try:
        header_length = int(stream.readline())
        stream.seek(0)
        fields = dict(
            line.split(None, 2)[::2] for line in stream.read(header_length).decode("latin-1").splitlines()[2:] if " -" in line
        )
        if "," in fields.get("sample_coding", "pcm"):  # "pcm,embedded-shorten-v2.00": compressed
            return 0
        width = int(fields["sample_n_bytes"]) * int(fields.get("channel_count", "1"))
        return header_length + int(fields["sample_count"]) * width
    except (ValueError, KeyError):
        return 0


def _cause(err: Exception) -> str:
    """What libsndfile says, without the prefix that shows Python's stream object."""
    return str(err).rpartition(">: ")[2].strip().rstrip(".") or type(err).__name__
