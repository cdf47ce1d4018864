"""Joined utterances: what was cut out is what is read, others in every epoch, and the same after a kill."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from toy_corpus import make_training_data, tiny_config, write_words

from speechtx.config.errors import ConfigError, DataError
from speechtx.data.joined import JoinedCorpus, Piece, read_pieces
from speechtx.data.manifest import Utterance, load_manifest, read_fbank_config
from speechtx.experiment.experiment import Experiment
from speechtx.training.distributed import World
from speechtx.training.monitor import Monitor
from speechtx.training.prepare import TrainingData, build_corpora, lay_out_experiment
from speechtx.training.trainer import Trainer
from speechtx.training.worst_batch import worst_batches

JOIN = "training.join.words={}"


def corpus_of(root: Path, data: TrainingData, *overrides: str) -> JoinedCorpus:
    config = tiny_config(JOIN.format(root / "words"), *overrides)
    lay_out_experiment(root / "exp", config, read_fbank_config(data.train), data)
    corpus, dev, notes = build_corpora(root / "exp", data, config)
    assert isinstance(corpus, JoinedCorpus) and not isinstance(dev, JoinedCorpus)
    assert "utterances more in each epoch, joined from " in notes[1]
    return corpus


@pytest.fixture
def data(tmp_path: Path) -> TrainingData:
    return make_training_data(tmp_path)


def test_a_joined_utterance_is_its_pieces_one_after_the_other(tmp_path: Path, data: TrainingData) -> None:
    write_words(data.train, tmp_path / "words")
    corpus = corpus_of(tmp_path, data, "training.join.ratio=2.5", "training.join.max_words=4", "training.specaugment=null")
    recorded = load_manifest(data.train)
    assert corpus.num_recorded == 24 and len(corpus) == 24 + 60
    for index in range(24, 84):
        utterance, pieces = corpus.utterances[index], corpus.joined[index - 24]
        assert {recorded[piece.source].speaker for piece in pieces} == {utterance.speaker}
        parts = [corpus.reader.read(recorded[piece.source])[piece.start : piece.end] for piece in pieces]
        assert np.array_equal(corpus.read(index), np.concatenate(parts))
        assert utterance.text == " ".join(word_of(piece, recorded) for piece in pieces)
        assert 1 <= len(pieces) <= 4 and utterance.num_frames == len(corpus.read(index)) <= 400
        batch = corpus.batch([index])
        assert batch.feats.shape[1] == utterance.num_frames and batch.tokens.tolist() == [corpus.encode(utterance.text)]
    assert [u.id for u in corpus.utterances[:24]] == [u.id for u in recorded]


def word_of(piece: Piece, recorded: list[Utterance]) -> str:
    """By its place among the equal shares."""
    words = recorded[piece.source].text.split()
    return words[round(piece.start * len(words) / recorded[piece.source].num_frames)]


def test_every_epoch_has_others_and_the_same_epoch_the_same(tmp_path: Path, data: TrainingData) -> None:
    write_words(data.train, tmp_path / "words")
    corpus = corpus_of(tmp_path, data)
    first, other, again = ([u.text for u in corpus.at_epoch(epoch).utterances] for epoch in (1, 2, 1))
    assert first == again
    assert first[:24] == other[:24] and first[24:] != other[24:]
    assert len(set(first[24:])) > 12


def test_the_scan_before_the_first_step_looks_at_the_utterances_of_that_epoch(tmp_path: Path, data: TrainingData) -> None:
    write_words(data.train, tmp_path / "words")
    corpus = corpus_of(tmp_path, data, "training.perturb.tempo=0.3")
    config = tiny_config()
    trainer = Trainer(
        config=config,
        model=Experiment.open(tmp_path / "exp").new_model(),
        train=corpus,
        dev=corpus,
        exp=tmp_path / "exp",
        world=World(rank=0, size=1, device=torch.device("cpu")),
        monitor=Monitor(exp=tmp_path / "exp", epochs=1, enabled=False),
    )
    for batch in worst_batches(trainer):
        for index, frames in batch.items():
            fewest, most = corpus.at_epoch(1).spans[index]
            assert fewest <= frames <= most


def test_runs_of_several_words_keep_to_the_limit(tmp_path: Path, data: TrainingData) -> None:
    words = write_words(data.train, tmp_path / "words")
    for utterance in load_manifest(data.train):  # beside each word, all of the utterance
        for name, row in (("segments", f"{utterance.id} 0 -1"), ("text", utterance.text), ("utt2spk", utterance.speaker)):
            with (words / name).open("a") as table:
                table.write(f"{utterance.id}-whole {row}\n")
    corpus = corpus_of(tmp_path, data, "training.join.max_words=6", "training.join.ratio=5")
    numbers = [len(u.text.split()) for u in corpus.utterances[24:]]
    assert max(numbers) == 6 and len(set(numbers)) > 2


def test_only_speakers_with_pieces_are_joined_and_others_stay(tmp_path: Path, data: TrainingData) -> None:
    words = write_words(data.train, tmp_path / "words")
    for name in ("segments", "text", "utt2spk"):
        lines = (words / name).read_text().splitlines(keepends=True)
        (words / name).write_text("".join(line for line in lines if line.startswith("s1-")))
    corpus = corpus_of(tmp_path, data)
    assert {u.speaker for u in corpus.utterances[24:]} == {"s1"}
    assert {u.speaker for u in corpus.utterances[:24]} == {"s0", "s1"}


@pytest.mark.parametrize(
    ("table", "old", "new", "message"),
    [
        ("segments", " 0.000 ", " 0.000 9", r"segments: s0-000-000-001: frames 0 to 9\d+ of \d+; run `speechtx align` again"),
        ("text", "s0-000-000-001", "s0-000-000-xxx", r"segments: s0-000-000-001: no words in text"),
        (
            "text",
            "-001 ",
            "-001 Z",
            r"segments: s0-000-000-001: 'Z[A-E]' is not in its transcript '[A-E ]*'; run `speechtx align`",
        ),
        ("segments", " s", " x", r"segments: nothing was cut out of the training set's utterances"),
    ],
)
def test_words_of_something_else_are_refused(
    tmp_path: Path, data: TrainingData, table: str, old: str, new: str, message: str
) -> None:
    words = write_words(data.train, tmp_path / "words")
    (words / table).write_text((words / table).read_text().replace(old, new))
    with pytest.raises(DataError, match=message):
        read_pieces(words, load_manifest(data.train), 10.0)


def test_words_that_are_not_there_are_asked_for(tmp_path: Path, data: TrainingData) -> None:
    with pytest.raises(DataError, match=r"words: no words to join .* make them with `speechtx align --out "):
        read_pieces(tmp_path / "words", load_manifest(data.train), 10.0)


def test_joining_needs_stored_features() -> None:
    with pytest.raises(ConfigError, match="join cuts and joins stored features; set waveforms: false"):
        tiny_config(JOIN.format("words"), "training.waveforms=true")


def test_nothing_to_join_is_an_error(tmp_path: Path, data: TrainingData) -> None:
    write_words(data.train, tmp_path / "words")
    with pytest.raises(DataError, match=r"training\.join: no speaker has two runs of words"):
        corpus_of(tmp_path, data, "model.encoder.subsampling.factor=8", "training.min_frames=31", "training.max_frames=200")
