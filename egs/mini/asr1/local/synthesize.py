"""The mini corpus: synthetic census-form speech, made on the spot.

THIS IS SYNTHETIC SPEECH. eSpeak NG (a formant synthesiser) says sentences made from templates; we add noise. The corpus exists so
that the whole pipeline can run and be checked in minutes without a download; error rates on it say nothing about real speech.

Sets are disjoint in voices (an eSpeak variant with an accent) and in sentences. Each utterance draws, from a generator seeded
with the corpus seed and its id: speaking rate, pitch, intonation, pauses between words, silence around the speech, a kind of
noise, a signal to noise ratio of 18 to 40 dB, and a peak level of -20 to -3 dB. Files are 16 kHz, 16 bit, mono wav. A seed and
the sizes fix every byte (with one version of eSpeak NG, NumPy and soxr; another processor may round differently). eSpeak NG
itself is GPL-3.0; what it says is yours.

Layout: <corpus>/wav/<speaker>/<speaker>-<number>.wav and <corpus>/corpus.json, which says how it was made.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import noise
import numpy as np
import soundfile
import soxr
from espeak import Espeak, variants
from sentences import sentences, spoken_form
from tqdm import tqdm
from voices import Voice, voices

from speechtx.config.errors import DataError, SpeechtxError
from speechtx.data.kaldi_table import write_table

SAMPLE_RATE = 16000


@dataclass(frozen=True, kw_only=True)
class Utterance:
    """One line of the plan: who says what under which id."""

    key: str
    words: str


@dataclass(frozen=True, kw_only=True)
class Task:
    """All that one voice says, in order; done by one fresh process."""

    voice: Voice
    utterances: Sequence[Utterance]
    wav_dir: Path
    seed: int


# Spelled letters are by far the hardest words (B, D, E, P, T, V, Z ...), so the training set practises them more.
SPELLED = {"train": 0.30, "dev": 0.10, "test": 0.10}


def plan(sizes: dict[str, int], seed: int) -> dict[str, dict[Voice, list[Utterance]]]:
    """Deals different sentences to the sets, and within a set to its voices in turn.

    Test and dev are dealt first, so that they stay the same when only the size of the training set changes.
    """
    seen: set[str] = set()
    sets: dict[str, dict[Voice, list[Utterance]]] = {}
    for name in ("test", "dev", "train"):
        source = sentences(f"{seed}-{name}", spelled=SPELLED[name], seen=seen)
        speakers = voices(name)
        dealt: dict[Voice, list[Utterance]] = {voice: [] for voice in speakers[: sizes[name]]}
        for index in range(sizes[name]):
            voice = speakers[index % len(speakers)]
            number = len(dealt[voice]) + 1
            dealt[voice].append(Utterance(key=f"{voice.speaker}-{number:04d}", words=next(source)))
        sets[name] = dealt
    return sets


def trim(samples: np.ndarray, *, sample_rate: int, floor_db: float = 45.0) -> np.ndarray:
    """Cuts what lies before the first and after the last 10 ms within `floor_db` of the loudest; eSpeak leaves long tails."""
    frame = sample_rate // 100
    count = samples.size // frame
    power = np.mean(np.square(samples[: count * frame].reshape(count, frame)), axis=1)
    loud = np.flatnonzero(power > power.max() * 10 ** (-floor_db / 10))
    return samples[loud[0] * frame : (loud[-1] + 1) * frame]


def render(speaker: Espeak, utterance: Utterance, rng: np.random.Generator) -> np.ndarray:
    """Speaks one sentence and puts it into a noisy place; int16 samples at 16 kHz."""
    speaker.set_style(
        rate=int(rng.integers(130, 191)),
        pitch=int(rng.integers(35, 66)),
        pitch_range=int(rng.integers(30, 71)),
        word_gap=int(rng.integers(0, 8)),
    )
    dry = speaker.say(spoken_form(utterance.words)).astype(np.float64)
    dry = soxr.resample(dry, speaker.sample_rate, SAMPLE_RATE)
    dry = trim(dry, sample_rate=SAMPLE_RATE)
    before, after = (int(SAMPLE_RATE * seconds) for seconds in rng.uniform(0.1, 0.3, size=2))
    speech = np.pad(dry, (before, after))
    background = noise.make_noise(str(rng.choice(list(noise.KINDS))), rng, speech.size, SAMPLE_RATE)
    noisy = noise.add_noise(speech, background, snr_db=rng.uniform(18.0, 40.0))
    level = 10 ** (rng.uniform(-20.0, -3.0) / 20)
    return np.round(noisy / np.abs(noisy).max() * level * 32767).astype(np.int16)


def speak(task: Task) -> int:
    """Writes the recordings of one voice; returns how many.

    Runs in a process of its own: eSpeak's state at the start of a voice must always be the same (see espeak.py).
    """
    speaker = Espeak()
    speaker.set_voice(task.voice.espeak)
    folder = task.wav_dir / task.voice.speaker
    folder.mkdir(parents=True)
    for utterance in task.utterances:
        rng = np.random.default_rng([task.seed, zlib.crc32(utterance.key.encode())])
        soundfile.write(folder / f"{utterance.key}.wav", render(speaker, utterance, rng), SAMPLE_RATE, subtype="PCM_16")
    return len(task.utterances)


def make_corpus(
    corpus: Path, sets: dict[str, dict[Voice, list[Utterance]]], *, seed: int, nj: int, identity: dict[str, object]
) -> bool:
    """Synthesises everything into `corpus`, which appears complete or not at all; False if it was there already.

    Raises:
        DataError: eSpeak NG is missing or fails, or `corpus` holds something else.
    """
    stamp = corpus / "corpus.json"
    if stamp.is_file() and json.loads(stamp.read_text()) == identity:
        return False
    if corpus.exists() and not stamp.is_file():
        raise DataError(f"{corpus}: exists, but was not made by this command; move it away first")
    used = {voice.variant for dealt in sets.values() for voice in dealt}
    if unknown := used - set(variants()):
        raise DataError(
            f"this eSpeak NG lacks the voice variants {', '.join(sorted(unknown))}; install espeakng-loader 0.2.4 or newer"
        )
    corpus.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{corpus.name}.", dir=corpus.parent))
    try:
        tasks = [
            Task(voice=voice, utterances=utterances, wav_dir=scratch / "wav", seed=seed)
            for dealt in sets.values()
            for voice, utterances in dealt.items()
        ]
        total = sum(len(task.utterances) for task in tasks)
        # maxtasksperchild=1 gives every voice a process that has not spoken yet; the parent never loads eSpeak.
        with (
            multiprocessing.get_context("fork").Pool(nj, maxtasksperchild=1) as pool,
            tqdm(total=total, unit="utt", desc="synthesize", delay=2, disable=None) as bar,
        ):
            for count in pool.imap_unordered(speak, tasks, chunksize=1):
                bar.update(count)
        (scratch / "corpus.json").write_text(json.dumps(identity, indent=1) + "\n")
        (scratch / "README").write_text(__doc__ or "")
        scratch.chmod(0o755)
        if corpus.exists():
            shutil.rmtree(corpus)
        os.replace(scratch, corpus)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return True


def program_digest() -> str:
    """SHA-256 of this recipe's programs: when one of them changes, an older corpus is not taken for the new one."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def write_data_dir(path: Path, dealt: dict[Voice, list[Utterance]], wav_dir: Path) -> None:
    """Writes wav.scp, text, utt2spk and spk2utt of one set."""
    path.mkdir(parents=True, exist_ok=True)
    pairs = [(voice.speaker, utterance) for voice, utterances in dealt.items() for utterance in utterances]
    write_table(path / "wav.scp", {u.key: f"{wav_dir.resolve() / speaker / u.key}.wav" for speaker, u in pairs})
    write_table(path / "text", {u.key: u.words for _, u in pairs})
    write_table(path / "utt2spk", {u.key: speaker for speaker, u in pairs})
    write_table(path / "spk2utt", {voice.speaker: " ".join(u.key for u in utterances) for voice, utterances in dealt.items()})


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=Path("corpus/synthetic"), help="where the audio goes (%(default)s)")
    parser.add_argument("--data", type=Path, default=Path("data"), help="where the data directories go (%(default)s)")
    parser.add_argument("--num-train", type=int, default=3000)
    parser.add_argument("--num-dev", type=int, default=100)
    parser.add_argument("--num-test", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--nj", type=int, default=os.cpu_count() or 1, help="processes (%(default)s)")
    args = parser.parse_args(argv)
    sizes = {"train": args.num_train, "dev": args.num_dev, "test": args.num_test}
    if min(*sizes.values(), args.nj) < 1:
        parser.error("sizes and --nj must be at least 1")
    started = time.monotonic()
    try:
        sets = plan(sizes, args.seed)
        identity: dict[str, object] = {"seed": args.seed, **sizes, "program": program_digest()}
        made = make_corpus(args.corpus, sets, seed=args.seed, nj=args.nj, identity=identity)
        for name, dealt in sets.items():
            write_data_dir(args.data / name, dealt, args.corpus / "wav")
    except SpeechtxError as error:
        print(f"local/synthesize.py: error: {error}", file=sys.stderr)
        return 1
    for name in ("train", "dev", "test"):
        print(f"{args.data / name}: {sizes[name]} utterances, {len(sets[name])} voices, synthetic speech (eSpeak NG)")
    print(
        f"{args.corpus}: {f'made in {time.monotonic() - started:.0f} s' if made else 'already there, made with the same options'}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
