"""The attention penalty: P(d) >= 0, subtracted from the attention logits before softmax. This file is its only definition.

With d = |x_i - y_j| the distance between query i and key j (in encoder frames for the encoder's self-attention):

    A = softmax(q k^T / sqrt(d_k) - P(d)),    P(d) = s * rho(d),    P(0) = 0

`log` is Tensor2Tensor's proximity bias, the likely meaning of Speech-Transformer's "bigger penalty on the attention weights of
more distant position-pairs" (Dong, Xu and Xu, ICASSP 2018); `linear` is ALiBi made symmetric (Press et al., ICLR 2022);
`gaussian` is Sperber et al. (Interspeech 2018). A new shape is one entry of `_RHO` and, if it has a parameter of its own, one
line of `_strength`.

Subtracting before softmax multiplies the weights by exp(-P) and renormalises; adding to the weights after softmax is a
different operation, which leaks onto padding and drowns the content (docs/attention_penalty.md).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from speechtx.config.schema import PenaltyConfig

_RHO: dict[str, Callable[[Tensor], Tensor]] = {
    "log": torch.log1p,
    "linear": lambda distance: distance,
    "gaussian": torch.square,
    "window": torch.zeros_like,
}


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """ALiBi's slopes 2^(-8h/H) for h = 1..H (Press et al., ICLR 2022, section 3)."""
    return tuple(2.0 ** (-8.0 * head / num_heads) for head in range(1, num_heads + 1))


def penalty(config: PenaltyConfig, distance: Tensor, *, num_heads: int) -> Tensor:
    """P(d) of every head.

    Args:
        config: shape and strength.
        distance: non-negative distances of any shape, in the unit the configuration is meant in.
        num_heads: H; a configuration that lists values per head must list H of them.

    Returns:
        float32 of shape (1, *distance.shape) if all heads share one penalty, else (H, *distance.shape); infinite outside
        the window.
    """
    distance = distance.float()
    if config.shape == "none":
        return torch.zeros_like(distance).unsqueeze(0)
    strength = torch.tensor(_strength(config, num_heads), device=distance.device)
    values = strength.view(-1, *[1] * distance.dim()) * _RHO[config.shape](distance)
    if config.window is not None:
        values = values.masked_fill(distance > config.window, float("inf"))
    return values


def build_bias(
    config: PenaltyConfig,
    *,
    length: int,
    num_heads: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    mask: Tensor | None = None,
) -> Tensor | None:
    """The additive bias of square self-attention, -P merged with the padding mask; built once per batch, shared by all layers.

    Args:
        config: the penalty.
        length: T, the number of queries and of keys.
        num_heads: H.
        device: where the bias is wanted.
        dtype: of the queries, because the fused kernels want a bias of their own type; computed in float32.
        mask: (B, T) bool, True where there is data; None if nothing is padded.

    Returns:
        (1 or B, 1 or H, T, T), or (B, 1, 1, T) if there is only padding to express, or None if there is nothing at all. Every
        dimension is 1 or full, which is what keeps PyTorch's fused CPU kernel.
    """
    padding = None if mask is None else ~mask[:, None, None, :]
    if config.shape == "none":
        return None if padding is None else padding_bias(mask, dtype=dtype)
    position = torch.arange(length, device=device)
    distance = (position[:, None] - position[None, :]).abs()
    bias = -penalty(config, distance, num_heads=num_heads).to(dtype).unsqueeze(0)
    return bias if padding is None else bias.masked_fill(padding, float("-inf"))


def padding_bias(mask: Tensor | None, *, dtype: torch.dtype = torch.float32) -> Tensor | None:
    """0 where a key is data, -inf where it is padding: (B, 1, 1, T) from a mask (B, T); None for no mask."""
    if mask is None:
        return None
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))[:, None, None, :]


def _strength(config: PenaltyConfig, num_heads: int) -> tuple[float, ...]:
    """s of every head, or one s for all of them."""
    if config.shape == "gaussian":
        assert config.sigma is not None  # the schema requires it
        sigmas = config.sigma if isinstance(config.sigma, tuple) else (config.sigma,)
        return tuple(1.0 / (2.0 * sigma**2) for sigma in sigmas)
    if config.scale == "alibi":
        return alibi_slopes(num_heads)
    return config.scale if isinstance(config.scale, tuple) else (float(config.scale),)
