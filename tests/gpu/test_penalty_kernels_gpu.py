"""The penalty's own kernels on a CUDA device give what the plain one gives there in float64."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from speechtx.attention.flash import SlopeBias
from speechtx.attention.flex import FlexBias
from speechtx.attention.fold import CausalLinearFold, GaussianFold, TwoPassLinear
from speechtx.attention.kernels import attend_eager
from speechtx.config.errors import ConfigError

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

HEADS, DIM = 4, 64
LENS = [300, 170, 0]  # 0: every key of an utterance is masked
EXACT = [2.0**-4, 2.0**-7, 2.0**-10, 2.0**-13]
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 4e-2, torch.float16: 1e-2}


def inputs(dtype: torch.dtype, length: int = LENS[0]) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(len(LENS), HEADS, length, DIM).to("cuda", dtype) for _ in range(4)]


def padding(length: int = LENS[0]) -> Tensor:
    return (torch.arange(length) < torch.tensor(LENS).unsqueeze(1)).cuda()


def assert_parity(bias, arguments: list[Tensor], dense: Tensor) -> None:
    """Output and the gradients of q, k and v, each relative to its largest value."""
    results = []
    for kernel, cast in ((bias.attend, lambda x: x), (lambda *a: attend_eager(*a, bias=dense.double()), Tensor.double)):
        q, k, v = (cast(x).detach().clone().requires_grad_() for x in arguments[:3])
        out = kernel(q, k, v)
        results.append([out.detach(), *torch.autograd.grad(out, (q, k, v), cast(arguments[3]))])
    tolerance = TOLERANCE[arguments[0].dtype]
    for name, fast, plain in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        assert fast.isfinite().all(), name
        torch.testing.assert_close(fast.double(), plain, atol=tolerance * max(plain.abs().max().item(), 1.0), rtol=0, msg=name)
    assert (results[0][0][results[1][0] == 0] == 0).all()  # queries without any key


def gaussian(strength: list[float], *, padded: bool = True) -> GaussianFold:
    position = torch.arange(LENS[0], dtype=torch.float32, device="cuda").unsqueeze(0)
    return GaussianFold(position, position, torch.tensor(strength, device="cuda"), padding() if padded else None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("strength", [EXACT, [1 / 18, 1 / 200, 0.0, 5e-5]])
def test_the_folded_gaussian(dtype: torch.dtype, strength: list[float]) -> None:
    bias = gaussian(strength)
    assert_parity(bias, inputs(dtype), bias.dense())


def test_the_fold_runs_in_the_flash_kernel_with_padding_and_dropout() -> None:
    arguments = [x.requires_grad_() for x in inputs(torch.bfloat16)[:3]]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # raises where that kernel cannot be used
        gaussian(EXACT).attend(*arguments, dropout=0.1).sum().backward()


def test_the_fold_is_precise_under_tf32() -> None:
    bias, arguments = gaussian(EXACT), inputs(torch.float32)[:3]
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        out = bias.attend(*arguments)
    finally:
        torch.set_float32_matmul_precision(before)
    plain = attend_eager(*(x.double() for x in arguments), bias=bias.dense().double())
    torch.testing.assert_close(out.double(), plain, atol=1e-2, rtol=0)  # TF32's own rounding of q.k


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("padded", [True, False])
def test_the_causal_fold_and_the_two_passes(dtype: torch.dtype, padded: bool) -> None:
    slopes, mask = torch.tensor([0.25, 0.0625, 0.0, 0.3], device="cuda"), padding() if padded else None
    causal, both = CausalLinearFold(slopes, LENS[0], mask), TwoPassLinear(slopes, mask)
    assert_parity(causal, inputs(dtype), causal.dense())
    assert_parity(both, inputs(dtype), both.dense(LENS[0]))


def test_two_passes_refuse_float32() -> None:
    with pytest.raises(ConfigError, match="bfloat16 or float16"):
        TwoPassLinear(torch.ones(1, device="cuda")).attend(*inputs(torch.float32)[:3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("window", "causal", "padded"), [(None, False, True), (40, False, True), (None, True, False), (40, True, True)]
)
def test_flex_attention(dtype: torch.dtype, window: int | None, causal: bool, padded: bool) -> None:
    table = -torch.rand(HEADS, 2 * LENS[0] - 1, device="cuda") * 5
    bias = FlexBias(table, window, padding() if padded else None, causal)
    assert_parity(bias, inputs(dtype), bias.dense())


@pytest.mark.parametrize("rows", [1, HEADS])
def test_flex_attention_learns_the_penalty(rows: int) -> None:
    q, k, v, grad = inputs(torch.float32)
    table = (-torch.rand(rows, 2 * LENS[0] - 1, device="cuda") * 5).requires_grad_()
    bias = FlexBias(table, 40, padding())
    fast = torch.autograd.grad(bias.attend(q, k, v), table, grad)[0]
    plain = torch.autograd.grad(attend_eager(q, k, v, bias=bias.dense()), table, grad)[0]
    torch.testing.assert_close(fast, plain, atol=1e-3 * plain.abs().max().item(), rtol=0)


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="flash-attn is not installed")
@pytest.mark.parametrize(("window", "causal"), [(None, False), (None, True), (40, False), (40, True)])
def test_the_slopes_of_flash_attn(window: int | None, causal: bool) -> None:
    bias = SlopeBias(torch.tensor([0.25, 0.0625, 0.0, 0.3], device="cuda"), window, causal)
    assert_parity(bias, inputs(torch.bfloat16), bias.dense(LENS[0]))
