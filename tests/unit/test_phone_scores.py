"""The second opinion of phones: what is added, who comes last, and that a decoding gives it to every search that ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from toy_corpus import LETTERS, make_training_data, tiny_config, write_lexicon

from speechtx.bin import main as front
from speechtx.config.decode import DecodeConfig
from speechtx.config.errors import ConfigError
from speechtx.config.schema import AverageConfig
from speechtx.model.ensemble import Ensemble
from speechtx.search.decode import decode_batch
from speechtx.search.hypothesis import Hypothesis
from speechtx.search.parts import read_part
from speechtx.search.phones import Pronouncer, add_phone_scores
from speechtx.search.reference import ctc_log_prob
from speechtx.search.system import System
from speechtx.text.phones import Phones
from speechtx.text.tokenizer import Tokenizer
from speechtx.training.averaging import average_checkpoints
from speechtx.training.train import train


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models that predict phones in their first layer."""
    root = tmp_path_factory.mktemp("phones")
    data, lexicon = make_training_data(root), write_lexicon(root / "lexicon.txt")
    phones = ["model.encoder.layers=2", "model.intermediate_ctc.layers=[1]", f"model.intermediate_ctc.lexicon={lexicon}"]
    for seed in (1, 2):
        train(tiny_config(*phones, f"seed={seed}", "training.epochs=4"), data, root / f"exp{seed}")
        average_checkpoints(root / f"exp{seed}", AverageConfig(num=2))
    return root


def pronouncer(root: Path) -> Pronouncer:
    return Pronouncer(Tokenizer.load(root / "tokenizer"), Phones.load(root / "lexicon.txt"))


def test_the_score_of_phones_is_that_of_the_textbook_and_words_outside_come_last(root: Path) -> None:
    pronounce = pronouncer(root)
    outputs = [
        torch.randn(2, 9, len(pronounce.phones) + 1, generator=torch.Generator().manual_seed(n)).log_softmax(-1) for n in (1, 2)
    ]
    texts = ["A", "B C", "A A", "D E A B", "AB", ""]  # no letter AB; eight phones do not go into seven frames, or hardly
    nbests = [
        [Hypothesis(tokens=tuple(pronounce.tokenizer.encode(text)), score=-float(n)) for n, text in enumerate(texts)]
        for _ in range(2)
    ]
    config = DecodeConfig(beam=8, nbest=6, phone_weight=0.4)
    lens = torch.tensor([9, 7])
    for row, found in enumerate(add_phone_scores(nbests, outputs, lens, pronounce, config)):
        expected = {}
        for n, text in enumerate(texts):
            labels = pronounce.phones.encode(text) if text != "AB" else None
            scores = [
                ctc_log_prob(output[row, : lens[row]].double().numpy(), labels, blank_id=0, prefix=False)
                for output in (outputs if labels is not None else [])
            ]
            known = bool(scores) and np.isfinite(scores).all()
            expected[text] = (not known, n + 0.4 * -(sum(scores) / 2) if known else float(n))
        assert [pronounce.tokenizer.decode(h.tokens) for h in found] == sorted(texts, key=expected.__getitem__)
        for hypothesis in found:
            outside, minus = expected[pronounce.tokenizer.decode(hypothesis.tokens)]
            assert hypothesis.score == pytest.approx(-minus) and (hypothesis.phones is None) == outside
        assert found[-1].phones is None
    assert [
        len(nbest) for nbest in add_phone_scores(nbests, outputs, lens, pronounce, config.model_copy(update={"nbest": 2}))
    ] == [2, 2]


@pytest.mark.parametrize("method", ["beam", "ctc_beam", "attention_rescoring"])
def test_every_search_that_ranks_ranks_anew(root: Path, method: str) -> None:
    config = DecodeConfig.model_validate({"method": method, "beam": 6, "nbest": 6, "phone_weight": 3.0})
    model, (scorers,) = System.find([root / "exp1"]).load([config], "cpu")
    feats, lens = torch.randn(2, 80, 12, generator=torch.Generator().manual_seed(4)), torch.tensor([80, 60])
    with_phones = decode_batch(model, feats, lens, config, scorers)
    without = decode_batch(model, feats, lens, config.model_copy(update={"phone_weight": 0.0}))
    for ours, plain in zip(with_phones, without, strict=True):
        base = {h.tokens: h.score for h in plain}
        assert {h.tokens for h in ours} == set(base)
        known = [h for h in ours if h.phones is not None]
        assert known == ours[: len(known)] == sorted(known, key=lambda h: -h.score)
        assert all(h.score == pytest.approx(base[h.tokens] + 3.0 * h.phones, abs=1e-3) for h in known)
    assert any(h.phones is not None for nbest in with_phones for h in nbest)


def test_an_ensemble_hears_the_phones_of_all_its_members(root: Path) -> None:
    config = DecodeConfig(beam=4, nbest=4, phone_weight=1.0)
    model, (scorers,) = System.find([root / "exp1", root / "exp2"]).load([config], "cpu")
    assert isinstance(model, Ensemble) and model.predicts_phones
    feats, lens = torch.randn(1, 80, 12, generator=torch.Generator().manual_seed(4)), torch.tensor([80])
    (found,) = decode_batch(model, feats, lens, config, scorers)
    members = []
    for member in model.members:
        heard: list[torch.Tensor] = []
        member.encode(feats, lens, phones=heard)
        members.append(heard[0][0].detach().double().numpy())
    best = found[0]
    labels = pronouncer(root)(best.tokens)
    scores = [ctc_log_prob(own, labels, blank_id=0, prefix=False) for own in members]
    assert best.phones == pytest.approx(sum(scores) / 2, rel=1e-4)


def test_a_decoding_writes_the_phones_beside_the_other_parts(root: Path, tmp_path: Path) -> None:
    (tmp_path / "decode.yaml").write_text("beam: 4\nphone_weight: 0.5\n")
    arguments = ["--data", str(root / "dev"), "--config", str(tmp_path / "decode.yaml"), "--out", str(tmp_path / "out")]
    assert front.main(["decode", "--exp", str(root / "exp1"), *arguments]) == 0
    part = read_part(tmp_path / "out" / "parts" / "1.jsonl")
    assert part is not None and len(part.results) == 6
    words = {word for result in part.results for word in result.nbest[0].text.split() if result.nbest[0].phones is not None}
    assert words <= set(LETTERS)


def test_a_model_that_predicts_no_phones_is_refused(tmp_path: Path) -> None:
    data = make_training_data(tmp_path, num_train=4, num_dev=2)
    train(tiny_config("training.epochs=1"), data, tmp_path / "exp")
    average_checkpoints(tmp_path / "exp", AverageConfig(num=1))
    with pytest.raises(ConfigError, match=r"phone_weight 0\.5 needs a model that predicts phones"):
        System.find([tmp_path / "exp"]).load([DecodeConfig(phone_weight=0.5)], "cpu")


def test_greedy_decoding_has_nothing_to_rank() -> None:
    with pytest.raises(ValueError, match="method ctc_greedy has no phone_weight"):
        DecodeConfig(method="ctc_greedy", phone_weight=0.1)
