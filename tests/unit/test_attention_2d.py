from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from speechtx.model.attention_2d import Attention2d
from speechtx.model.subsampling import Subsampling, subsampled_length


def make_module() -> Attention2d:
    torch.manual_seed(0)
    return Attention2d(maps=4, channels=3).double()


def plain(module: Attention2d, x: Tensor) -> Tensor:
    """One utterance (1, n, S, F) without padding, head by head."""
    q, k, v = F.conv2d(x, module.qkv.weight, module.qkv.bias, padding=1)[0].chunk(3)
    in_time = [torch.softmax(q[c] @ k[c].T / q.shape[2] ** 0.5, -1) @ v[c] for c in range(3)]
    in_frequency = [(torch.softmax(q[c].T @ k[c] / q.shape[1] ** 0.5, -1) @ v[c].T).T for c in range(3)]
    return x + F.conv2d(torch.stack(in_time + in_frequency)[None], module.out.weight, module.out.bias, padding=1)


@pytest.mark.parametrize(("frames", "bins"), [(11, 5), (3, 8), (1, 1)])
def test_the_module_is_attention_along_both_axes_head_by_head(frames: int, bins: int) -> None:
    module = make_module()
    x = torch.randn(1, 4, frames, bins, dtype=torch.float64)
    mask = torch.ones(1, frames, dtype=torch.bool)
    torch.testing.assert_close(module(x, mask), plain(module, x), atol=1e-12, rtol=0)


def test_what_lies_behind_an_utterance_reaches_it_neither_in_time_nor_in_frequency() -> None:
    module = make_module()
    x = torch.randn(2, 4, 11, 5, dtype=torch.float64) * 10
    mask = torch.arange(11) < torch.tensor([11, 6]).unsqueeze(1)
    out = module(x, mask)
    torch.testing.assert_close(out[1, :, :6], plain(module, x[1:, :, :6])[0], atol=1e-10, rtol=0)
    torch.testing.assert_close(out[0], plain(module, x[:1])[0], atol=1e-10, rtol=0)


def test_both_axes_matter() -> None:
    module = make_module()
    x = torch.randn(1, 4, 30, 20, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(module(x, torch.ones(1, 30, dtype=torch.bool))[0, :, 2, 3].sum(), x)
    assert gradient[0, :, 25, 3].abs().max() > 0 and gradient[0, :, 2, 15].abs().max() > 0


def test_the_front_end_with_modules_does_not_depend_on_batch_or_padding() -> None:
    torch.manual_seed(0)
    layer = Subsampling(num_mel_bins=20, channels=4, dim=8, attention_2d=2, attention_2d_channels=3)
    lens = torch.tensor([80, 47, 5])
    feats = torch.randn(3, 100, 20) * 10
    out = layer(feats, lens)
    assert torch.isfinite(out).all()
    for row, length in enumerate(lens[:2].tolist()):
        alone = layer(feats[row : row + 1, :length])
        torch.testing.assert_close(out[row, : subsampled_length(length, 4)], alone[0], atol=1e-5, rtol=0)
    out[2].sum().backward()  # an utterance too short for a frame
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


def test_a_front_end_without_modules_has_the_weights_and_random_numbers_it_always_had() -> None:
    torch.manual_seed(0)
    plain = Subsampling(num_mel_bins=20, channels=4, dim=8)
    after = torch.rand(1)
    torch.manual_seed(0)
    torch.nn.Conv2d(1, 4, 3), torch.nn.Conv2d(4, 4, 3)
    linear = torch.nn.Linear(4 * subsampled_length(20, 4), 8)
    assert torch.equal(torch.rand(1), after) and torch.equal(linear.weight, plain.linear.weight)
    assert list(plain.state_dict()) == [f"{part}.{kind}" for part in ("conv1", "conv2", "linear") for kind in ("weight", "bias")]
