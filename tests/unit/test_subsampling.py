from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from speechtx.config.errors import ConfigError
from speechtx.config.load import parse_config
from speechtx.config.schema import ModelConfig, SubsamplingConfig
from speechtx.model import convolution
from speechtx.model.recognizer import Recognizer
from speechtx.model.subsampling import Subsampling, TimeSubsampling, make_subsampling, min_frames, subsampled_length

FACTORS = (4, 6, 8)
TYPES = ("conv2d", "separable", "conv1d")


def front_end(kind: str, factor: int, *, channels: int = 4, dim: int = 8, bins: int = 20) -> Subsampling | TimeSubsampling:
    config = SubsamplingConfig(type=kind, factor=factor, channels=channels)
    return make_subsampling(config, num_mel_bins=bins, dim=dim)


@given(st.integers(0, 10000), st.sampled_from(FACTORS))
def test_the_length_of_an_int_and_of_a_tensor_agree(length: int, factor: int) -> None:
    assert subsampled_length(torch.tensor([length]), factor).tolist() == [subsampled_length(length, factor)]


@given(st.integers(0, 10000))
def test_the_lengths_of_factor_four_are_those_of_earlier_checkpoints(length: int) -> None:
    assert subsampled_length(length, 4) == max(((length - 1) // 2 - 1) // 2, 0)


@pytest.mark.parametrize("factor", FACTORS)
def test_the_fewest_frames_leave_one_and_every_factor_frames_one_more(factor: int) -> None:
    least = min_frames(factor)
    assert [subsampled_length(n, factor) for n in (least - 1, least, least + factor - 1, least + factor)] == [0, 1, 1, 2]


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("factor", FACTORS)
def test_the_layer_returns_as_many_frames_as_promised(kind: str, factor: int) -> None:
    layer = front_end(kind, factor)
    for frames in (1, 6, 7, 10, 11, 14, 15, 50):
        assert layer(torch.randn(2, frames, 20)).shape == (2, max(subsampled_length(frames, factor), 1), 8)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("factor", FACTORS)
def test_a_frame_depends_on_its_own_few_feature_frames_only(kind: str, factor: int) -> None:
    torch.manual_seed(0)
    layer = front_end(kind, factor, channels=16)
    feats = torch.randn(1, 60, 20, requires_grad=True)
    out = layer(feats)
    for frame in range(out.shape[1]):
        (gradient,) = torch.autograd.grad(out[0, frame].sum(), feats, retain_graph=True)
        seen = gradient[0].abs().sum(dim=-1).nonzero().flatten().tolist()
        first = factor * frame
        assert set(seen) <= set(range(first, first + min_frames(factor))) and first in seen


def test_channels_last_weights_compute_the_plain_convolutions() -> None:
    layer = Subsampling(num_mel_bins=20, channels=4, dim=8).double()
    feats = torch.randn(2, 40, 20, dtype=torch.float64)
    x = F.relu(F.conv2d(feats[:, None], layer.conv1.weight.contiguous(), layer.conv1.bias, stride=2))
    x = F.relu(F.conv2d(x, layer.conv2.weight.contiguous(), layer.conv2.bias, stride=2))
    rows = [x[:, :, s].transpose(1, 2).flatten(1) for s in range(x.shape[2])]
    torch.testing.assert_close(layer(feats), F.linear(torch.stack(rows, 1), layer.linear.weight, layer.linear.bias))


def test_a_separable_convolution_is_the_full_one_whose_kernel_is_the_product_of_its_parts() -> None:
    layer = front_end("separable", 4).double()
    plain = front_end("conv2d", 4).double()
    plain.load_state_dict({**{k: v for k, v in layer.state_dict().items() if "mix" not in k and "conv2" not in k}}, strict=False)
    (mix,) = layer.mix
    with torch.no_grad():
        plain.conv2.weight.copy_(torch.einsum("oc,cij->ocij", mix.weight, layer.conv2.weight[:, 0]))
        plain.conv2.bias.copy_(mix.weight @ layer.conv2.bias + mix.bias)
    feats = torch.randn(2, 40, 20, dtype=torch.float64)
    torch.testing.assert_close(layer(feats), plain(feats))


def test_a_convolution_over_time_is_a_linear_layer_over_stacked_frames() -> None:
    layer = front_end("conv1d", 6).double()
    feats = x = torch.randn(2, 40, 20, dtype=torch.float64)
    for conv, (width, stride) in zip(layer.convs, ((3, 2), (5, 3)), strict=True):
        x = F.relu(F.linear(x.unfold(1, width, stride).flatten(2), conv.weight.flatten(1), conv.bias))
    torch.testing.assert_close(layer(feats), layer.linear(x))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("factor", FACTORS)
def test_the_residual_stream_starts_near_unit_variance(kind: str, factor: int) -> None:
    torch.manual_seed(0)
    for channels, dim in ((32, 144), (64, 144), (64, 256)):
        layer = front_end(kind, factor, channels=channels, dim=dim, bins=80)
        out = layer(torch.randn(4, 100, 80)) * dim**0.5
        assert 0.3 < out.std().item() < 3.0, (kind, factor, channels, dim)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("factor", FACTORS)
def test_an_utterance_encodes_the_same_alone_and_padded_with_every_front_end(kind: str, factor: int) -> None:
    torch.manual_seed(0)
    text = f"""\
encoder: {{layers: 1, dim: 16, heads: 2, ff_dim: 32, subsampling: {{type: {kind}, factor: {factor}, channels: 4}}}}
decoder: {{layers: 1, heads: 2, ff_dim: 32}}
attention_penalty: {{encoder_self: {{shape: window, unit: ms, window: {80 * factor}}}}}
"""
    model = Recognizer(config=parse_config(text, ModelConfig), num_mel_bins=20, vocab_size=7).eval()
    feats = torch.randn(2, 90, 20)
    both, lens = model.encode(feats, torch.tensor([90, 61]))
    alone, alone_lens = model.encode(feats[1:, :61], torch.tensor([61]))
    assert lens.tolist() == [subsampled_length(90, factor), subsampled_length(61, factor)] and alone_lens[0] == lens[1]
    torch.testing.assert_close(both[1, : lens[1]], alone[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("factor", "least"), [(4, 7), (6, 11), (8, 15)])
def test_too_few_mel_bins_are_refused_with_the_least_number(factor: int, least: int) -> None:
    with pytest.raises(ConfigError, match=rf"num_mel_bins {least - 1}.*{least} is the least"):
        Subsampling(num_mel_bins=least - 1, channels=4, dim=8, factor=factor)


def test_maps_that_are_not_there_cannot_be_attended_to() -> None:
    with pytest.raises(ConfigError, match="attention_2d needs maps of time and frequency"):
        parse_config("{type: conv1d, attention_2d: {modules: 1}}", SubsamplingConfig)


def test_every_convolution_keeps_channels_innermost_so_that_none_copies_what_the_one_before_made() -> None:
    layouts = []
    front_end = Subsampling(num_mel_bins=20, channels=4, dim=8)
    for conv in front_end.convolutions():
        conv.register_forward_hook(lambda _, __, made: layouts.append(made.is_contiguous(memory_format=torch.channels_last)))
    front_end(torch.randn(2, 30, 20))
    assert layouts == [True, True]


@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 5),
    size=st.tuples(st.integers(5, 20), st.integers(5, 12)),
    width_stride=st.sampled_from([(3, 2), (5, 3)]),
    floats=st.sampled_from([1, 300, 2**21]),
    seed=st.integers(0, 100),
)
def test_the_gradient_of_a_convolutions_weight_by_matrix_products_is_pytorchs(
    batch: int, channels: int, size: tuple[int, int], width_stride: tuple[int, int], floats: int, seed: int
) -> None:
    torch.manual_seed(seed)
    width, stride = width_stride
    conv = torch.nn.Conv2d(channels, channels + 1, width, stride).double()
    x = torch.randn(batch, channels, *size, dtype=torch.float64)
    grad = torch.randn_like(conv(x))
    (expected,) = torch.autograd.grad(conv(x), conv.weight, grad)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "WINDOW_FLOATS", floats)
        assert torch.allclose(convolution.gradient_of_weight(x, grad, conv.weight, (stride, stride)), expected)


@pytest.mark.parametrize("factor", FACTORS)
def test_many_channels_learn_as_few_do(factor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    layer = front_end("conv2d", factor, channels=6).double()
    feats = torch.randn(3, 40, 20, dtype=torch.float64)
    gradients, calls, by_products = [], [], convolution.gradient_of_weight
    monkeypatch.setattr(convolution, "gradient_of_weight", lambda *args: calls.append(len(gradients)) or by_products(*args))
    for channels in (97, 6):  # plain, by matrix products
        monkeypatch.setattr(convolution, "MANY_CHANNELS", channels)
        layer.zero_grad()
        layer(feats).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in layer.parameters()])
    assert calls == [1] * (len(layer.convolutions()) - 1), "in the second round, for all but the first, which has one channel"
    assert all(torch.allclose(plain, fast) for plain, fast in zip(*gradients, strict=True))
    with torch.no_grad():
        before = layer(feats)
    assert torch.equal(before, layer(feats).detach())
