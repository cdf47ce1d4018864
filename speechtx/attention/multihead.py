"""Multi-head attention layers (Vaswani et al. 2017, section 3.2.2) with one matrix product for all projections of an input."""

from __future__ import annotations

from torch import Tensor, nn

from speechtx.attention.kernels import Bias, attend, attention_weights, dense_bias
from speechtx.attention.linear import Linear
from speechtx.attention.relu import attend_relu, relu_weights
from speechtx.attention.rotary import Rotary
from speechtx.attention.study import AfterSoftmax

AttentionTerms = tuple[Tensor, Tensor, Tensor, Bias]  # queries, keys, values, and what is added to the logits


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, T, H * d) -> (B, H, T, d), a view."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """(B, H, T, d) -> (B, T, H * d); no copy when x comes from a fused kernel, which computes in that layout."""
    return x.transpose(1, 2).flatten(-2)


class SelfAttention(nn.Module):
    """Self-attention with fused query, key and value projection.

    Args:
        dim: D, the model's width.
        num_heads: H.
        dropout: probability of dropping an attention weight in training; above 0 PyTorch's fused CPU kernel cannot be used.
        rotary: turn queries and keys by their positions, see `Rotary`.
        weighting: "softmax", or "relu" (see `speechtx.attention.relu`), which is not causal.
    """

    def __init__(
        self, *, dim: int, num_heads: int, dropout: float = 0.0, rotary: bool = False, weighting: str = "softmax"
    ) -> None:
        super().__init__()
        if weighting not in ("softmax", "relu"):
            raise ValueError(f"attention weights are softmax or relu, not {weighting}")
        self.num_heads = num_heads
        self.dropout = dropout
        self.rotary = Rotary(dim=dim // num_heads) if rotary else None
        self.weighting = weighting
        self.qkv = Linear(dim, 3 * dim)
        self.out = Linear(dim, dim)

    def project(self, x: Tensor, *, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, H, T, d) of x (B, T, D) at positions start .. start + T - 1."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # cut along the last dimension: backward is one concatenation
        q, k, v = split_heads(q, self.num_heads), split_heads(k, self.num_heads), split_heads(v, self.num_heads)
        return (q, k, v) if self.rotary is None else (self.rotary(q, start=start), self.rotary(k, start=start), v)

    def terms(self, x: Tensor, bias: Bias) -> AttentionTerms:
        """q, k, v and bias as they enter the kernel, which weights v by softmax(q k^T / sqrt(d) + bias), or relu's twin of it."""
        return *self.project(x), bias

    def forward(self, x: Tensor, *, bias: Bias = None, causal: bool = False) -> Tensor:
        """(B, T, D) -> (B, T, D); `bias` as in `kernels.attend`."""
        q, k, v, bias = self.terms(x, bias)
        dropout = self.dropout if self.training else 0.0
        if self.weighting == "softmax":
            return self.out(join_heads(attend(q, k, v, bias=bias, causal=causal, dropout=dropout)))
        if causal:
            raise ValueError("relu attention weights are not causal")
        return self.out(join_heads(attend_relu(q, k, v, bias=dense_bias(bias), dropout=dropout)))

    def weights(self, x: Tensor, *, bias: Bias = None) -> Tensor:
        """The attention weights (B, H, T, T) that `forward` uses inside and never materialises; for looking at them."""
        q, k, _, bias = self.terms(x, bias)
        if isinstance(bias, AfterSoftmax):
            return bias.weights(q, k)
        return (attention_weights if self.weighting == "softmax" else relu_weights)(q, k, bias=dense_bias(bias))


class CrossAttention(nn.Module):
    """Attention from the decoder to the encoder; keys and values are projected apart, so that they can be kept.

    Args:
        dim: D, the width of both sides.
        num_heads: H.
        dropout: as in `SelfAttention`.
    """

    def __init__(self, *, dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.q = Linear(dim, dim)
        self.kv = Linear(dim, 2 * dim)
        self.out = Linear(dim, dim)

    def project(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, S, d) of the encoder's output (B, S, D)."""
        k, v = self.kv(memory).chunk(2, dim=-1)
        return split_heads(k, self.num_heads), split_heads(v, self.num_heads)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, *, bias: Tensor | None = None) -> Tensor:
        """x (B, U, D), keys and values of `project` -> (B, U, D); bias broadcastable to (B, H, U, S)."""
        q = split_heads(self.q(x), self.num_heads)
        return self.out(join_heads(attend(q, keys, values, bias=bias, dropout=self.dropout if self.training else 0.0)))
