from __future__ import annotations

import torch
from torch import nn

from speechtx.model.norm import FrameNorm, MaskedBatchNorm, make_norm

LENS = torch.tensor([12, 7, 1])
MASK = torch.arange(12) < LENS.unsqueeze(1)


def make_layer(dim: int = 6) -> MaskedBatchNorm:
    torch.manual_seed(0)
    layer = MaskedBatchNorm(dim=dim)
    with torch.no_grad():
        layer.weight.normal_()
        layer.bias.normal_()
    return layer


def test_the_layer_is_pytorchs_over_the_valid_frames_in_training_and_after_it() -> None:
    layer, twin = make_layer(), nn.BatchNorm1d(6)
    twin.load_state_dict({**layer.state_dict(), "num_batches_tracked": torch.tensor(0)})
    for _ in range(5):
        x = torch.randn(3, 12, 6) * 3 + 2
        x[~MASK] = 1e3
        torch.testing.assert_close(layer(x, MASK)[MASK], twin(x[MASK]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.running_mean, twin.running_mean)
    torch.testing.assert_close(layer.running_var, twin.running_var)
    torch.testing.assert_close(layer.eval()(x, MASK)[MASK], twin.eval()(x[MASK]), atol=1e-5, rtol=1e-5)


def test_gradients_are_pytorchs_and_padding_gets_none() -> None:
    layer, twin = make_layer().double(), nn.BatchNorm1d(6).double()
    twin.load_state_dict({**layer.state_dict(), "num_batches_tracked": torch.tensor(0)})
    x = torch.randn(3, 12, 6, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(20, 6, dtype=torch.float64)
    (ours,) = torch.autograd.grad(layer(x, MASK)[MASK], x, grad)
    (plain,) = torch.autograd.grad(twin(x[MASK]), x, grad)
    torch.testing.assert_close(ours, plain, atol=1e-10, rtol=0)
    assert (ours[~MASK] == 0).all()


def test_more_padding_changes_neither_the_output_nor_the_statistics() -> None:
    short, long = make_layer(), make_layer()
    x = torch.randn(3, 12, 6)
    wider = torch.cat((x, torch.full((3, 30, 6), 50.0)), dim=1)
    mask = torch.arange(42) < LENS.unsqueeze(1)
    torch.testing.assert_close(long(wider, mask)[:, :12][MASK], short(x, MASK)[MASK], atol=1e-6, rtol=0)
    torch.testing.assert_close(long.running_mean, short.running_mean, atol=1e-6, rtol=0)
    torch.testing.assert_close(long.running_var, short.running_var, atol=1e-6, rtol=0)


def test_evaluation_uses_and_keeps_the_running_statistics() -> None:
    layer = make_layer()
    layer(torch.randn(3, 12, 6) + 4, MASK)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.eval()
    x = torch.randn(3, 12, 6)
    assert torch.equal(layer(x, MASK), layer(x, MASK))
    torch.testing.assert_close(layer(x[:1, :3], MASK[:1, :3]), layer(x, MASK)[:1, :3])
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_a_batch_of_nan_or_of_nothing_does_not_spoil_the_running_statistics() -> None:
    layer = make_layer()
    layer(torch.randn(3, 12, 6), MASK)
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    broken = torch.randn(3, 12, 6)
    broken[0, 3, 2] = float("nan")
    layer(broken, MASK)
    nothing = layer(torch.randn(3, 12, 6), torch.zeros(3, 12, dtype=torch.bool))
    single = layer(torch.randn(1, 12, 6), MASK[2:])
    assert torch.isfinite(nothing).all() and torch.isfinite(single).all()
    assert torch.equal(layer.running_mean, mean) and torch.equal(layer.running_var, var)


def test_every_buffer_is_a_float_and_averages_like_a_weight() -> None:
    state = make_layer().state_dict()
    assert list(state) == ["weight", "bias", "running_mean", "running_var"]
    assert all(value.is_floating_point() for value in state.values())


def test_layer_norm_is_pytorchs_with_the_same_keys() -> None:
    torch.manual_seed(0)
    layer, twin = make_norm("layer", 6), nn.LayerNorm(6)
    assert isinstance(layer, FrameNorm) and isinstance(make_norm("batch", 6), MaskedBatchNorm)
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(3, 12, 6)
    assert torch.equal(layer(x, MASK), twin(x))
