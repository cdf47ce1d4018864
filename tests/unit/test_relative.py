from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from speechtx.attention.kernels import padding_bias
from speechtx.attention.multihead import join_heads, split_heads
from speechtx.attention.relative import RelativeSelfAttention, shift

MASK = torch.arange(9) < torch.tensor([9, 5]).unsqueeze(1)


def make_layer(**options: float) -> RelativeSelfAttention:
    torch.manual_seed(0)
    layer = RelativeSelfAttention(dim=16, num_heads=4, **options).double()
    with torch.no_grad():
        layer.content_bias.normal_()
        layer.position_bias.normal_()
    return layer


def sinusoid(distance: int, dim: int) -> Tensor:
    values = [f(distance / 10000 ** (2 * k / dim)) for k in range(dim // 2) for f in (math.sin, math.cos)]
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("length", [1, 2, 7])
def test_the_shift_picks_the_distance_of_each_pair(length: int) -> None:
    distance = torch.arange(length - 1, -length, -1.0).expand(2, length, -1)
    position = torch.arange(float(length))
    assert torch.equal(shift(distance), (position[:, None] - position[None, :]).expand(2, -1, -1))


def test_the_layer_is_the_papers_four_terms_pair_by_pair() -> None:
    layer = make_layer()
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    penalty = -torch.rand(1, 1, 9, 9, dtype=torch.float64)
    bias = penalty + padding_bias(MASK, dtype=torch.float64)
    q, k, v = layer.project(x)
    u, w = layer.content_bias.view(4, 1, 4), layer.position_bias.view(4, 1, 4)
    logits = torch.empty(2, 4, 9, 9, dtype=torch.float64)
    for i in range(9):
        for j in range(9):
            r = split_heads(layer.position(sinusoid(i - j, 16))[None, None], 4)[0, :, 0]
            content = ((q[:, :, i] + u[:, 0]) * k[:, :, j]).sum(-1)
            logits[:, :, i, j] = (content + ((q[:, :, i] + w[:, 0]) * r).sum(-1)) / 2.0 + bias.expand(2, 1, 9, 9)[
                :, 0, i, j, None
            ]
    expected = layer.out(join_heads(logits.softmax(-1) @ v))
    torch.testing.assert_close(layer(x, bias=bias), expected, atol=1e-6, rtol=0)  # the table is float32
    torch.testing.assert_close(layer.weights(x, bias=bias), logits.softmax(-1), atol=1e-6, rtol=0)


def test_padding_changes_nothing_and_a_query_without_keys_has_finite_gradients() -> None:
    layer = make_layer()
    x = torch.randn(2, 9, 16, dtype=torch.float64, requires_grad=True)
    out = layer(x, bias=padding_bias(MASK, dtype=torch.float64))
    torch.testing.assert_close(out[1, :5], layer(x[1:, :5])[0], atol=1e-10, rtol=0)
    nobody = torch.zeros(2, 9, dtype=torch.bool)
    empty = layer(x, bias=padding_bias(nobody, dtype=torch.float64))
    torch.testing.assert_close(empty, layer.out.bias.expand_as(empty))
    empty.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in (x, *layer.parameters()) if p.grad is not None)


def test_all_parameters_learn_and_the_biases_are_spared_by_weight_decay() -> None:
    layer = make_layer()
    layer(torch.randn(1, 9, 16, dtype=torch.float64)).square().sum().backward()
    assert all((p.grad != 0).any() for p in layer.parameters())
    assert layer.content_bias.ndim == layer.position_bias.ndim == 1


def test_two_inputs_longer_and_shorter_than_the_table_agree_on_their_common_part() -> None:
    layer = make_layer()
    x = torch.randn(1, 520, 16, dtype=torch.float64)  # beyond the first table of 512
    before = layer(x[:, :10])
    far = torch.full((520, 520), float("-inf"), dtype=torch.float64)
    far[:, :10] = 0.0
    torch.testing.assert_close(layer(x, bias=far[None, None])[:, :10], before, atol=1e-10, rtol=0)
    torch.testing.assert_close(layer(x[:, :10]), before, atol=1e-12, rtol=0)  # from the longer table
