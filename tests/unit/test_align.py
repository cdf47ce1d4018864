"""Alignment: the best path against all paths, cuts in the quietest place, and words that are found where they were put."""

from __future__ import annotations

import itertools
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_corpus import make_training_data, tiny_config

from speechtx.bin import main as front
from speechtx.config.errors import DataError, ExperimentError
from speechtx.data.kaldi_table import read_segments, read_table
from speechtx.data.manifest import load_manifest
from speechtx.experiment.experiment import Experiment
from speechtx.search.align import align_data, best_alignment, word_cuts
from speechtx.training.averaging import average_checkpoints
from speechtx.training.train import train


def collapsed(path: tuple[int, ...]) -> list[int]:
    return [label for label, _ in itertools.groupby(path) if label]


def spans_of(path: tuple[int, ...]) -> list[tuple[int, int]]:
    spans, frame = [], 0
    for label, group in itertools.groupby(path):
        size = len(list(group))
        if label:
            spans.append((frame, frame + size - 1))
        frame += size
    return spans


@settings(max_examples=60, deadline=None)
@given(frames=st.integers(1, 6), labels=st.lists(st.integers(1, 2), max_size=4), seed=st.integers(0, 2**32 - 1))
def test_the_alignment_is_the_best_of_all_paths(frames: int, labels: list[int], seed: int) -> None:
    log_probs = np.log(np.random.default_rng(seed).dirichlet(np.ones(3), size=frames))
    paths = [path for path in itertools.product(range(3), repeat=frames) if collapsed(path) == labels]
    found = best_alignment(log_probs, labels)
    if not paths:
        assert found is None
    else:
        best = max(paths, key=lambda path: log_probs[np.arange(frames), list(path)].sum())
        assert found == spans_of(best)


def test_a_word_ends_where_it_is_quietest_before_the_next_one_begins() -> None:
    energy = np.full(40, 5.0)
    energy[17:20] = 1.0  # of the frames 12 to 23 between the words, three of silence around frame 18
    energy[2] = -50.0  # quieter, but inside of a word
    assert word_cuts([(0, 2), (5, 8)], energy, 4) == [0, 18, 40]
    assert word_cuts([(1, 9)], energy, 4) == [0, 40]
    assert word_cuts([(0, 3), (4, 8)], energy, 4) == [0, 18, 40]  # neighbours: in the frame of the next one


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows the toy corpus, under `exp`."""
    root = tmp_path_factory.mktemp("align")
    data = make_training_data(root, num_train=60)
    learn = ["training.epochs=60", "model.encoder.dropout=0.0", "training.specaugment=null", "training.schedule.name=constant"]
    config = tiny_config(*learn, "model.encoder.dim=32", "model.ctc_weight=0.9")
    train(config, data, root / "exp")
    average_checkpoints(root / "exp", config.training.average)
    return root


def test_words_are_found_where_they_are_and_recognised_alone(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["align", "--exp", str(corpus / "exp"), "--data", str(corpus / "train"), "--out", str(corpus / "words")]
    assert front.main(command) == 0
    assert "60 utterances aligned; runs recognised alone, by words: " in capsys.readouterr().out
    manifest = {utterance.id: utterance for utterance in load_manifest(corpus / "train")}
    words: dict[str, list[tuple[float, float, str]]] = {}
    for line in (corpus / "words" / "ctm").read_text().splitlines():
        utterance, channel, start, length, word = line.split()
        assert channel == "1"
        words.setdefault(utterance, []).append((float(start), float(length), word))
    assert words.keys() == manifest.keys()
    for key, found in words.items():
        assert [word for _, _, word in found] == manifest[key].text.split()
        assert sum(length for _, length, _ in found) == pytest.approx(manifest[key].num_frames / 100)  # the cuts share all of it
        for start, length, _ in found:
            assert start >= 0.0 and length > 0.05
    lengths = [length for found in words.values() for _, length, _ in found[1:-1]]  # 20 to 27 frames each when they were made
    assert np.mean([abs(length - 0.235) < 0.1 for length in lengths]) > 0.8

    segments, text = read_segments(corpus / "words" / "segments"), read_table(corpus / "words" / "text")
    assert list(segments) == list(text) == sorted(text, key=str.encode) and len(text) > 100
    for key, segment in segments.items():
        inside = [word for start, _, word in words[segment.recording] if segment.start - 1e-6 <= start < segment.end - 1e-6]
        assert text[key] == " ".join(inside)
    speakers = read_table(corpus / "words" / "utt2spk")
    assert all(speakers[key] == key.split("-")[0] for key in text)


def test_utterances_that_cannot_be_aligned_are_counted_and_left_out(corpus: Path, tmp_path: Path) -> None:
    copytree(corpus / "dev", tmp_path / "dev")
    keys = list(read_table(corpus / "dev" / "text"))
    text = (tmp_path / "dev" / "text").read_text().splitlines()
    text[0], text[1] = keys[0], f"{keys[1]} {'A ' * 200}".rstrip()
    (tmp_path / "dev" / "text").write_text("\n".join(text) + "\n")
    counts = align_data(Experiment.open(corpus / "exp"), tmp_path / "dev", tmp_path / "words")
    assert counts.aligned == len(keys) - 2
    assert f"; 2 without words or too short for them, the first {keys[0]}; runs" in str(counts)
    assert {line.split()[0] for line in (tmp_path / "words" / "ctm").read_text().splitlines()} == set(keys[2:])


def test_a_model_without_trained_ctc_aligns_nothing(corpus: Path, tmp_path: Path) -> None:
    copytree(corpus / "exp", tmp_path / "exp")
    config = tmp_path / "exp" / "config.yaml"
    config.write_text(config.read_text().replace("ctc_weight: 0.9", "ctc_weight: 0.0"))
    with pytest.raises(ExperimentError, match=r"trained with model\.ctc_weight 0"):
        align_data(Experiment.open(tmp_path / "exp"), corpus / "dev", tmp_path / "words")


def test_alignments_go_with_the_model_features(corpus: Path, tmp_path: Path) -> None:
    copytree(corpus / "dev", tmp_path / "dev")
    fbank = tmp_path / "dev" / "fbank.yaml"
    fbank.write_text(fbank.read_text().replace("frame_shift_ms: 10.0", "frame_shift_ms: 8.0"))
    with pytest.raises(DataError, match="were computed differently"):
        align_data(Experiment.open(corpus / "exp"), tmp_path / "dev", tmp_path / "words")
    assert not (tmp_path / "words").exists()
