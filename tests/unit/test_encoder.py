from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechtx.attention.site import AttentionPenalty
from speechtx.config.penalty import PenaltyConfig
from speechtx.config.schema import EncoderConfig, SubsamplingConfig
from speechtx.model.convolution import ConvolutionModule, DepthwiseConv, depthwise_plain
from speechtx.model.encoder import Encoder
from speechtx.model.subsampling import subsampled_length

KINDS = ["transformer", "conformer"]
PENALTIES = [PenaltyConfig(), PenaltyConfig(shape="log"), PenaltyConfig(shape="window", window=2)]


def make_encoder(kind: str, penalty: PenaltyConfig | None = None, seed: int = 0) -> Encoder:
    torch.manual_seed(seed)
    config = EncoderConfig(
        type=kind, layers=2, dim=16, heads=4, ff_dim=32, conv_kernel=5, subsampling=SubsamplingConfig(channels=4)
    )
    return Encoder(config=config, penalty=penalty or PenaltyConfig(), num_mel_bins=20)


@settings(deadline=None, max_examples=15)
@given(
    st.sampled_from(KINDS),
    st.sampled_from(PENALTIES),
    st.lists(st.integers(7, 90), min_size=1, max_size=4),
    st.integers(0, 30),
)
def test_an_utterance_does_not_depend_on_its_batch_or_its_padding(
    kind: str, penalty: PenaltyConfig, lens: list[int], extra: int
) -> None:
    encoder = make_encoder(kind, penalty).eval()
    feats = torch.randn(len(lens), max(lens) + extra, 20) * 10  # what lies in the padding is anything but zero
    enc_out, enc_lens = encoder(feats, torch.tensor(lens))
    assert enc_lens.tolist() == [subsampled_length(n, 4) for n in lens]
    for row, length in enumerate(lens):
        alone, _ = encoder(feats[row : row + 1, :length], torch.tensor([length]))
        torch.testing.assert_close(enc_out[row, : enc_lens[row]], alone[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_gets_no_gradient(kind: str) -> None:
    encoder = make_encoder(kind, PenaltyConfig(shape="log"))
    feats = torch.randn(2, 60, 20, requires_grad=True)
    enc_out, enc_lens = encoder(feats, torch.tensor([60, 31]))
    enc_out[1, : enc_lens[1]].sum().backward()
    assert (feats.grad[1, 31:] == 0).all() and (feats.grad[0] == 0).all() and (feats.grad[1, :31] != 0).any()


@pytest.mark.parametrize("kind", KINDS)
def test_an_utterance_too_short_for_one_frame_harms_nobody(kind: str) -> None:
    encoder = make_encoder(kind)
    feats = torch.randn(2, 40, 20, requires_grad=True)
    enc_out, enc_lens = encoder(feats, torch.tensor([40, 3]))
    assert enc_lens.tolist() == [9, 0] and torch.isfinite(enc_out).all()
    enc_out.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in encoder.parameters())
    assert encoder(feats[:, :3], torch.tensor([3, 3]))[0].shape == (2, 1, 16)


@pytest.mark.parametrize("kind", KINDS)
def test_the_penalty_reaches_the_encoder_and_none_equals_scale_zero(kind: str) -> None:
    feats, lens = torch.randn(2, 80, 20), torch.tensor([80, 50])
    none, zero, log = (
        make_encoder(kind, penalty).eval()(feats, lens)[0]
        for penalty in (PenaltyConfig(), PenaltyConfig(shape="log", scale=0.0), PenaltyConfig(shape="log"))
    )
    assert torch.equal(none, zero) and not torch.allclose(none, log, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_bias_is_built_once_a_batch_not_once_a_layer(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    build = AttentionPenalty.by_offset
    monkeypatch.setattr(AttentionPenalty, "by_offset", lambda *args, **kwargs: calls.append(1) or build(*args, **kwargs))
    make_encoder(kind, PenaltyConfig(shape="log"))(torch.randn(2, 40, 20), torch.tensor([40, 30]))
    assert len(calls) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_autocast_stays_near_float32(kind: str) -> None:
    encoder = make_encoder(kind, PenaltyConfig(shape="linear", scale="alibi")).eval()
    feats, lens = torch.randn(2, 60, 20), torch.tensor([60, 45])
    exact, _ = encoder(feats, lens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded, _ = encoder(feats, lens)
    assert (rounded[0].float() - exact[0]).abs().mean() < 0.05


@pytest.mark.parametrize("kernel", [1, 3, 15])
@pytest.mark.parametrize("length", [1, 4, 30])
def test_channels_innermost_give_the_plain_depthwise_convolution(kernel: int, length: int) -> None:
    layer = DepthwiseConv(dim=6, kernel=kernel).double()
    with torch.no_grad():
        layer.bias.normal_()
    x = torch.randn(3, length, 6, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(3, length, 6, dtype=torch.float64)
    arguments = (x, layer.weight, layer.bias)
    out = layer(x)
    assert out.is_contiguous(), "a layer behind it would copy"
    torch.testing.assert_close(out, depthwise_plain(*arguments), atol=1e-12, rtol=0)
    for ours, plain in zip(
        torch.autograd.grad(out, arguments, grad), torch.autograd.grad(depthwise_plain(*arguments), arguments, grad), strict=True
    ):
        torch.testing.assert_close(ours, plain, atol=1e-12, rtol=0)


def test_the_convolution_sees_zeros_where_an_utterance_ends() -> None:
    module = ConvolutionModule(dim=8, kernel=5)
    x = torch.randn(1, 12, 8)
    mask = torch.arange(12)[None] < 7
    torch.testing.assert_close(module(x, mask=mask)[:, :7], module(x[:, :7], mask=mask[:, :7]), atol=1e-6, rtol=0)
    assert not torch.allclose(module(x, mask=torch.ones(1, 12, dtype=torch.bool))[:, :7], module(x, mask=mask)[:, :7], atol=1e-3)


def test_an_even_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="kernel 4 must be odd"):
        DepthwiseConv(dim=8, kernel=4)


@pytest.mark.parametrize(
    "penalty",
    [
        PenaltyConfig(shape="log"),
        PenaltyConfig(shape="gaussian", sigma=3.0, learnable="head"),
    ],
    ids=["log", "learned"],
)
def test_a_compiled_encoder_computes_the_same_at_every_length(penalty: PenaltyConfig) -> None:
    encoder = make_encoder("transformer", penalty).eval()
    compiled = torch.compile(encoder, backend="aot_eager")
    for frames in (80, 121):
        feats, lens = torch.randn(2, frames, 20), torch.tensor([frames, 50])
        torch.testing.assert_close(compiled(feats, lens)[0], encoder(feats, lens)[0])
