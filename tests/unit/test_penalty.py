from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speechtx.attention.kernels import attend, attention_weights
from speechtx.attention.penalty import alibi_slopes, build_bias, padding_bias, penalty
from speechtx.config.schema import PenaltyConfig

CONFIGS = [
    PenaltyConfig(shape="log"),
    PenaltyConfig(shape="log", scale=(0.5, 1.0, 2.0, 4.0)),
    PenaltyConfig(shape="linear", scale=0.25),
    PenaltyConfig(shape="linear", scale="alibi"),
    PenaltyConfig(shape="gaussian", sigma=5.0),
    PenaltyConfig(shape="gaussian", sigma=(3.0, 10.0, 30.0, 100.0)),
    PenaltyConfig(shape="window", window=3),
    PenaltyConfig(shape="log", window=4),
]
HEADS = 4


def literal(config: PenaltyConfig, head: int, distance: int) -> float:
    """P(d) written once more, from the formulas alone."""
    if config.window is not None and distance > config.window:
        return math.inf
    scale = config.scale[head] if isinstance(config.scale, tuple) else config.scale
    if scale == "alibi":
        scale = 2 ** (-8 * (head + 1) / HEADS)
    sigma = config.sigma[head] if isinstance(config.sigma, tuple) else config.sigma
    if config.shape == "log":
        return scale * math.log(1 + distance)
    if config.shape == "linear":
        return scale * distance
    return distance**2 / (2 * sigma**2) if config.shape == "gaussian" else 0.0


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_cell_of_the_bias_is_minus_the_formula_of_its_distance(config: PenaltyConfig) -> None:
    length = 9
    bias = build_bias(config, length=length, num_heads=HEADS)
    assert bias is not None
    bias = bias.expand(1, HEADS, length, length)
    for head in range(HEADS):
        for i in range(length):
            for j in range(length):
                expected = -literal(config, head, abs(i - j))
                assert bias[0, head, i, j].item() == pytest.approx(expected, rel=1e-6), (head, i, j)


def test_log_with_scale_one_is_tensor2tensors_proximity_bias() -> None:
    position = torch.arange(50.0)
    expected = -torch.log1p((position[:, None] - position[None, :]).abs())
    assert torch.equal(build_bias(PenaltyConfig(shape="log"), length=50, num_heads=4)[0, 0], expected)


def test_alibi_slopes_of_eight_heads_are_those_of_the_paper() -> None:
    assert alibi_slopes(8) == tuple(2.0**-h for h in range(1, 9))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_subtracting_before_softmax_equals_multiplying_the_weights_and_renormalising(config: PenaltyConfig) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, HEADS, 12, 8, dtype=torch.float64).unbind(0)
    bias = build_bias(config, length=12, num_heads=HEADS, dtype=torch.float64)
    multiplied = attention_weights(q, k) * bias.exp()
    expected = multiplied / multiplied.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(attention_weights(q, k, bias=bias), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_padding_gets_no_weight_whatever_the_penalty(config: PenaltyConfig) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, HEADS, 10, 8).unbind(0)
    mask = torch.arange(10) < torch.tensor([10, 6]).unsqueeze(1)
    bias = build_bias(config, length=10, num_heads=HEADS, mask=mask)
    assert bias.shape[0] == 2 and bias.dim() == 4  # a 3-D bias would leave the fused CPU kernel
    weights = attention_weights(q, k, bias=bias)
    assert (weights[1, :, :, 6:] == 0).all()
    alone = attention_weights(q[1:, :, :6], k[1:, :, :6], bias=build_bias(config, length=6, num_heads=HEADS))
    torch.testing.assert_close(weights[1:, :, :6, :6], alone, atol=1e-6, rtol=0)


def test_shape_none_is_bit_for_bit_no_bias_at_all() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, HEADS, 10, 8).unbind(0)
    none = PenaltyConfig()
    assert build_bias(none, length=10, num_heads=HEADS) is None
    full = torch.ones(2, 10, dtype=torch.bool)
    padding_only = build_bias(none, length=10, num_heads=HEADS, mask=full)
    assert padding_only.shape == (2, 1, 1, 10)
    assert torch.equal(attend(q, k, v, bias=padding_only), attend(q, k, v, bias=padding_bias(full)))
    zero = build_bias(PenaltyConfig(shape="log", scale=0.0), length=10, num_heads=HEADS, mask=full)
    assert torch.equal(attend(q, k, v, bias=zero), attend(q, k, v, bias=padding_only))
    assert torch.equal(penalty(none, torch.arange(5), num_heads=HEADS), torch.zeros(1, 5))


@given(st.integers(1, 40), st.integers(0, 1000), st.sampled_from(CONFIGS))
def test_only_the_distance_counts_not_where_the_utterance_stands(length: int, shift: int, config: PenaltyConfig) -> None:
    position = torch.arange(length) + shift
    shifted = penalty(config, (position[:, None] - position[None, :]).abs(), num_heads=HEADS)
    bias = build_bias(config, length=length, num_heads=HEADS)
    assert torch.equal(-bias[0], shifted)
    assert torch.equal(shifted, shifted.transpose(1, 2)) and (shifted.diagonal(dim1=1, dim2=2) == 0).all()
    assert (shifted >= 0).all()


def test_the_bias_is_computed_in_float32_and_rounded_once() -> None:
    config = PenaltyConfig(shape="gaussian", sigma=7.0)
    exact = build_bias(config, length=300, num_heads=HEADS)
    assert torch.equal(build_bias(config, length=300, num_heads=HEADS, dtype=torch.bfloat16), exact.bfloat16())
