"""Conformer's convolution module, and convolutions that are fast on CPU: depthwise over time, and strided over a picture."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from speechtx.attention.linear import Linear
from speechtx.model.norm import make_norm

MANY_CHANNELS = 96  # from here on a matrix product gives the gradient of a convolution's weight sooner than the convolution does
WINDOW_FLOATS = 2**21  # of a picture's windows that are copied for one product: 8 MiB stay in the cache


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


def conv2d_innermost(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """What `conv` makes of a picture whose channels are innermost; conv neither pads nor dilates.

    On a CPU most of such a convolution's time goes into the gradient of its weight. From 96 channels on a matrix product over the
    picture's windows gives it, which at 256 channels takes a third of the time. A test ties it to PyTorch's.
    """
    plain = x.device.type != "cpu" or torch.is_autocast_enabled("cpu") or not torch.is_grad_enabled()
    if plain or conv.groups > 1 or conv.in_channels < MANY_CHANNELS:
        out: Tensor = conv(x)
    else:
        out = _Conv2dInnermost.apply(x, conv.weight, conv.bias, conv.stride)
    return out


class _Conv2dInnermost(torch.autograd.Function):
    """F.conv2d with another way to its weight's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, stride: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        return F.conv2d(x, weight, bias, stride)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x, _, _ = torch.ops.aten.convolution_backward(
                grad, x, weight, None, ctx.stride, [0, 0], [1, 1], False, [0, 0], 1, [True, False, False]
            )
        return of_x, gradient_of_weight(x, grad, weight, ctx.stride), grad.sum(dim=(0, 2, 3)), None


def gradient_of_weight(x: Tensor, grad: Tensor, weight: Tensor, stride: tuple[int, int]) -> Tensor:
    """Of a convolution that neither pads nor dilates: x (B, C, H, W), grad (B, D, H', W') of its output -> (D, C, K, L)."""
    outputs, channels, height, width = weight.shape
    pictures, grads = x.permute(0, 2, 3, 1), grad.permute(0, 2, 3, 1)
    rows = max(1, WINDOW_FLOATS // (grads.shape[2] * height * width * channels))
    total = weight.new_zeros(outputs, height * width * channels)
    for picture, of_picture in zip(pictures, grads, strict=True):
        windows = picture.unfold(0, height, stride[0]).unfold(1, width, stride[1]).permute(0, 1, 3, 4, 2)  # (H', W', K, L, C)
        for some, of_some in zip(windows.split(rows), of_picture.split(rows), strict=True):
            total = torch.addmm(total, of_some.reshape(-1, outputs).T, some.reshape(-1, total.shape[1]))
    return total.view(outputs, height, width, channels).permute(0, 3, 1, 2)


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
        self.pointwise_in = Linear(dim, 2 * dim)
        self.depthwise = DepthwiseConv(dim=dim, kernel=kernel)
        self.norm = make_norm(norm, dim)
        self.pointwise_out = Linear(dim, dim)

    def forward(self, x: Tensor, *, mask: Tensor) -> Tensor:
        """x (B, S, D), mask (B, S) -> (B, S, D); padded frames enter the convolution as zeros, like those outside the batch."""
        x = F.glu(self.pointwise_in(x), dim=-1).masked_fill(~mask.unsqueeze(-1), 0.0)
        return self.pointwise_out(F.silu(self.norm(self.depthwise(x), mask)))
