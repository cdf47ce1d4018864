from __future__ import annotations

import math

import torch

from speechtx.model.position import SinusoidalPosition, sinusoids


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
