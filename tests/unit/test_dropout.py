"""Dropout: the fast CPU path must be the same distribution as PyTorch's, seeded the same way."""

import pytest
import torch

from speechtx.model.dropout import LEVELS, Dropout, _KeepAbove, dropout_cpu, dropout_plain


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_drops_the_asked_share_and_keeps_the_mean(p: float) -> None:
    torch.manual_seed(0)
    y = dropout_cpu(torch.ones(1_000_003), p)
    assert (y == 0).float().mean().item() == pytest.approx(p, abs=3e-3)
    assert y.mean().item() == pytest.approx(1.0, abs=1e-2)
    assert y.unique().numel() == 2


def test_every_position_of_a_random_word_is_dropped_equally_often() -> None:
    torch.manual_seed(0)
    y = dropout_cpu(torch.ones(400_000, 4), 0.25)
    assert ((y == 0).float().mean(0) - 0.25).abs().max() < 4e-3


def test_same_seed_same_mask_and_another_seed_another() -> None:
    x = torch.randn(7, 33)
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        masks.append(dropout_cpu(x, 0.3))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_gradient_flows_through_kept_values_only() -> None:
    x = torch.randn(50, 3, requires_grad=True)
    y = dropout_cpu(x, 0.5)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad == 0, y == 0)
    assert torch.allclose(x.grad[y != 0], torch.tensor(2.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dropped", [0, 1, 6554, LEVELS // 2, LEVELS - 1])
def test_the_fast_way_is_the_definition_to_the_bit(dtype: torch.dtype, dropped: int) -> None:
    lowest, highest = -LEVELS // 2, LEVELS // 2 - 1
    levels = torch.arange(lowest, highest + 1, dtype=torch.int32).to(torch.int16).view(256, 256)  # each once
    x = torch.randn(256, 256, dtype=dtype).t().requires_grad_()
    grad = torch.randn(256, 256, dtype=dtype)
    grad[0, 0] = torch.nan
    fast, plain = _KeepAbove.apply(x, levels, dropped), dropout_plain(x, levels, dropped)
    assert (fast == 0).sum() == dropped
    assert torch.equal(fast, plain)
    ours, theirs = (torch.autograd.grad(y, x, grad)[0] for y in (fast, plain))
    assert torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0))


def test_two_byte_types_drop_as_often_as_asked() -> None:
    torch.manual_seed(0)
    y = dropout_cpu(torch.ones(1_000_000, dtype=torch.bfloat16), 0.1)
    assert y.dtype == torch.bfloat16
    assert (y == 0).float().mean().item() == pytest.approx(0.1, abs=1e-3)


def test_evaluation_changes_nothing() -> None:
    x = torch.randn(5, 5)
    assert Dropout(0.5).eval()(x) is x
