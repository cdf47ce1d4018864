from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from speechtx.model.subsampling import MIN_FRAMES, SUBSAMPLING_FACTOR, Subsampling, subsampled_length


@given(st.integers(0, 10000))
def test_the_length_of_an_int_a_tensor_and_the_convolutions_agree(length: int) -> None:
    expected = max(((length - 3) // 2 + 1 - 3) // 2 + 1, 0)
    assert subsampled_length(length) == expected
    assert subsampled_length(torch.tensor([length])).tolist() == [expected]


@pytest.mark.parametrize("frames", [1, 6, 7, 10, 11, 50])
def test_the_layer_returns_as_many_frames_as_promised(frames: int) -> None:
    layer = Subsampling(num_mel_bins=80, channels=4, dim=8)
    assert layer(torch.randn(2, frames, 80)).shape == (2, max(subsampled_length(frames), 1), 8)
    assert subsampled_length(MIN_FRAMES) == 1 and subsampled_length(MIN_FRAMES - 1) == 0


def test_a_frame_depends_on_its_own_seven_feature_frames_only() -> None:
    layer = Subsampling(num_mel_bins=20, channels=4, dim=8)
    feats = torch.randn(1, 40, 20, requires_grad=True)
    out = layer(feats)
    for frame in range(out.shape[1]):
        (gradient,) = torch.autograd.grad(out[0, frame].sum(), feats, retain_graph=True)
        seen = gradient[0].abs().sum(dim=-1).nonzero().flatten().tolist()
        first = SUBSAMPLING_FACTOR * frame
        assert set(seen) <= set(range(first, first + MIN_FRAMES)) and first in seen


def test_channels_last_weights_compute_the_plain_convolutions() -> None:
    layer = Subsampling(num_mel_bins=20, channels=4, dim=8).double()
    feats = torch.randn(2, 40, 20, dtype=torch.float64)
    x = F.relu(F.conv2d(feats[:, None], layer.conv1.weight.contiguous(), layer.conv1.bias, stride=2))
    x = F.relu(F.conv2d(x, layer.conv2.weight.contiguous(), layer.conv2.bias, stride=2))
    rows = [x[:, :, s].transpose(1, 2).flatten(1) for s in range(x.shape[2])]
    torch.testing.assert_close(layer(feats), F.linear(torch.stack(rows, 1), layer.linear.weight, layer.linear.bias))


def test_the_residual_stream_starts_near_unit_variance() -> None:
    torch.manual_seed(0)
    for channels, dim in ((32, 144), (64, 144), (64, 256)):
        out = Subsampling(num_mel_bins=80, channels=channels, dim=dim)(torch.randn(4, 100, 80)) * dim**0.5
        assert 0.3 < out.std().item() < 3.0, (channels, dim)


def test_too_few_mel_bins_are_refused_with_the_least_number() -> None:
    with pytest.raises(ValueError, match=r"num_mel_bins 6.*7 is the least"):
        Subsampling(num_mel_bins=6, channels=4, dim=8)
