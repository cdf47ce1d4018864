"""Conformer's convolution module, and a depthwise convolution over time that is fast on CPU."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechtx.model.norm import make_norm


class DepthwiseConv(nn.Module):
    """A centred convolution over time of each channel by itself, in the layout (B, T, D) of the layers around it.

    On a GPU this is PyTorch's grouped convolution. Its CPU kernel takes two to three times as long, forward and backward, as
    summing the taps one by one, so that is what happens there (`_TapSum`); a test ties the two.

    Args:
        dim: D, the channels.
        kernel: taps, odd.
    """

    def __init__(self, *, dim: int, kernel: int) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise ValueError(f"kernel {kernel} must be odd so that the convolution is centred")
        bound = kernel**-0.5  # as nn.Conv1d: uniform with a fan-in of `kernel`
        self.weight = nn.Parameter(torch.empty(dim, kernel).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D); zeros stand before the start and after the end."""
        if x.device.type == "cpu":
            return _TapSum.apply(x, self.weight, self.bias)
        return depthwise_plain(x, self.weight, self.bias)


def depthwise_plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The definition: x (B, T, D), weight (D, K), bias (D,) -> (B, T, D)."""
    dim, kernel = weight.shape
    return F.conv1d(x.transpose(1, 2), weight.unsqueeze(1), bias, padding=kernel // 2, groups=dim).transpose(1, 2)


class _TapSum(torch.autograd.Function):
    """y[t] = bias + sum over k of weight[k] * x[t + k - K // 2], as K multiply-adds over the whole batch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        kernel = weight.shape[1]
        padded = F.pad(x, (0, 0, kernel // 2, kernel // 2))
        taps = weight.to(x.dtype).t().contiguous()
        ctx.save_for_backward(padded, taps)
        y = bias.to(x.dtype).expand_as(x).clone()
        for k in range(kernel):
            y.addcmul_(padded[:, k : k + x.shape[1]], taps[k])
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        padded, taps = ctx.saved_tensors
        kernel, length = len(taps), grad.shape[1]
        padded_grad = F.pad(grad, (0, 0, kernel // 2, kernel // 2))
        grad_x = torch.zeros_like(grad)
        grad_taps = torch.empty_like(taps)
        for k in range(kernel):
            grad_x.addcmul_(padded_grad[:, kernel - 1 - k : kernel - 1 - k + length], taps[k])
            grad_taps[k] = (grad * padded[:, k : k + length]).sum(dim=(0, 1))
        return grad_x, grad_taps.t(), grad.sum(dim=(0, 1))


class ConvolutionModule(nn.Module):
    """Conformer's convolution (Gulati et al. 2020, section 2.2): pointwise, GLU, depthwise over time, norm, swish, pointwise.

    The norm is a LayerNorm unless told otherwise, not the paper's BatchNorm: the output then does not depend on the other
    utterances of the batch, and there are no running statistics that accumulation and several processes have to agree on.

    Args:
        dim: D.
        kernel: taps of the depthwise convolution, odd.
        norm: as `encoder.norm`.
    """

    def __init__(self, *, dim: int, kernel: int, norm: Literal["layer", "batch"] = "layer") -> None:
        super().__init__()
        self.pointwise_in = nn.Linear(dim, 2 * dim)
        self.depthwise = DepthwiseConv(dim=dim, kernel=kernel)
        self.norm = make_norm(norm, dim)
        self.pointwise_out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, *, mask: Tensor) -> Tensor:
        """x (B, S, D), mask (B, S) -> (B, S, D); padded frames enter the convolution as zeros, like those outside the batch."""
        x = F.glu(self.pointwise_in(x), dim=-1).masked_fill(~mask.unsqueeze(-1), 0.0)
        return self.pointwise_out(F.silu(self.norm(self.depthwise(x), mask)))
