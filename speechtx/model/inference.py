"""Conformer layers where nobody wants gradients: the arithmetic of their `forward` with less around it.

Of one utterance of three seconds a layer's matrices hold sixty rows, and then the calls of its modules, the dropouts that do
nothing and the tensors between its operations cost a tenth of the encoder's time. So inference mode, and only it, calls the
operations themselves and overwrites what is its own. What a layer computes is said by `ConformerEncoderLayer.forward`; a test
ties the two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechtx.attention.kernels import Bias
from speechtx.attention.linear import PackedLinear
from speechtx.model.norm import FrameNorm

if TYPE_CHECKING:
    from speechtx.model.convolution import DepthwiseConv
    from speechtx.model.encoder import ConformerEncoderLayer, FeedForward


def may_infer(layer: ConformerEncoderLayer) -> bool:
    """Whether `infer` stands for the layer now."""
    if torch.compiler.is_compiling():  # which cannot ask for the mode without cutting the layer in two
        return False
    return torch.is_inference_mode_enabled() and not layer.training and isinstance(layer.norm_final, FrameNorm)


def infer(layer: ConformerEncoderLayer, x: Tensor, *, bias: Bias, mask: Tensor) -> Tensor:
    """The layer's output (B, S, D); arguments as in its `forward`."""
    shape = x.shape
    x = x.flatten(0, 1)
    x = torch.add(x, _feed_forward(layer.norm_ff_in, layer.ff_in, x), alpha=0.5)  # a new tensor, which the rest may overwrite
    x.add_(layer.attn(_normed(layer.norm_attn, x).view(shape), bias=bias).view_as(x))
    conv = layer.conv
    gated = F.glu(_linear(conv.pointwise_in, _normed(layer.norm_conv, x)), dim=-1).view(shape)
    gated.masked_fill_(~mask.unsqueeze(-1), 0.0)
    found = _sum_taps(conv.depthwise, gated) if len(gated) == 1 and x.device.type == "cpu" else conv.depthwise(gated)
    x.add_(_linear(conv.pointwise_out, F.silu(_normed(conv.norm, found.view_as(x)), inplace=True)))
    x.add_(_feed_forward(layer.norm_ff_out, layer.ff_out, x), alpha=0.5)
    return _normed(layer.norm_final, x).view(shape)


def _feed_forward(norm: nn.Module, ff: FeedForward, x: Tensor) -> Tensor:
    """x (N, D), before its norm -> (N, D)"""
    return _linear(ff.outer, F.silu(_linear(ff.inner, _normed(norm, x)), inplace=True))


def _normed(norm: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(norm, FrameNorm)
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _linear(linear: nn.Linear, x: Tensor) -> Tensor:
    return PackedLinear.of(linear)(x)


def _sum_taps(depthwise: DepthwiseConv, x: Tensor) -> Tensor:
    """The depthwise convolution of x (B, T, D) tap by tap: of one utterance that is faster than what PyTorch has."""
    width, length = depthwise.weight.shape[1], x.shape[1]
    windows = F.pad(x, (0, 0, width // 2, width // 2)).unfold(1, length, 1).transpose(2, 3)  # (B, taps, T, D), no copy
    y = depthwise.bias.expand_as(x).clone()
    for window, tap in zip(windows.unbind(1), depthwise.weight.t().contiguous().unbind(), strict=True):
        y.addcmul_(window, tap)
    return y
