"""The attention penalty: P >= 0, subtracted from the attention logits before softmax. `penalty` is its only definition.

With o = y_j - x_i the offset of key j from query i:

    A = softmax(q k^T / sqrt(d_k) - P(o)),    P(o) = s * rho(n(|o|)),    P(0) = 0

`log` is Tensor2Tensor's proximity bias, the likely meaning of Speech-Transformer's "bigger penalty on the attention weights of
more distant position-pairs" (Dong, Xu and Xu, ICASSP 2018); `linear` is ALiBi made symmetric (Press et al., ICLR 2022);
`gaussian` is Sperber et al. (Interspeech 2018); `bucket` with one bucket a distance is PDP (Zhang et al., ICML 2022). A new shape
is one entry of `_RHO` here and its name in `speechtx.config.penalty`.

Subtracting before softmax multiplies the weights by exp(-P) and renormalises; adding to the weights after softmax is a
different operation, which leaks onto padding and drowns the content (docs/attention_penalty.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechtx.config.penalty import PenaltyConfig

_RHO: dict[str, Callable[[Tensor, PenaltyConfig], Tensor]] = {
    "log": lambda n, _: torch.log1p(n),
    "linear": lambda n, _: n,
    "gaussian": lambda n, _: n.square(),
    "power": lambda n, config: n.pow(config.exponent or 1.0),
    "bucket": lambda n, config: torch.log1p(bucket_edges(config, n.device)[bucket_of(n, config)]),
    "window": lambda n, _: torch.zeros_like(n),
    "stripe": lambda n, _: (n > 0).to(n.dtype),
}


def penalty(config: PenaltyConfig, offset: Tensor, strength: Tensor) -> Tensor:
    """P(o) of every head.

    Args:
        config: shape, margin, step, max_distance and a window given as a number.
        offset: (...) real y_j - x_i in the unit of the configuration, at least float32.
        strength: s, (sides, H, K): sides is 1, or 2 for keys to the left and to the right; K is 1, or the buckets.

    Returns:
        (H, ...), infinite outside the window.
    """
    distance = offset.abs()
    n = charged(distance, config)
    if strength.shape[-1] > 1:
        s = strength[..., bucket_of(n, config)]
    else:
        s = strength.view(*strength.shape[:2], *[1] * offset.dim())
    value = (torch.where(offset > 0, s[1], s[0]) if len(s) == 2 else s[0]) * _RHO[config.shape](n, config)
    assert config.window != "auto", "AttentionPenalty makes a number of it"
    return value if config.window is None else value.masked_fill(distance > config.window, math.inf)


def charged(distance: Tensor, config: PenaltyConfig) -> Tensor:
    """n(d): 0 up to the margin, then growing by 1 every `step` positions (real distances: by their excess), clipped."""
    n = (distance - config.margin).clamp(min=0.0)
    if config.step > 1:
        n = torch.ceil(n / config.step)
    return n if config.max_distance is None else n.clamp(max=config.max_distance)


def bucket_edges(config: PenaltyConfig, device: torch.device | str = "cpu") -> Tensor:
    """The lower edges (K,) of the distance buckets: 0, 1, 2, ..., and from half of them on evenly in the logarithm (T5)."""
    assert config.buckets is not None and config.max_distance is not None  # the schema requires them
    exact = min((config.buckets + 1) // 2, int(config.max_distance))
    if config.buckets > config.max_distance:
        return torch.arange(config.buckets, dtype=torch.float32, device=device).clamp(max=config.max_distance)
    rest = torch.arange(config.buckets - exact, dtype=torch.float32, device=device) / (config.buckets - exact)
    return torch.cat((torch.arange(exact, dtype=torch.float32, device=device), exact * (config.max_distance / exact) ** rest))


def bucket_of(n: Tensor, config: PenaltyConfig) -> Tensor:
    """The bucket of each distance."""
    edges = bucket_edges(config, n.device)
    return (torch.bucketize(n.float(), edges, right=True) - 1).clamp(max=len(edges) - 1)


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """ALiBi's slopes 2^(-8h/H) for h = 1..H (Press et al., ICLR 2022, section 3)."""
    return tuple(2.0 ** (-8.0 * head / num_heads) for head in range(1, num_heads + 1))


def initial_strength(config: PenaltyConfig, num_heads: int) -> Tensor:
    """What the configuration says of the strength, before it is squared or learned: sigma for gaussian, s otherwise.

    Args:
        config: the penalty.
        num_heads: H, the number of heads that pay.

    Returns:
        (1 or 2 sides, 1 or H) float64.
    """
    name = "sigma" if config.shape == "gaussian" else "scale"
    left = getattr(config, name)
    right = getattr(config, f"{name}_right")
    sides = [left] if config.symmetric else [left, left if right is None else right]
    rows = [alibi_slopes(num_heads) if side == "alibi" else side if isinstance(side, tuple) else (side,) for side in sides]
    heads = max(map(len, rows))
    return torch.tensor([row if len(row) == heads else row * heads for row in rows], dtype=torch.float64, device="cpu")


class Strength(nn.Module):
    """s of one site for every layer: numbers of the configuration, or parameters that start there.

    A learned value is kept positive by a softplus. All of them are one 1-D parameter, which weight decay spares.

    Args:
        config: the penalty.
        num_layers: of the site.
        num_heads: of the site.
    """

    def __init__(self, config: PenaltyConfig, *, num_layers: int, num_heads: int) -> None:
        super().__init__()
        self.config = config
        self.layers = config.selected_layers(num_layers)
        start = initial_strength(config, len(config.selected_heads(num_heads))).float()
        if config.learnable == "none":
            self.register_buffer("fixed", start.unsqueeze(-1).to(torch.get_default_device()), persistent=False)
            return
        heads = len(config.selected_heads(num_heads)) if config.learnable == "head" else 1
        buckets = config.buckets if config.shape == "bucket" and config.buckets else 1
        self.shape = (len(self.layers), len(start), heads, buckets)
        raw = torch.log(torch.expm1(start.double())).float()  # the inverse of softplus
        self.learned = nn.Parameter(raw[None, :, :, None].expand(self.shape).flatten().clone())

    def forward(self, layer: int) -> Tensor:
        """s of a selected layer: (sides, 1 or H, K)."""
        if self.config.learnable == "none":
            value = self.get_buffer("fixed")
        else:
            value = F.softplus(self.learned).view(self.shape)[self.layers.index(layer)]
        return strength_of(self.config, value)


def strength_of(config: PenaltyConfig, value: Tensor) -> Tensor:
    """s of what the configuration gives: 1 / (2 sigma^2) of a sigma, a scale as it is."""
    return 1.0 / (2.0 * value.square()) if config.shape == "gaussian" else value
