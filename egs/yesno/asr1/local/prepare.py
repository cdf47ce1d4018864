"""yesno: Kaldi's smallest real corpus, as Kaldi data directories.

The corpus: 60 recordings of one man who says eight words each, every one either yes or no; 8 kHz, 16 bit, six minutes in all,
made to test Kaldi (openslr.org/1). OpenSLR calls the language Hebrew, the README in some copies of the archive English; the words
are transcribed as YES and NO either way. The archive names no licence; its README says it exists so that scripts can be tested
for free.

Layout: waves_yesno/1_0_1_1_1_0_1_0.wav; the name is the transcript, 1 for yes and 0 for no.

The split is Kaldi's: names in C order, the first 31 for training, the other 29 for test (232 words). Kaldi has no development
set, so every sixth training recording becomes `dev` (5, which leaves 26); test is never used to choose anything.

A peculiarity one must know: sorting by name means that all training recordings begin with NO and all test recordings with YES. A
decoder that conditions on its own output learns "an utterance begins with NO" from such data, and 26 sequences teach it little
else. `--concat N` therefore adds N utterances made from the training recordings only: each recording is cut in the middle of its
pauses into its eight words (found by energy; a recording where the count is not eight is left out), and 1 to 10 words, drawn at
random, are joined, between the silence before the first word of one recording and that behind the last word of another. Labels
come from the names, so nothing is guessed; no test or dev audio is touched; every word is real speech, only the order is ours.
The same seed gives the same files.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import soundfile

from speechtx.config.errors import AudioError, DataError, SpeechtxError
from speechtx.data.kaldi_table import write_table

SAMPLE_RATE = 8000
NUM_RECORDINGS, NUM_TRAIN, DEV_EVERY = 60, 31, 6
WORDS_PER_RECORDING = 8
SPEAKER = "man"
_NAME = re.compile(r"[01](_[01]){7}")
_LABELS = {"0": "NO", "1": "YES"}


@dataclass(frozen=True, kw_only=True)
class Utterance:
    """One utterance: id, words in upper case, audio."""

    key: str
    words: list[str]
    wav: Path


def read_recordings(folder: Path) -> list[Utterance]:
    """The recordings in C order of their names.

    Raises:
        DataError: the folder is missing, or does not hold the 60 recordings.
        AudioError: a recording is not 8 kHz mono, or empty.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: missing; is this the unpacked waves_yesno archive?")
    utterances = []
    for wav in sorted(folder.glob("*.wav")):
        if not _NAME.fullmatch(wav.stem):
            raise DataError(f"{wav}: the name is not eight digits 0 or 1 joined by _, so it has no transcript")
        info = soundfile.info(wav)
        if info.samplerate != SAMPLE_RATE or info.channels != 1 or info.frames < SAMPLE_RATE:
            raise AudioError(
                f"{wav}: {info.frames} samples, {info.channels} channels at {info.samplerate} Hz; expected 8 kHz mono"
            )
        words = [_LABELS[digit] for digit in wav.stem.split("_")]
        utterances.append(Utterance(key=f"{SPEAKER}-{wav.stem}", words=words, wav=wav.resolve()))
    if len(utterances) != NUM_RECORDINGS:
        raise DataError(
            f"{folder}: {len(utterances)} recordings, expected {NUM_RECORDINGS}; the archive is incomplete or altered"
        )
    return utterances


def split(recordings: Sequence[Utterance]) -> dict[str, list[Utterance]]:
    """Kaldi's training and test sets, with dev taken out of training."""
    train, test = recordings[:NUM_TRAIN], recordings[NUM_TRAIN:]
    dev = train[DEV_EVERY - 1 :: DEV_EVERY]
    return {"train": [item for item in train if item not in dev], "dev": list(dev), "test": list(test)}


def word_spans(samples: np.ndarray) -> list[tuple[int, int]]:
    """Start and end sample of each stretch of speech, by energy.

    The power of 10 ms frames is smoothed over 150 ms; speech is what lies above 65 % of the way, in dB, from the quiet frames to
    the loud ones. Stretches less than 80 ms apart are one word, those shorter than 150 ms are none.
    """
    frame = SAMPLE_RATE // 100
    count = samples.size // frame
    power = np.mean(np.square(samples[: count * frame].reshape(count, frame)), axis=1)
    window = np.hanning(15)
    level = 10 * np.log10(
        np.convolve(power, window / window.sum(), mode="same") + 1e-7
    )  # a floor, as some pauses are digital zeros
    low, high = np.percentile(level, [5, 95])
    active = np.concatenate([[0], (level > low + 0.65 * (high - low)).astype(int), [0]])
    starts, ends = np.flatnonzero(np.diff(active) == 1), np.flatnonzero(np.diff(active) == -1)
    merged: list[tuple[int, int]] = []
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        if merged and start - merged[-1][1] < 8:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return [(start * frame, end * frame) for start, end in merged if end - start >= 15]


