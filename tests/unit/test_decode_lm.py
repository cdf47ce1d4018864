"""Language models and ensembles in `speechtx decode` and `transcribe`, on a whole experiment directory with random models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_decode import decode, make_data, make_exp, recording, text_of

import speechtx
from speechtx.bin.main import main
from speechtx.config.decode import DecodeConfig
from speechtx.config.errors import ConfigError, ExperimentError
from speechtx.config.lm import NgramConfig
from speechtx.config.schema import TokenizerConfig
from speechtx.experiment.experiment import Experiment
from speechtx.text.tokenizer import train_tokenizer
from speechtx.training.ngram import make_ngram


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("root")


@pytest.fixture(scope="module")
def exp(root) -> Path:
    return make_exp(root / "exp")


@pytest.fixture(scope="module")
def data(root) -> Path:
    return make_data(root / "test", {f"utt{i}": recording(i, 0.4 + 0.1 * i) for i in range(4)})


def make_lm(path: Path, tokenizer: Path, sentence: str) -> Path:
    """An n-gram that knows one sentence."""
    for name in ("train", "dev"):
        (path / name).mkdir(parents=True)
        (path / name / "text").write_text("".join(f"u{i} {sentence}\n" for i in range(9)))
    make_ngram(config=NgramConfig(order=2), train=path / "train", dev=path / "dev", tokenizer=tokenizer, out=path / "ngram")
    return path / "ngram"


@pytest.fixture(scope="module")
def ngram(root, exp) -> Path:
    return make_lm(root / "lm", exp / "tokenizer", "c c a c c a")


def summary_of(out: Path) -> dict:
    return json.loads((out / "decode.json").read_text())


def test_a_language_model_that_has_no_weight_is_named_as_not_used(exp, data, ngram, caplog):
    speechtx.load_recognizer(exp, device="cpu", decode=DecodeConfig(beam=3, ngram_weight=0.1), ngram=ngram)
    assert "is not used" not in caplog.text
    speechtx.load_recognizer(exp, device="cpu", ngram=ngram)
    assert f"{ngram} is not used: ngram_weight is 0" in caplog.text


def test_a_data_directory_that_is_not_there_is_called_so(exp, tmp_path, capsys):
    assert decode(exp, tmp_path / "none", tmp_path / "out") == 1
    assert f"{tmp_path / 'none'}: no such data directory" in capsys.readouterr().err


def test_an_ngram_of_the_directory_changes_the_text_and_is_named_with_its_digest(exp, data, ngram, tmp_path):
    weight = ("--set", "ngram_weight=2.0")
    assert decode(exp, data, tmp_path / "with", *weight, "--ngram", str(ngram)) == 0
    assert decode(exp, data, tmp_path / "without", "--ngram", str(ngram)) == 0
    assert text_of(tmp_path / "with") != text_of(tmp_path / "without")
    found, without = summary_of(tmp_path / "with"), summary_of(tmp_path / "without")
    assert found["ngram"]["path"] == str(ngram) and len(found["ngram"]["sha256"]) == 64 and found["lm"] is None
    assert without["ngram"] is None, "a weight of 0 leaves the model out"
    first = json.loads((tmp_path / "with" / "nbest.jsonl").read_text().splitlines()[0])["nbest"][0]
    assert first["ngram"] < 0
    recognizer = speechtx.load_recognizer(
        exp, device="cpu", decode=DecodeConfig(beam=3, ngram_weight=2.0), ngram=ngram / "ngram.arpa"
    )
    assert recognizer.transcribe(data / "utt1.wav") == text_of(tmp_path / "with")["utt1"]


def test_another_language_model_at_the_same_place_starts_the_decoding_anew(exp, data, ngram, tmp_path, capsys):
    arpa = tmp_path / "lm.arpa"
    arpa.write_bytes((ngram / "ngram.arpa").read_bytes())
    options = ("--set", "ngram_weight=2.0", "--ngram", str(arpa))
    assert decode(exp, data, tmp_path / "out", *options) == 0
    arpa.rename(tmp_path / "moved.arpa")  # the same model elsewhere is the same model
    capsys.readouterr()
    assert decode(exp, data, tmp_path / "out", *options[:-1], str(tmp_path / "moved.arpa")) == 0
    assert "job 1:" not in capsys.readouterr().out
    other = make_lm(tmp_path / "other", exp / "tokenizer", "b b b b b b")
    arpa.write_bytes((other / "ngram.arpa").read_bytes())
    assert decode(exp, data, tmp_path / "out", *options) == 0
    assert "job 1: 4 utterances" in capsys.readouterr().out


def test_a_weight_without_its_model_and_a_model_of_another_tokenizer_are_refused(exp, data, ngram, tmp_path, capsys):
    assert decode(exp, data, tmp_path / "out", "--set", "lm_weight=0.5") == 1
    assert "lm_weight 0.5" in capsys.readouterr().err
    assert decode(exp, data, tmp_path / "out", "--set", "hot_words=AB") == 1
    assert "hot_words: must be a list, as in [AB]" in capsys.readouterr().err
    (tmp_path / "tok").mkdir()
    train_tokenizer(["xyz zyx w"], config=TokenizerConfig(type="char"), out_dir=tmp_path / "tok")
    foreign = make_lm(tmp_path / "foreign", tmp_path / "tok", "x y z w")
    assert decode(exp, data, tmp_path / "out", "--set", "ngram_weight=0.5", "--ngram", str(foreign)) == 1
    error = capsys.readouterr().err
    assert str(foreign) in error and "tokens" in error
    assert decode(exp, data, tmp_path / "out", "--set", "ngram_weight=0.5", "--ngram", str(tmp_path / "none")) == 1
    assert str(tmp_path / "none") in capsys.readouterr().err
    with pytest.raises(ConfigError, match="ngram_weight"):
        speechtx.load_recognizer(exp, device="cpu", decode=DecodeConfig(ngram_weight=0.1))


def other_member(root: Path, name: str, **changes: str) -> Path:
    """An experiment like make_exp's with other weights, or with a value of a file replaced."""
    path = make_exp(root / name)
    state = {
        key: value + 0.05 * torch.randn_like(value) for key, value in Experiment.open(path).load_model().state_dict().items()
    }
    torch.save(state, path / "model.pt")
    for file, (old, new) in changes.items():
        file_path = path / file.replace("__", ".")
        assert old in file_path.read_text()
        file_path.write_text(file_path.read_text().replace(old, new))
    return path


