"""Pronunciations: Kaldi's lexicon read and refused, and what intermediate CTC learns from them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from toy_corpus import BINS, LETTERS, make_training_data, tiny_config, write_lexicon

from speechtx.config.errors import ConfigError, DataError, ExperimentError, TrainingError
from speechtx.data.manifest import load_manifest
from speechtx.experiment.experiment import Experiment
from speechtx.model.losses import ctc_loss
from speechtx.model.recognizer import Recognizer
from speechtx.model.subsampling import subsampled_length
from speechtx.text.phones import Phones
from speechtx.text.tokenizer import Tokenizer
from speechtx.training.prepare import select_utterances
from speechtx.training.train import train

CONDITION = "model.intermediate_ctc.condition=true"
LEXICON = "B B IY\nC S IY\nA EY\nA AH\n\nD D IY\nE IY\n"  # A has a second pronunciation


def write(path: Path, text: str = LEXICON) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_the_first_pronunciation_counts_and_phones_are_numbered_from_one_in_c_order(tmp_path: Path) -> None:
    phones = Phones.load(write(tmp_path / "lexicon.txt"))
    assert phones.names == ["B", "D", "EY", "IY", "S"]
    assert phones.encode(" C  A B ") == [5, 4, 3, 1, 4]
    assert phones.encode("") == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A EY\nB\n", r"lexicon\.txt:2: B has no phones"),
        ("\n \n", "holds no word"),
        ("A 0.5 EY\n", r"0\.5 is no phone"),
        ("A \udcff\n", "not UTF-8 at byte 3"),
    ],
)
def test_a_lexicon_that_is_none_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "lexicon.txt"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=message):
        Phones.load(path)


def test_words_without_a_pronunciation_are_named_with_their_utterances(tmp_path: Path) -> None:
    phones = Phones.load(write(tmp_path / "lexicon.txt"))
    phones.require({"u1": "A B C"})
    with pytest.raises(DataError, match=r"lexicon\.txt: no pronunciation of X \(utterance u1\), Y \(utterance u2\); add a line"):
        phones.require({"u1": "A X", "u2": "Y X B"})


def test_lower_layers_learn_phones_and_the_last_one_tokens() -> None:
    quiet = ["model.encoder.layers=2", "model.encoder.dropout=0.0", "model.encoder.positional_dropout=0.0"]
    config = tiny_config(*quiet, "model.intermediate_ctc.layers=[1]", "model.intermediate_ctc.lexicon=lexicon.txt").model
    torch.manual_seed(0)
    model = Recognizer(config=config, num_mel_bins=BINS, vocab_size=7, num_phones=5).train()
    feats, lens = torch.randn(2, 80, BINS), torch.tensor([80, 60])
    tokens, token_lens = torch.tensor([[1, 2, 3], [4, 1, 0]]), torch.tensor([3, 2])
    phones, phone_lens = torch.tensor([[5, 5, 1, 2], [3, 4, 4, 0]]), torch.tensor([4, 3])
    losses = model(feats, lens, tokens, token_lens, phones=phones, phone_lens=phone_lens)

    below: list[torch.Tensor] = []
    model.encoder(feats, lens, predictions=below)
    assert below[0].shape == (2, subsampled_length(80, 4), 6)
    lower = float(ctc_loss(below[0], subsampled_length(lens, 4), phones, phone_lens, blank_id=0).detach())
    ctc = 0.7 * float(losses.ctc) + 0.3 * lower
    expected = config.ctc_weight * ctc + (1 - config.ctc_weight) * float(losses.att)
    assert float(losses.total.detach()) == pytest.approx(expected, rel=1e-4)

    with pytest.raises(ConfigError, match="layer 2 is the last"):
        tiny_config(*quiet, "model.intermediate_ctc.layers=[1,2]", "model.intermediate_ctc.lexicon=x", CONDITION)
    tiny_config(*quiet, "model.intermediate_ctc.layers=[1,2]", "model.intermediate_ctc.lexicon=x")  # phones there too

    model.eval()  # where nothing is asked of the lower layers
    assert torch.isfinite(model(feats, lens, tokens, token_lens).total)


def test_an_utterance_too_short_for_its_phones_is_left_out(tmp_path: Path) -> None:
    data = make_training_data(tmp_path)
    long = "".join(f"{letter} {'P Q ' * 40}\n" for letter in LETTERS)
    phones = Phones.load(write(tmp_path / "lexicon.txt", long))
    manifest, tokenizer = load_manifest(data.train), Tokenizer.load(data.tokenizer)
    assert not select_utterances(manifest, tokenizer, tiny_config()).left_out
    left_out = select_utterances(manifest, tokenizer, tiny_config(), phones).left_out
    assert len(left_out) == len(manifest)
    assert "tokens or" in left_out[0][1] and "phones and their repeats" in left_out[0][1]


def test_an_experiment_keeps_its_lexicon_and_refuses_another(tmp_path: Path) -> None:
    data = make_training_data(tmp_path)
    path = write_lexicon(tmp_path / "lexicon.txt")
    sets = ["model.encoder.layers=2", "model.intermediate_ctc.layers=[1]", f"model.intermediate_ctc.lexicon={path}"]
    config = tiny_config(*sets, "training.epochs=1")
    train(config, data, tmp_path / "exp")
    kept = Experiment.open(tmp_path / "exp")
    assert (kept.path / "lexicon.txt").read_bytes() == path.read_bytes()
    path.write_text(path.read_text() + "Z Z\n")
    with pytest.raises(TrainingError, match=r"lexicon\.txt is not what .*exp was trained with: it changed; give another --exp"):
        train(config, data, tmp_path / "exp")
    path.unlink()
    assert kept.new_model().phones.out_features == 8  # P0, P1, Q0 to Q4 and the blank: without the file it was made from
    with pytest.raises(TrainingError, match=r"lexicon\.txt: missing; stage data makes a recipe's lexicon"):
        train(config, data, tmp_path / "other")
    (kept.path / "lexicon.txt").unlink()
    with pytest.raises(ExperimentError, match=r"lexicon\.txt: missing, and the model predicts its phones; copy .* there again"):
        Experiment.open(kept.path).new_model()


def test_a_word_of_the_training_set_needs_a_pronunciation_one_of_dev_does_not(tmp_path: Path) -> None:
    data = make_training_data(tmp_path)
    path = write(tmp_path / "lexicon.txt", "".join(f"{letter} P Q\n" for letter in LETTERS[1:]))
    sets = ["model.encoder.layers=2", "model.intermediate_ctc.layers=[1]", f"model.intermediate_ctc.lexicon={path}"]
    config = tiny_config(*sets, "training.epochs=1")
    with pytest.raises(DataError, match=r"lexicon\.txt: no pronunciation of .*A.* \(utterance "):
        train(config, data, tmp_path / "exp")