def cut_recording(samples: np.ndarray) -> list[np.ndarray] | None:
    """A recording in ten pieces: the silence before, eight words with half a pause on either side, the silence behind.

    Returns:
        The pieces; None where not exactly eight words are found.
    """
    spans = word_spans(samples)
    if len(spans) != WORDS_PER_RECORDING:
        return None
    middles = [(left[1] + right[0]) // 2 for left, right in pairwise(spans)]
    edge = SAMPLE_RATE // 4  # the silence around a recording is longer than a pause
    cuts = [0, max(0, spans[0][0] - edge), *middles, min(samples.size, spans[-1][1] + edge), samples.size]
    return [_faded(samples[start:end]) for start, end in pairwise(cuts)]


def _faded(samples: np.ndarray) -> np.ndarray:
    size = min(SAMPLE_RATE // 200, len(samples))  # 5 ms, so that joins do not click
    ramp = np.linspace(0.0, 1.0, size)
    samples = samples.copy()
    samples[:size] *= ramp
    samples[len(samples) - size :] *= ramp[::-1]
    return samples


def make_concatenations(train: Sequence[Utterance], folder: Path, *, number: int, seed: int) -> list[Utterance]:
    """Writes `number` utterances of 1 to 10 words cut out of `train`; `folder` appears complete or not at all.

    Raises:
        DataError: fewer than half of the recordings could be cut into their eight words.
    """
    words: dict[str, list[np.ndarray]] = {label: [] for label in _LABELS.values()}
    before: list[np.ndarray] = []
    behind: list[np.ndarray] = []
    for utterance in train:
        pieces = cut_recording(soundfile.read(utterance.wav)[0])
        if pieces is None:
            print(
                f"{utterance.key}: its eight words were not told apart; trained on as a whole only, not joined with others",
                file=sys.stderr,
            )
            continue
        first, *spoken, last = pieces
        before.append(first)
        behind.append(last)
        for label, piece in zip(utterance.words, spoken, strict=True):
            words[label].append(piece)
    if len(before) * 2 < len(train):
        raise DataError(f"only {len(before)} of {len(train)} training recordings could be cut into eight words; use --concat 0")
    rng = np.random.default_rng(seed)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    made = []
    try:
        for index in range(1, number + 1):
            labels = [str(label) for label in rng.choice(list(words), size=rng.integers(1, 11))]
            pieces = [before, *(words[label] for label in labels), behind]
            audio = np.concatenate([some[rng.integers(len(some))] for some in pieces])
            key = f"{SPEAKER}-concat-{index:04d}"
            soundfile.write(scratch / f"{key}.wav", audio, SAMPLE_RATE, subtype="PCM_16")
            made.append(Utterance(key=key, words=labels, wav=folder.resolve() / f"{key}.wav"))
        scratch.chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)
        scratch.replace(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return made


def write_data_dir(path: Path, utterances: Sequence[Utterance]) -> None:
    """Writes wav.scp, text, utt2spk and spk2utt."""
    path.mkdir(parents=True, exist_ok=True)
    write_table(path / "wav.scp", {item.key: str(item.wav) for item in utterances})
    write_table(path / "text", {item.key: " ".join(item.words) for item in utterances})
    write_table(path / "utt2spk", {item.key: SPEAKER for item in utterances})
    write_table(path / "spk2utt", {SPEAKER: " ".join(sorted(item.key for item in utterances))})


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="the unpacked directory of wav files")
    parser.add_argument("--data", type=Path, default=Path("data"), help="where the data directories go (%(default)s)")
    parser.add_argument("--concat", type=int, default=0, help="utterances to make from training words (%(default)s)")
    parser.add_argument("--concat-dir", type=Path, default=Path("corpus/concat"), help="where their audio goes (%(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    if args.concat < 0:
        parser.error("--concat must not be negative")
    try:
        sets = split(read_recordings(args.corpus))
        if args.concat:
            sets["train"] += make_concatenations(sets["train"], args.concat_dir, number=args.concat, seed=args.seed)
        for name, utterances in sets.items():
            write_data_dir(args.data / name, utterances)
            made = f", {args.concat} of them joined from training words" if name == "train" and args.concat else ""
            print(f"{args.data / name}: {len(utterances)} utterances, {sum(len(item.words) for item in utterances)} words{made}")
    except SpeechtxError as error:
        print(f"local/prepare.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
