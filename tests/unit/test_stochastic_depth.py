"""Stochastic depth: linear over the layers, exact in the mean, absent from evaluation, and equal for any number of processes."""

from __future__ import annotations

import pytest
import torch
from toy_corpus import BINS, tiny_config

from speechtx.config.errors import ConfigError
from speechtx.model.dropout import depth_rates
from speechtx.model.recognizer import Recognizer
from speechtx.training.distributed import World

FEATS = torch.randn(2, 40, BINS, generator=torch.Generator().manual_seed(3))
LENS = torch.tensor([40, 30])


def make_model(*overrides: str) -> Recognizer:
    quiet = ("model.encoder.dropout=0.0", "model.encoder.positional_dropout=0.0")
    torch.manual_seed(0)
    return Recognizer(config=tiny_config(*quiet, *overrides).model, num_mel_bins=BINS, vocab_size=7)


def encode(model: Recognizer, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    with torch.no_grad():
        return model.encode(FEATS, LENS)[0]


def test_rates_grow_linearly_to_the_last_layers() -> None:
    assert depth_rates(0.4, 4) == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_layers_are_left_out_as_often_as_their_rates_say() -> None:
    model = make_model("model.encoder.layers=4", "model.encoder.stochastic_depth=0.8").train()
    calls = [0] * 4
    for index, layer in enumerate(model.encoder.layers):

        def count(*_args: object, index: int = index) -> None:
            calls[index] += 1

        layer.register_forward_hook(count)
    draws = 400
    for seed in range(draws):
        encode(model, seed)
    assert [1 - called / draws for called in calls] == pytest.approx([0.2, 0.4, 0.6, 0.8], abs=0.08)


@pytest.mark.parametrize("kind", ["transformer", "conformer"])
def test_the_mean_over_draws_is_what_evaluation_computes(kind: str) -> None:
    model = make_model(f"model.encoder.type={kind}", "model.encoder.stochastic_depth=0.3")
    model.encoder.norm = torch.nn.Identity()  # the mean is exact before the last norm
    by_draw: dict[bool, torch.Tensor] = {}
    layer_input = model.train().encoder.position(model.encoder.subsampling(FEATS, LENS)).detach()
    for seed in range(50):
        out = encode(model, seed)
        by_draw[torch.equal(out, layer_input)] = out
    assert by_draw.keys() == {True, False}
    torch.testing.assert_close(0.3 * by_draw[True] + 0.7 * by_draw[False], encode(model.eval(), 0), rtol=1e-4, atol=1e-4)


def test_evaluation_leaves_nothing_out_and_a_rate_of_zero_draws_nothing() -> None:
    plain, dropping = (
        make_model("model.encoder.layers=3"),
        make_model("model.encoder.layers=3", "model.encoder.stochastic_depth=0.9"),
    )
    assert torch.equal(encode(plain.eval(), 0), encode(dropping.eval(), 1))
    before = torch.manual_seed(5).get_state()
    plain.train().encode(FEATS, LENS)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_parameter_of_a_layer_left_out_is_stepped_as_with_several_processes() -> None:
    used, unused = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    used.sum().backward()
    World(rank=0, size=1, device=torch.device("cpu")).sum_gradients([used, unused])
    assert torch.equal(unused.grad, torch.zeros(2))
    assert torch.equal(used.grad, torch.ones(2))


def test_leaving_out_every_layer_always_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.encoder\.stochastic_depth"):
        make_model("model.encoder.stochastic_depth=1.0")
