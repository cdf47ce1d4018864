"""yesno's data preparation: Kaldi's split, and training utterances joined from training words only."""

from __future__ import annotations

import importlib.util
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import soundfile

from speechtx.config.errors import AudioError, DataError

REPO = Path(__file__).resolve().parents[2]
ARCHIVE = REPO.parent / "shared" / "data" / "waves_yesno.tar.gz"


@pytest.fixture(scope="module")
def prepare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("yesno_prepare", REPO / "egs" / "yesno" / "asr1" / "local" / "prepare.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["yesno_prepare"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not ARCHIVE.is_file():
        pytest.skip(f"the yesno archive is not at {ARCHIVE}")
    root = tmp_path_factory.mktemp("yesno")
    with tarfile.open(ARCHIVE) as tar:
        tar.extractall(root, filter="data")
    return root / "waves_yesno"


def synthetic(name: str, *, rate: int = 8000, gap: float = 0.3) -> np.ndarray:
    """Eight bursts, 250 Hz for no and 750 Hz for yes, with pauses."""
    rng = np.random.default_rng(0)
    parts = []
    for digit in name.split("_"):
        time = np.arange(int(0.35 * rate)) / rate
        parts += [np.zeros(int(gap * rate)), 0.3 * np.sin(2 * np.pi * (750 if digit == "1" else 250) * time)]
    samples = np.concatenate([*parts, np.zeros(int(gap * rate))])
    return samples + 1e-4 * rng.standard_normal(samples.size)


def test_kaldis_split_with_a_dev_set_out_of_training(prepare, corpus):
    sets = prepare.split(prepare.read_recordings(corpus))
    assert {name: len(items) for name, items in sets.items()} == {"train": 26, "dev": 5, "test": 29}
    keys = {name: {item.key for item in items} for name, items in sets.items()}
    assert not keys["train"] & keys["dev"] and not keys["test"] & (keys["train"] | keys["dev"])
    assert sum(len(item.words) for item in sets["test"]) == 232
    assert max(keys["train"] | keys["dev"]) < min(keys["test"])


def test_the_words_are_the_digits_of_the_name(prepare, corpus):
    recording = prepare.read_recordings(corpus)[0]
    assert recording.key == "man-0_0_0_0_1_1_1_1"
    assert recording.words == ["NO"] * 4 + ["YES"] * 4


def test_nearly_every_real_recording_is_cut_into_eight_words_of_plausible_length(prepare, corpus):
    cut = [prepare.cut_recording(soundfile.read(item.wav)[0]) for item in prepare.read_recordings(corpus)]
    found = [pieces for pieces in cut if pieces is not None]
    assert len(found) >= 56
    assert all(0.3 < word.size / 8000 < 1.2 for pieces in found for word in pieces[1:-1])
    for item, pieces in zip(prepare.read_recordings(corpus), cut, strict=True):
        assert pieces is None or sum(piece.size for piece in pieces) == soundfile.info(item.wav).frames


def test_cuts_fall_into_the_pauses_and_lose_no_word(prepare):
    name = "1_0_1_1_0_0_1_0"
    pieces = prepare.cut_recording(synthetic(name))
    assert pieces is not None and len(pieces) == 10
    before, *words, behind = pieces
    assert max(np.abs(before).max(initial=0.0), np.abs(behind).max(initial=0.0)) < 0.05  # nobody speaks there
    for digit, word in zip(name.split("_"), words, strict=True):
        spectrum = np.abs(np.fft.rfft(word))
        assert np.argmax(spectrum) * 8000 / word.size == pytest.approx(750 if digit == "1" else 250, abs=5)
        assert np.abs(word[:40]).max() < 0.01 and np.abs(word[-40:]).max() < 0.01
        assert np.sum(np.abs(word) > 0.1) > 0.2 * 8000


def test_a_recording_without_clear_pauses_is_left_out(prepare):
    assert prepare.cut_recording(synthetic("1_0_1_1_0_0_1_0", gap=0.0)) is None


def test_joined_utterances_follow_their_labels_and_the_seed(prepare, tmp_path):
    train = []
    for name in ("0_1_0_1_0_1_0_1", "1_1_0_0_1_1_0_0"):
        soundfile.write(tmp_path / f"{name}.wav", synthetic(name), 8000, subtype="PCM_16")
        labels = ["YES" if digit == "1" else "NO" for digit in name.split("_")]
        train.append(prepare.Utterance(key=f"man-{name}", words=labels, wav=tmp_path / f"{name}.wav"))
    first = prepare.make_concatenations(train, tmp_path / "concat", number=12, seed=7)
    audio = {item.key: item.wav.read_bytes() for item in first}
    again = prepare.make_concatenations(train, tmp_path / "concat", number=12, seed=7)
    other = prepare.make_concatenations(train, tmp_path / "other", number=12, seed=8)
    assert [item.words for item in first] == [item.words for item in again] != [item.words for item in other]
    assert audio == {item.key: item.wav.read_bytes() for item in again}
    assert len(list((tmp_path / "concat").iterdir())) == 12
    for item in [item for item in first if len(item.words) > 3]:  # enough speech for word_spans
        samples = soundfile.read(item.wav)[0]
        spans = prepare.word_spans(samples)
        heard = []
        for start, end in spans:
            peak = np.argmax(np.abs(np.fft.rfft(samples[start:end]))) * 8000 / (end - start)
            heard.append("YES" if peak > 500 else "NO")
        assert heard == item.words


def test_joined_utterances_begin_and_end_in_the_silence_of_recordings(prepare, tmp_path):
    train = []
    for name, silence in (("0_1_0_1_0_1_0_1", 6000), ("1_1_0_0_1_1_0_0", 9000)):
        samples = np.concatenate([np.zeros(silence), synthetic(name), np.zeros(2 * silence)])
        soundfile.write(tmp_path / f"{name}.wav", samples, 8000, subtype="PCM_16")
        labels = ["YES" if digit == "1" else "NO" for digit in name.split("_")]
        train.append(prepare.Utterance(key=f"man-{name}", words=labels, wav=tmp_path / f"{name}.wav"))
    edges = set()
    for item in prepare.make_concatenations(train, tmp_path / "concat", number=40, seed=3):
        loud = np.flatnonzero(np.abs(soundfile.read(item.wav)[0]) > 0.1)
        assert loud[0] > 7_000
        edges.add((loud[0] > 10_000, soundfile.info(item.wav).frames - loud[-1] > 17_500))
    assert len(edges) == 4  # the beginning of either with the end of either


def test_joined_utterances_use_training_recordings_only(prepare, corpus, tmp_path):
    data = tmp_path / "data"
    arguments = ["--corpus", str(corpus), "--data", str(data), "--concat", "15", "--concat-dir", str(tmp_path / "concat")]
    assert prepare.main(arguments) == 0
    train = (data / "train" / "text").read_text().splitlines()
    assert len(train) == 26 + 15 and sum("concat" in line for line in train) == 15
    for name in ("dev", "test"):
        assert "concat" not in (data / name / "wav.scp").read_text()


def test_too_few_usable_recordings_is_an_error_not_a_tiny_corpus(prepare, tmp_path):
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).standard_normal(40000) * 0.1, 8000)
    train = [prepare.Utterance(key="man-a", words=["NO"] * 8, wav=tmp_path / "a.wav")]
    with pytest.raises(DataError, match="only 0 of 1"):
        prepare.make_concatenations(train, tmp_path / "concat", number=3, seed=1)
    assert not (tmp_path / "concat").exists()


def test_a_wrong_name_rate_or_number_is_named(prepare, tmp_path):
    with pytest.raises(DataError, match="missing"):
        prepare.read_recordings(tmp_path / "no")
    soundfile.write(tmp_path / "0_1_0_1_0_1_0_1.wav", synthetic("0_1_0_1_0_1_0_1"), 8000)
    with pytest.raises(DataError, match="1 recordings, expected 60"):
        prepare.read_recordings(tmp_path)
    soundfile.write(tmp_path / "0_1_0_1_0_1_0_0.wav", np.zeros(32000), 16000)
    with pytest.raises(AudioError, match="at 16000 Hz; expected 8 kHz mono"):
        prepare.read_recordings(tmp_path)
    soundfile.write(tmp_path / "0_1.wav", np.zeros(32000), 8000)
    (tmp_path / "0_1_0_1_0_1_0_0.wav").unlink()
    with pytest.raises(DataError, match="not eight digits"):
        prepare.read_recordings(tmp_path)
