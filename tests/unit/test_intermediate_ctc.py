"""Intermediate CTC and self-conditioning: the papers' formulas, and nothing in recognition unless a layer needs it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from toy_corpus import BINS, tiny_config

from speechtx.config.errors import ConfigError
from speechtx.config.schema import ModelConfig
from speechtx.model.encoder import length_mask
from speechtx.model.losses import ctc_loss
from speechtx.model.recognizer import Recognizer
from speechtx.model.subsampling import subsampled_length

FEATS = torch.randn(2, 80, BINS, generator=torch.Generator().manual_seed(3))
LENS = torch.tensor([80, 60])
TOKENS, TOKEN_LENS = torch.tensor([[1, 2, 3], [4, 1, 0]]), torch.tensor([3, 2])
QUIET = ["model.encoder.layers=4", "model.encoder.dropout=0.0", "model.encoder.positional_dropout=0.0"]


def make_config(*overrides: str) -> ModelConfig:
    decoder = ["model.decoder.dropout=0.0", "model.decoder.positional_dropout=0.0"]
    return tiny_config(*QUIET, *decoder, *overrides).model


def make_model(config: ModelConfig) -> Recognizer:
    torch.manual_seed(0)
    return Recognizer(config=config, num_mel_bins=BINS, vocab_size=7)


def by_hand(model: Recognizer, layers: tuple[int, ...]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The encoder's output and the predictions between its layers, written out."""
    encoder = model.encoder
    x = encoder.position(encoder.subsampling(FEATS, LENS))
    mask = length_mask(subsampled_length(LENS, 4), x.shape[1])
    predictions = []
    for number, (layer, bias) in enumerate(zip(encoder.layers, encoder.biases(x, mask), strict=True), start=1):
        x = layer(x, bias=bias, mask=mask)
        if number in layers:
            probabilities = model.ctc(encoder.norm(x)).softmax(dim=-1)
            predictions.append(probabilities.log())
            if encoder.intermediate.condition is not None:
                weight, bias_of_it = encoder.intermediate.condition.weight, encoder.intermediate.condition.bias
                x = x + probabilities @ weight.T + bias_of_it
    return encoder.norm(x), predictions


@pytest.mark.parametrize("condition", ["false", "true"])
@pytest.mark.parametrize("layers", [(2,), (1, 3)])
def test_the_loss_is_the_papers_mixture_over_the_named_layers(layers: tuple[int, ...], condition: str) -> None:
    sections = (f"model.intermediate_ctc.layers={list(layers)}", f"model.intermediate_ctc.condition={condition}")
    config = make_config(*sections, "model.intermediate_ctc.weight=0.4")
    model = make_model(config).train()
    losses = model(FEATS, LENS, TOKENS, TOKEN_LENS)
    enc_out, predictions = by_hand(model, layers)
    last, *lower = (
        float(ctc_loss(log_probs, subsampled_length(LENS, 4), TOKENS, TOKEN_LENS, blank_id=0).detach())
        for log_probs in (model.ctc_log_probs(enc_out), *predictions)
    )
    ctc = 0.6 * last + 0.4 * sum(lower) / len(lower)
    assert float(losses.ctc) == pytest.approx(last, rel=1e-4)  # what is reported is the output's own
    expected = config.ctc_weight * ctc + (1 - config.ctc_weight) * float(losses.att)
    assert float(losses.total.detach()) == pytest.approx(expected, rel=1e-4)
    assert abs(ctc - last) > 1e-2


def test_later_layers_see_the_prediction_in_recognition_too() -> None:
    model = make_model(make_config("model.intermediate_ctc.layers=[2]", "model.intermediate_ctc.condition=true")).eval()
    with torch.no_grad():
        expected, _ = by_hand(model, (2,))
        enc_out, _ = model.encode(FEATS, LENS)
        torch.testing.assert_close(enc_out, expected)
        model.ctc.weight.neg_()
        assert not torch.allclose(model.encode(FEATS, LENS)[0], enc_out)


def test_without_conditioning_recognition_is_that_of_a_model_that_has_none() -> None:
    plain, regularised = make_model(make_config()), make_model(make_config("model.intermediate_ctc.layers=[2]"))
    assert plain.state_dict().keys() == regularised.state_dict().keys()
    regularised.load_state_dict(plain.state_dict())
    plain.eval(), regularised.eval()
    assert torch.equal(plain.encode(FEATS, LENS)[0], regularised.encode(FEATS, LENS)[0])
    batch = (FEATS, LENS, TOKENS, TOKEN_LENS)
    assert torch.equal(plain(*batch).total, regularised(*batch).total)


def test_the_output_is_shared_so_lower_layers_train_it_and_weights_are_stored_once() -> None:
    model = make_model(make_config("model.intermediate_ctc.layers=[2]", "model.intermediate_ctc.condition=true")).train()
    assert [name for name in model.state_dict() if "intermediate" in name] == [
        "encoder.intermediate.condition.weight",
        "encoder.intermediate.condition.bias",
    ]
    model(FEATS, LENS, TOKENS, TOKEN_LENS).total.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_copy_of_a_model_predicts_with_its_own_weights(tmp_path: Path) -> None:
    model = make_model(make_config("model.intermediate_ctc.layers=[2]", "model.intermediate_ctc.condition=true")).eval()
    copied = copy.deepcopy(model)
    with torch.no_grad():
        before = copied.encode(FEATS, LENS)[0]
        model.ctc.weight.zero_()
        assert torch.equal(copied.encode(FEATS, LENS)[0], before)


@pytest.mark.parametrize("layers", ["[4]", "[7]", "[2, 2]"])
def test_layers_that_are_not_inside_the_encoder_are_refused(layers: str) -> None:
    with pytest.raises(ConfigError, match=r"must be different numbers below encoder\.layers 4"):
        make_config(f"model.intermediate_ctc.layers={layers}")


@pytest.mark.parametrize("override", ["model.intermediate_ctc.layers=[]", "model.intermediate_ctc.layers=[0]"])
def test_no_layer_and_layer_zero_are_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.intermediate_ctc\.layers"):
        make_config(override)


def test_intermediate_ctc_without_ctc_is_refused() -> None:
    with pytest.raises(ConfigError, match="which ctc_weight 0 leaves out"):
        make_config("model.intermediate_ctc.layers=[2]", "model.ctc_weight=0.0")
