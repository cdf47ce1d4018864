"""The attention kernels on a CUDA device give what the plain one gives on the CPU."""

from __future__ import annotations

import pytest
import torch

from speechtx.attention.kernels import attend, attend_eager
from speechtx.attention.site import build_bias
from speechtx.config.penalty import PenaltyConfig
from speechtx.model.convolution import DepthwiseConv

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.bfloat16, 6e-2), (torch.float16, 2e-2)])
@pytest.mark.parametrize("shape", ["none", "log", "window"])
@pytest.mark.parametrize("lens", [[33, 20], [33, 0]])  # 0: every key of an utterance is masked
def test_the_gpus_kernel_equals_the_plain_one(dtype: torch.dtype, tolerance: float, shape: str, lens: list[int]) -> None:
    torch.manual_seed(0)
    config = PenaltyConfig(shape=shape, window=2 if shape == "window" else None)
    mask = torch.arange(33) < torch.tensor(lens).unsqueeze(1)
    q, k, v, grad = torch.randn(4, 2, 4, 33, 64).to(dtype).unbind(0)
    results = []
    for kernel, device in ((attend, "cuda"), (attend_eager, "cpu")):
        leaves = [x.to(device).requires_grad_() for x in (q, k, v)]
        bias = build_bias(config, length=33, num_heads=4, device=device, dtype=dtype, mask=mask.to(device))
        out = kernel(*leaves, bias=bias)
        results.append([out.detach().cpu(), *(g.cpu() for g in torch.autograd.grad(out, leaves, grad.to(device)))])
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, atol=tolerance, rtol=tolerance)


def test_the_depthwise_convolution_is_the_same_on_both_devices() -> None:
    torch.manual_seed(0)
    layer, x = DepthwiseConv(dim=16, kernel=15), torch.randn(2, 40, 16)
    torch.testing.assert_close(layer.cuda()(x.cuda()).cpu(), layer.cpu()(x), atol=1e-3, rtol=1e-3)
