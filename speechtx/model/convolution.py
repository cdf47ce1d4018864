"""Conformer's convolution module, and a depthwise convolution over time that is fast on CPU."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechtx.model.norm import make_norm


class DepthwiseConv(nn.Module):
    """A centred convolution over time of each channel by itself, in the layout (B, T, D) of the layers around it.

    On a GPU this is PyTorch's grouped convolution over (B, D, T). On a CPU that takes five times as long, forward and backward,
    as a convolution that leaves the channels innermost, so that is what happens there; a test ties the two.

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
        convolve = depthwise_innermost if x.device.type == "cpu" else depthwise_plain
        return convolve(x, self.weight, self.bias)


def depthwise_plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The definition: x (B, T, D), weight (D, K), bias (D,) -> (B, T, D)."""
    dim, kernel = weight.shape
    return F.conv1d(x.transpose(1, 2), weight.unsqueeze(1), bias, padding=kernel // 2, groups=dim).transpose(1, 2)


def depthwise_innermost(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same as `depthwise_plain`, as a picture of one column whose channels are innermost, so that nothing is copied."""
    kernel = weight.shape[1]
    picture = x.unsqueeze(2).permute(0, 3, 1, 2)  # (B, D, T, 1)
    y = F.conv2d(picture, weight[:, None, :, None], bias, padding=(kernel // 2, 0), groups=len(weight))
    return y.permute(0, 2, 3, 1).squeeze(2)


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
