from __future__ import annotations

import pytest
import torch

from speechtx.attention.kernels import padding_bias
from speechtx.attention.multihead import SelfAttention, join_heads
from speechtx.attention.relu import attend_relu, relu_weights

MASK = torch.arange(9) < torch.tensor([9, 5]).unsqueeze(1)


def test_weights_are_the_papers_formula_and_masked_keys_have_none() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 3, 9, 4, dtype=torch.float64).unbind(0)
    weights = relu_weights(q, k, bias=padding_bias(MASK, dtype=torch.float64))
    for row, length in enumerate((9, 5)):
        for i in range(9):
            for j in range(length):
                expected = max(0.0, float(q[row, 1, i] @ k[row, 1, j]) / 2.0) / length
                assert weights[row, 1, i, j].item() == pytest.approx(expected, abs=1e-12)
    assert (weights[1, :, :, 5:] == 0).all() and (weights[1, :, :, :5] > 0).any()


def test_a_window_counts_the_keys_inside_it_and_a_finite_penalty_counts_all() -> None:
    q = k = torch.ones(1, 1, 6, 4)
    distance = (torch.arange(6)[:, None] - torch.arange(6)[None, :]).abs()
    window = torch.zeros(1, 1, 6, 6).masked_fill(distance > 1, float("-inf"))
    torch.testing.assert_close(relu_weights(q, k, bias=window)[0, 0, 0], torch.tensor([1.0, 1.0, 0, 0, 0, 0]))
    torch.testing.assert_close(relu_weights(q, k, bias=window)[0, 0, 2, 1:4], torch.full((3,), 2.0 / 3))
    penalty = torch.full((1, 1, 1, 6), -5.0)
    penalty[..., 0] = -0.5
    torch.testing.assert_close(relu_weights(q, k, bias=penalty)[0, 0, 3], torch.tensor([1.5 / 6, 0, 0, 0, 0, 0]))
    torch.testing.assert_close(relu_weights(q, k), torch.full((1, 1, 6, 6), 2.0 / 6))
    one = torch.zeros(1, 1, 6, 1)
    torch.testing.assert_close(relu_weights(q, k, bias=one), relu_weights(q, k))  # one value for all keys is not one key


def test_a_query_without_keys_gets_zeros_and_finite_gradients() -> None:
    q, k, v = (torch.randn(2, 3, 9, 4, requires_grad=True) for _ in range(3))
    mask = MASK.clone()
    mask[1] = False
    out = attend_relu(q, k, v, bias=padding_bias(mask))
    assert (out[1] == 0).all() and (out[0] != 0).any()
    out.sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in (q, k, v))


def test_gradients_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    bias = (-torch.rand(1, 2, 4, 4, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda *args: attend_relu(*args[:3], bias=args[3]), (q, k, v, bias))


def test_the_weights_we_draw_are_the_weights_the_layer_uses() -> None:
    torch.manual_seed(0)
    layer = SelfAttention(dim=16, num_heads=4, weighting="relu")
    x = torch.randn(2, 9, 16)
    bias = padding_bias(MASK)
    _, _, v = layer.project(x)
    torch.testing.assert_close(layer.out(join_heads(layer.weights(x, bias=bias) @ v)), layer(x, bias=bias), atol=1e-6, rtol=0)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_acts_in_training_only(training: bool) -> None:
    torch.manual_seed(0)
    layer = SelfAttention(dim=16, num_heads=4, dropout=0.5, weighting="relu").train(training)
    x = torch.randn(1, 9, 16)
    assert torch.equal(layer(x), layer(x)) is not training


def test_relu_weights_are_refused_where_they_are_not_implemented() -> None:
    with pytest.raises(ValueError, match="not causal"):
        SelfAttention(dim=16, num_heads=4, weighting="relu")(torch.randn(1, 9, 16), causal=True)
    with pytest.raises(ValueError, match="sigmoid"):
        SelfAttention(dim=16, num_heads=4, weighting="sigmoid")
