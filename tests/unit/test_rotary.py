from __future__ import annotations

import cmath

import pytest
import torch

from speechtx.attention.multihead import SelfAttention
from speechtx.attention.rotary import Rotary


def test_pairs_are_turned_as_complex_numbers_by_the_papers_angles() -> None:
    x = torch.randn(1, 2, 40, 8)
    turned = Rotary(dim=8)(x, start=5)
    for head, index, pair in ((0, 0, 0), (1, 7, 1), (0, 39, 3), (1, 12, 2)):
        number = complex(*x[0, head, index, 2 * pair : 2 * pair + 2].tolist())
        expected = number * cmath.exp(1j * (index + 5) / 10000 ** (2 * pair / 8))
        assert abs(complex(*turned[0, head, index, 2 * pair : 2 * pair + 2].tolist()) - expected) < 1e-5


def test_logits_depend_on_the_difference_of_positions_only() -> None:
    rotary = Rotary(dim=16)
    q, k = torch.randn(2, 1, 3, 20, 16, dtype=torch.float64).unbind(0)
    here = rotary(q) @ rotary(k).transpose(-2, -1)
    there = rotary(q, start=1000) @ rotary(k, start=1000).transpose(-2, -1)
    torch.testing.assert_close(here, there, atol=1e-4, rtol=0)  # the table is float32
    assert not torch.allclose(here, q @ k.transpose(-2, -1), atol=1e-2)


def test_a_piece_is_turned_as_it_is_within_the_whole() -> None:
    rotary = Rotary(dim=8)
    x = torch.randn(2, 4, 600, 8)
    assert torch.equal(rotary(x[:, :, 550:], start=550), rotary(x)[:, :, 550:])


def test_lower_precision_is_turned_in_float32() -> None:
    x = torch.randn(1, 1, 400, 8).bfloat16()
    turned = Rotary(dim=8)(x)
    assert turned.dtype == torch.bfloat16 and torch.equal(turned, Rotary(dim=8)(x.float()).bfloat16())


def test_a_layer_with_rotary_positions_knows_the_order_of_its_input_and_one_without_does_not() -> None:
    torch.manual_seed(0)
    x, order = torch.randn(1, 9, 16), torch.randperm(9)
    for rotary in (False, True):
        layer = SelfAttention(dim=16, num_heads=4, rotary=rotary)
        assert torch.allclose(layer(x)[:, order], layer(x[:, order]), atol=1e-5) is not rotary
        assert list(layer.state_dict()) == ["qkv.weight", "qkv.bias", "out.weight", "out.bias"]


def test_heads_of_odd_width_are_refused() -> None:
    with pytest.raises(ValueError, match="5 in a head is odd"):
        Rotary(dim=5)
