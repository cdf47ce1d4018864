"""Dropout: the fast CPU path must be the same distribution as PyTorch's, seeded the same way."""

import pytest
import torch

from speechtx.model.dropout import Dropout, dropout_cpu


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


def test_evaluation_changes_nothing() -> None:
    x = torch.randn(5, 5)
    assert Dropout(0.5).eval()(x) is x
