from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from speechtx.attention.kernels import attend, attend_eager
from speechtx.attention.site import build_bias
from speechtx.config.penalty import PenaltyConfig


def run(kernel, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, **kwargs) -> list[Tensor]:
    """Output and the gradients of q, k and v."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = kernel(*leaves, **kwargs)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def inputs(batch: int, queries: int, keys: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = (queries, keys, keys, queries)
    return [torch.randn(batch, 4, size, 8, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=4),
    st.sampled_from(["none", "log", "window"]),
    st.integers(0, 1000),
)
def test_the_fused_kernel_equals_the_plain_one_for_any_lengths(lens: list[int], shape: str, seed: int) -> None:
    length = max(*lens, 1)
    config = PenaltyConfig(shape=shape, window=2 if shape == "window" else None)
    mask = torch.arange(length) < torch.tensor(lens).unsqueeze(1)
    bias = build_bias(config, length=length, num_heads=4, dtype=torch.float64, mask=mask)
    arguments = inputs(len(lens), length, length, torch.float64, seed)
    for fast, plain in zip(run(attend, *arguments, bias=bias), run(attend_eager, *arguments, bias=bias), strict=True):
        torch.testing.assert_close(fast, plain, atol=1e-10, rtol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 6e-2)])
def test_the_fused_kernel_equals_the_plain_one_in_low_precision(dtype: torch.dtype, tolerance: float) -> None:
    bias = build_bias(PenaltyConfig(shape="linear", scale="alibi"), length=33, num_heads=4, dtype=dtype)
    arguments = inputs(2, 33, 33, dtype)
    for fast, plain in zip(run(attend, *arguments, bias=bias), run(attend_eager, *arguments, bias=bias), strict=True):
        assert fast.dtype == dtype
        torch.testing.assert_close(fast, plain, atol=tolerance, rtol=0)


def test_causal_attention_equals_the_plain_one_and_sees_no_future() -> None:
    q, k, v, grad = inputs(2, 7, 7, torch.float64)
    for fast, plain in zip(run(attend, q, k, v, grad, causal=True), run(attend_eager, q, k, v, grad, causal=True), strict=True):
        torch.testing.assert_close(fast, plain, atol=1e-10, rtol=0)
    changed = v.clone()
    changed[:, :, 4:] += 1
    assert torch.equal(attend(q, k, v, causal=True)[:, :, :4], attend(q, k, changed, causal=True)[:, :, :4])
    assert not torch.equal(attend(q, k, v, causal=True)[:, :, 4:], attend(q, k, changed, causal=True)[:, :, 4:])


@pytest.mark.parametrize("kernel", [attend, attend_eager])
def test_a_query_without_any_key_gets_zero_and_no_nan_gradient(kernel) -> None:
    bias = torch.zeros(2, 1, 1, 5)
    bias[1] = float("-inf")
    out, *grads = run(kernel, *inputs(2, 5, 5, torch.float32), bias=bias)
    assert (out[1] == 0).all() and (out[0] != 0).any()
    for gradient in grads:
        assert torch.isfinite(gradient).all() and (gradient[1] == 0).all()


@pytest.mark.filterwarnings("ignore::UserWarning")  # PyTorch explains why it refuses the 3-D bias
@pytest.mark.parametrize("shape", ["none", "log", "linear"])
def test_every_bias_we_build_keeps_pytorchs_fused_cpu_kernel(shape: str) -> None:
    config = PenaltyConfig(shape=shape, scale="alibi" if shape == "linear" else 1.0)
    mask = torch.arange(9) < torch.tensor([9, 4]).unsqueeze(1)
    q, k, v, _ = inputs(2, 9, 9, torch.float32)
    bias = build_bias(config, length=9, num_heads=4, mask=mask)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # raises where that kernel cannot be used
        attend(q.requires_grad_(), k, v, bias=bias)
        with pytest.raises(RuntimeError):
            attend(q, k, v, bias=bias[:, 0])  # the 3-D bias that would leave it


@pytest.mark.parametrize("kernel", [attend, attend_eager])
def test_dropout_drops_whole_weights_and_keeps_their_mean(kernel) -> None:
    torch.manual_seed(0)
    q = torch.zeros(1, 1, 1000, 8)
    k, v = torch.zeros(1, 1, 10, 8), torch.eye(10)[None, None, :, :8].contiguous()
    out = kernel(q, k, v, dropout=0.3)
    assert (out == 0).float().mean().item() == pytest.approx(0.3, abs=0.05)
    assert out.mean().item() == pytest.approx(0.1, abs=0.01)
    assert torch.allclose(out[out != 0], torch.tensor(0.1 / 0.7))
