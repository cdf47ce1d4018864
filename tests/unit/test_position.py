from __future__ import annotations

import math

import pytest
import torch

from speechtx.model.position import NoPosition, SinusoidalPosition, input_position, sinusoids


def test_the_table_is_the_papers_formula() -> None:
    table = sinusoids(6000, 8)
    for position in (0, 1, 17, 5999):
        for pair in range(4):
            angle = position / 10000 ** (2 * pair / 8)
            assert abs(table[position, 2 * pair].item() - math.sin(angle)) < 1e-6
            assert abs(table[position, 2 * pair + 1].item() - math.cos(angle)) < 1e-6


def test_a_longer_table_starts_with_the_shorter_one_bit_for_bit() -> None:
    assert torch.equal(sinusoids(4096, 144)[:512], sinusoids(512, 144))


def test_the_table_grows_with_the_input_and_is_in_no_checkpoint() -> None:
    layer = SinusoidalPosition(dim=8, dropout=0.0)
    short = layer(torch.zeros(1, 10, 8))
    long = layer(torch.zeros(1, 3000, 8))
    assert torch.equal(long[:, :10], short) and torch.equal(long[0], sinusoids(3000, 8))
    assert not layer.state_dict() and not list(layer.buffers())


def test_input_is_scaled_and_a_start_shifts_the_positions() -> None:
    layer = SinusoidalPosition(dim=16, dropout=0.0)
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(layer(x), 4.0 * x + sinusoids(5, 16))
    assert torch.equal(layer(torch.zeros(1, 1, 16), start=7)[0, 0], sinusoids(8, 16)[7])


def test_a_model_built_on_the_meta_device_still_has_positions_once_it_is_real() -> None:
    with torch.device("meta"):
        layer = SinusoidalPosition(dim=8, dropout=0.0)
    assert torch.equal(layer(torch.zeros(1, 4, 8))[0], sinusoids(4, 8))


def test_concatenated_is_interleaved_after_a_permutation_of_dimensions() -> None:
    dim = 16
    permutation = torch.cat((torch.arange(0, dim, 2), torch.arange(1, dim, 2)))
    assert torch.equal(sinusoids(3000, dim, halves=True), sinusoids(3000, dim)[:, permutation])
    assert not torch.equal(sinusoids(3000, dim, halves=True), sinusoids(3000, dim))


def test_a_model_of_one_layout_is_one_of_the_other_once_its_input_is_permuted() -> None:
    dim = 16
    permutation = torch.cat((torch.arange(0, dim, 2), torch.arange(1, dim, 2)))
    torch.manual_seed(0)
    x, linear = torch.randn(2, 9, dim), torch.nn.Linear(dim, 3)
    expected = linear(input_position("sinusoidal", dim=dim, dropout=0.0)(x))
    layer = input_position("sinusoidal_concatenated", dim=dim, dropout=0.0)
    with torch.no_grad():
        linear.weight.copy_(linear.weight[:, permutation])
    torch.testing.assert_close(linear(layer(x[..., permutation])), expected)


@pytest.mark.parametrize("kind", ["none", "rotary", "relative"])
def test_without_positions_the_input_is_only_scaled(kind: str) -> None:
    layer = input_position(kind, dim=16, dropout=0.0)
    x = torch.randn(2, 5, 16)
    assert isinstance(layer, NoPosition) and torch.equal(layer(x, start=3), 4.0 * x)
