from __future__ import annotations

import pytest
import torch
from torch import nn

from speechtx.attention.kernels import attend_eager, padding_bias
from speechtx.attention.multihead import CrossAttention, SelfAttention, join_heads, split_heads
from speechtx.attention.site import build_bias
from speechtx.config.penalty import PenaltyConfig

MASK = torch.arange(9) < torch.tensor([9, 5]).unsqueeze(1)


def torch_twin(attention: SelfAttention | CrossAttention) -> nn.MultiheadAttention:
    """PyTorch's own layer with the same weights."""
    dim = attention.out.in_features
    twin = nn.MultiheadAttention(dim, attention.num_heads, batch_first=True).double()
    parts = [attention.qkv] if isinstance(attention, SelfAttention) else [attention.q, attention.kv]
    with torch.no_grad():
        twin.in_proj_weight.copy_(torch.cat([p.weight for p in parts]))
        twin.in_proj_bias.copy_(torch.cat([p.bias for p in parts]))
        twin.out_proj.weight.copy_(attention.out.weight)
        twin.out_proj.bias.copy_(attention.out.bias)
    return twin


def test_self_attention_equals_pytorchs_layer_with_the_same_weights_and_mask() -> None:
    torch.manual_seed(0)
    layer = SelfAttention(dim=16, num_heads=4).double()
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    expected, _ = torch_twin(layer)(x, x, x, key_padding_mask=~MASK)
    torch.testing.assert_close(layer(x, bias=padding_bias(MASK, dtype=torch.float64)), expected, atol=1e-12, rtol=0)


def test_cross_attention_equals_pytorchs_layer_with_the_same_weights_and_mask() -> None:
    torch.manual_seed(0)
    layer = CrossAttention(dim=16, num_heads=4).double()
    x, memory = torch.randn(2, 3, 16, dtype=torch.float64), torch.randn(2, 9, 16, dtype=torch.float64)
    expected, _ = torch_twin(layer)(x, memory, memory, key_padding_mask=~MASK)
    bias = padding_bias(MASK, dtype=torch.float64)
    torch.testing.assert_close(layer(x, *layer.project(memory), bias=bias), expected, atol=1e-12, rtol=0)


def test_the_weights_we_draw_are_the_weights_the_layer_uses() -> None:
    torch.manual_seed(0)
    layer = SelfAttention(dim=16, num_heads=4)
    x = torch.randn(2, 9, 16)
    bias = build_bias(PenaltyConfig(shape="linear", scale="alibi"), length=9, num_heads=4, mask=MASK)
    _, _, v = layer.project(x)
    torch.testing.assert_close(layer.out(join_heads(layer.weights(x, bias=bias) @ v)), layer(x, bias=bias), atol=1e-6, rtol=0)


def test_heads_are_split_and_joined_without_mixing() -> None:
    x = torch.randn(2, 5, 12)
    assert torch.equal(join_heads(split_heads(x, 3)), x)
    assert torch.equal(split_heads(x, 3)[:, 1], x[:, :, 4:8])


def test_relabelling_heads_with_their_penalties_changes_nothing() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 4, 9, 8).unbind(0)
    order = torch.tensor([2, 0, 3, 1])
    bias = build_bias(PenaltyConfig(shape="log", scale=(0.5, 1.0, 2.0, 3.0)), length=9, num_heads=4)
    shuffled = attend_eager(q[:, order], k[:, order], v[:, order], bias=bias[:, order])
    assert torch.equal(shuffled, attend_eager(q, k, v, bias=bias)[:, order])


@pytest.mark.parametrize("training", [True, False])
def test_attention_dropout_acts_in_training_only(training: bool) -> None:
    torch.manual_seed(0)
    layer = SelfAttention(dim=16, num_heads=4, dropout=0.5).train(training)
    x = torch.randn(1, 9, 16)
    assert torch.equal(layer(x), layer(x)) is not training
