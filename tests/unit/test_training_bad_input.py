"""Bad input to training: one sentence that says what, where and what to do, and nothing lost."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path

import pytest
import torch
from toy_corpus import make_training_data, tiny_config

from speechtx.config.errors import DataError, TrainingError
from speechtx.text.tokenizer import Tokenizer
from speechtx.training.checkpoint import load_checkpoint, save_checkpoint
from speechtx.training.prepare import TrainingData
from speechtx.training.train import train
from speechtx.training.trainer import Trainer


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    return make_training_data(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def data(original: TrainingData, tmp_path: Path) -> TrainingData:
    """Data of its own for each test, to be broken."""
    for name in ("train", "dev"):
        shutil.copytree(getattr(original, name), tmp_path / name)
        table = tmp_path / name / "feats.scp"
        table.write_text(table.read_text().replace(str(getattr(original, name)), str(tmp_path / name)))
    return TrainingData(train=tmp_path / "train", dev=tmp_path / "dev", tokenizer=original.tokenizer)


def test_features_of_another_width_than_their_configuration_says(data: TrainingData, tmp_path: Path) -> None:
    for directory in (data.train, data.dev):
        config = directory / "fbank.yaml"
        config.write_text(config.read_text().replace("num_mel_bins: 12", "num_mel_bins: 13"))
    with pytest.raises(DataError, match=r"utterance s\d-\d+ .*shape \(\d+, 12\), the model expects \(frames, 13\)"):
        train(tiny_config(), data, tmp_path / "exp")


def test_labels_outside_the_vocabulary_name_the_utterance(
    data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: [*encode(self, text), self.vocab_size])
    with pytest.raises(DataError, match=r"utterance s0-000: tokens \[.*\] are outside the model's vocabulary"):
        train(tiny_config(), data, tmp_path / "exp")


def test_an_empty_dev_set(data: TrainingData, tmp_path: Path) -> None:
    for name in ("text", "utt2spk", "utt2num_frames", "feats.scp"):
        (data.dev / name).write_text("")
    with pytest.raises(DataError, match=r"dev/feats\.scp: .*(holds no utterance|empty)"):
        train(tiny_config(), data, tmp_path / "exp")


def test_a_dev_set_of_which_nothing_is_left(data: TrainingData, tmp_path: Path) -> None:
    lines = (data.dev / "text").read_text().splitlines()
    (data.dev / "text").write_text("".join(f"{line.split()[0]} {40 * 'A '}\n" for line in lines))
    with pytest.raises(TrainingError, match=r"dev: none of \d+ utterances can be used; reasons are in .*left_out_dev\.txt"):
        train(tiny_config(), data, tmp_path / "exp")
    assert "encoder frames, but CTC needs" in (tmp_path / "exp" / "left_out_dev.txt").read_text()


def test_another_dev_set_than_that_of_the_epochs_before(data: TrainingData, tmp_path: Path) -> None:
    exp = tmp_path / "exp"
    train(tiny_config("training.epochs=1"), data, exp)
    table = data.dev / "text"
    table.write_text(table.read_text().replace("\n", " A\n", 1))
    with pytest.raises(TrainingError, match="the dev set is not the one this experiment began with"):
        train(tiny_config("training.epochs=2"), data, exp)
    path = exp / "checkpoints" / "last.pt"
    state = torch.load(path, weights_only=True)
    del state["dev_hash"]  # as an older version left it
    torch.save(state, path)
    train(tiny_config("training.epochs=2"), data, exp)


def test_a_checkpoint_of_another_shape(data: TrainingData, tmp_path: Path) -> None:
    exp = tmp_path / "exp"
    train(tiny_config("training.epochs=1"), data, exp)
    path = exp / "checkpoints" / "last.pt"
    state = torch.load(path, weights_only=True)
    state["model"]["ctc.weight"] = torch.zeros(3, 16)
    torch.save(state, path)
    with pytest.raises(TrainingError, match=r"belongs to a model of another shape.*ctc\.weight"):
        train(tiny_config("training.epochs=2"), data, exp)


def test_features_that_are_deleted_while_training(data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish_epoch = Trainer.finish_epoch

    def finish_and_delete(self, dev):
        finish_epoch(self, dev)
        (data.train / "feats.ark").unlink(missing_ok=True)

    monkeypatch.setattr(Trainer, "finish_epoch", finish_and_delete)
    with pytest.raises(DataError, match=r"feats\.ark:\d+: s\d-\d+: cannot be read: No such file or directory$"):
        train(tiny_config("training.epochs=3"), data, tmp_path / "exp")
    state = load_checkpoint(tmp_path / "exp" / "checkpoints")
    assert state is not None and state["epoch"] == 2, "what was trained before is kept"


def test_a_write_that_breaks_off_in_the_middle_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    """No full disk can be had here, but a limit of the size of files breaks a write off just so."""
    save_checkpoint(tmp_path, {"weights": torch.zeros(10)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(TrainingError, match=r"last\.pt\.new: could not be written .*previous checkpoint is untouched"):
            save_checkpoint(tmp_path, {"weights": torch.ones(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]
    state = load_checkpoint(tmp_path)
    assert state is not None and torch.equal(state["weights"], torch.zeros(10))