def test_an_ensemble_decodes_and_all_its_members_are_named(exp, data, tmp_path):
    other = other_member(tmp_path, "other")
    assert decode(exp, data, tmp_path / "one") == 0
    assert decode(exp, data, tmp_path / "twice", "--exp", str(exp)) == 0
    assert decode(exp, data, tmp_path / "both", "--exp", str(other)) == 0
    weights = ("--weights", str(exp / "model.pt"), "--weights", str(other / "model.pt"))
    assert decode(exp, data, tmp_path / "weights", *weights) == 0
    scores = {name: (tmp_path / name / "nbest.jsonl").read_text() for name in ("one", "twice", "both", "weights")}
    assert scores["one"] == scores["twice"] and scores["both"] == scores["weights"] != scores["one"]
    members = summary_of(tmp_path / "both")["members"]
    assert [member["path"] for member in members] == [str(exp / "model.pt"), str(other / "model.pt")]
    assert members[0]["sha256"] != members[1]["sha256"]
    recognizer = speechtx.load_recognizer([exp, other], device="cpu", decode=DecodeConfig(beam=3))
    assert recognizer.transcribe(data / "utt2.wav") == text_of(tmp_path / "both")["utt2"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fbank__yaml": ("povey", "hamming")}, ["window_type", "hamming"]),
        ({"config__yaml": ("norm_vars: true", "norm_vars: false")}, ["normalised differently"]),
        ({"config__yaml": ("factor: 4", "factor: 6")}, ["subsampling"]),
        ({"tokenizer/tokens__txt": ("b", "x")}, ["tokens"]),
    ],
)
def test_members_that_do_not_fit_are_refused_and_both_are_named(exp, data, tmp_path, capsys, changes, words):
    other = other_member(tmp_path, "other", **changes)
    assert decode(exp, data, tmp_path / "out", "--exp", str(other)) == 1
    error = capsys.readouterr().err
    assert all(word in error for word in (str(other), *words)), error


def test_weights_that_cannot_be_paired_with_experiments_are_refused(exp, data, tmp_path, capsys):
    weights = [word for _ in range(3) for word in ("--weights", str(exp / "model.pt"))]
    assert decode(exp, data, tmp_path / "out", "--exp", str(exp), *weights) == 1
    assert "2 experiments but 3 files of weights" in capsys.readouterr().err
    assert main(["decode", "--data", str(data), "--out", str(tmp_path)]) == 1
    assert "--exp" in capsys.readouterr().err
    with pytest.raises(ExperimentError, match="no such"):
        speechtx.load_recognizer(exp, weights=[tmp_path / "no.pt", exp / "model.pt"], device="cpu")
