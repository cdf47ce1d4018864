"""Dropout whose random bits cost little on a CPU, and the dropping of whole layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LEVELS = 2**16  # a probability is rounded to a multiple of 1/65536


class Dropout(nn.Module):
    """Inverted dropout (Srivastava et al. 2014), the same distribution as nn.Dropout.

    PyTorch draws one Bernoulli number at a time on a CPU, which took a fifth of a training step here; this draws four 16-bit
    numbers out of each random 64-bit word instead. On other devices it is PyTorch's own kernel.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.p)
        return dropout_cpu(x, self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def depth_rates(last: float, num_layers: int) -> list[float]:
    """How often stochastic depth leaves out each layer: linearly more towards the last (Huang et al., ECCV 2016, equation 4)."""
    return [last * number / num_layers for number in range(1, num_layers + 1)]


def left_out(rate: float) -> bool:
    """Draws whether a layer is left out of this batch, on the CPU whatever the device; seeded by torch.manual_seed."""
    return rate > 0.0 and bool(torch.rand(()) < rate)


def dropout_cpu(x: Tensor, p: float) -> Tensor:
    """Zeroes each value with probability p (to 1/65536) and scales the others by 1 / (1 - p); seeded by torch.manual_seed."""
    dropped = round(p * LEVELS)
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    levels = words.view(torch.int16)[: x.numel()].view(x.shape)  # uniform on -32768 .. 32767
    if x.dtype in (torch.float32, torch.float64):
        return _KeepAbove.apply(x, levels, dropped)
    return dropout_plain(x, levels, dropped)


def dropout_plain(x: Tensor, levels: Tensor, dropped: int) -> Tensor:
    """The definition: zeroes x where `levels`, int16 of its shape, is among the `dropped` lowest of 65536; scales the rest."""
    return torch.where(levels >= dropped - LEVELS // 2, x * (LEVELS / (LEVELS - dropped)), 0.0)


class _KeepAbove(torch.autograd.Function):
    """`dropout_plain` of float32 or float64, forward and backward, in a quarter of the time.

    The backward of a threshold zeroes one tensor where another of the same dtype is not above a number. It is one vectorised
    pass, which selecting by a mask of bytes is not, and floats hold the levels exactly.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, levels: Tensor, dropped: int) -> Tensor:
        ctx.save_for_backward(levels)
        ctx.dropped = dropped
        return _keep_above(x, levels, dropped)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (levels,) = ctx.saved_tensors
        return _keep_above(grad, levels, ctx.dropped), None, None


def _keep_above(x: Tensor, levels: Tensor, dropped: int) -> Tensor:
    kept: Tensor = torch.ops.aten.threshold_backward(x, levels.to(x.dtype), dropped - LEVELS // 2 - 0.5)
    return kept.mul_(LEVELS / (LEVELS - dropped))
