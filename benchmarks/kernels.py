"""What benchmarks/attention.py compares: our kernels, PyTorch's, and a loop of band matrices."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.side_by_side import Candidates
from speechtx.attention.blocks import BlockBias
from speechtx.attention.kernels import attend, attend_eager
from speechtx.attention.site import AttentionPenalty, build_bias
from speechtx.config.penalty import PenaltyConfig

HEADS, HEAD_DIM, WINDOW = 4, 64, 64
LOG = PenaltyConfig(shape="log")
_EXPLICIT_BYTES = 2**30  # the explicit softmax keeps about four matrices of this size


def forward_backward(
    attention: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor
) -> Callable[[], object]:
    """One pass forward and backward as a training step has it."""
    grad = torch.randn_like(q)
    return lambda: torch.autograd.grad(attention(q, k, v), (q, k, v), grad)


def qkv(
    batch: int, length: int, *, head_dim: int = HEAD_DIM, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Leaves (B, H, T, d) in the layout of a model, where T comes before the heads."""
    shape = (batch, length, HEADS, head_dim)
    return [torch.randn(shape, device=device, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3)]


def band_loop(shape: tuple[int, ...], *, step: int = 1) -> Tensor:
    """The widespread slow way to build a linear penalty: one band matrix more for every `step` of distance.

    Each turn adds -1 outside a band one step wider than the last, so that it ends as -ceil(|i - j| / step).
    """
    board = torch.zeros(shape)
    for width in range(0, shape[-1] - 1, step):
        band = torch.ones(shape).tril(width).triu(-width)
        board = board + (band - 1.0)
    return board


def after_softmax(weights: Tensor, board: Tensor) -> Tensor:
    """And how it is then applied: added to the weights, lifted above zero, renormalised."""
    weights = weights + board
    weights = weights - weights.min()
    return weights / weights.sum(dim=-1, keepdim=True)


def loop_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention with the loop inside, on matrices of the weights' own shape."""
    weights = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1)
    return after_softmax(weights, band_loop(tuple(weights.shape))) @ v


def block_bias() -> BlockBias:
    """-log(1 + |o|) within the window."""
    site = AttentionPenalty(LOG, num_layers=1, num_heads=HEADS)
    return BlockBias(site.by_offset(0, WINDOW + 1))


def window_bias(length: int) -> Tensor:
    """The same for every pair of positions: (1, 1, T, T)."""
    bias = build_bias(PenaltyConfig(shape="log", window=WINDOW), length=length, num_heads=HEADS)
    assert bias is not None
    return bias.contiguous()


def alone_candidates(batch: int, length: int) -> Candidates:
    """Forward and backward of one layer's attention; the biases exist already, as in every layer but the first."""
    q, k, v = qkv(batch, length)
    bias, blocks = build_bias(LOG, length=length, num_heads=HEADS), block_bias()
    kernels: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "SDPA": attend,
        "SDPA + bias": lambda q, k, v: attend(q, k, v, bias=bias),
        "explicit + bias": lambda q, k, v: attend_eager(q, k, v, bias=bias),
        "BlockBias": lambda q, k, v: attend(q, k, v, bias=blocks),
    }
    if 4 * batch * HEADS * length**2 > _EXPLICIT_BYTES:
        del kernels["explicit + bias"]
    return {name: forward_backward(kernel, q, k, v) for name, kernel in kernels.items()}
