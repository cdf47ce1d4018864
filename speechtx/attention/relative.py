"""Relative positions in the attention itself (Transformer-XL, Dai et al. 2019, section 3.3; the attention of Conformer)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechtx.attention.kernels import Bias, dense_bias
from speechtx.attention.linear import Linear
from speechtx.attention.multihead import AttentionTerms, SelfAttention, split_heads
from speechtx.attention.sinusoids import GrowingTable, angles, interleaved


class RelativeSelfAttention(SelfAttention):
    """Self-attention whose logits are ((q_i + u) k_j + (q_i + v) W r_{i-j}) / sqrt(d) + bias, non-causal.

    r are sinusoids of the signed distance, W a projection without bias in each layer, u and v one vector a head for how much
    content and distance matter whatever the query. u and v start at zero, and r takes no dropout: choices of this toolkit.

    The second term is a (B, H, T, T) tensor with a gradient and goes into the kernel as a bias, on top of the padding and the
    penalty. So training leaves PyTorch's fused CPU kernel, and on a GPU flash attention; a penalty's structured kernels are
    written out densely as well. Where that costs too much, `rotary` is the relative encoding that keeps them all.

    Args:
        dim, num_heads, dropout, weighting: as in `SelfAttention`.
    """

    def __init__(self, *, dim: int, num_heads: int, dropout: float = 0.0, weighting: str = "softmax") -> None:
        super().__init__(dim=dim, num_heads=num_heads, dropout=dropout, weighting=weighting)
        self.position = Linear(dim, dim, bias=False)
        # One-dimensional, so that weight decay spares them, as it does other biases.
        self.content_bias = nn.Parameter(torch.zeros(dim))
        self.position_bias = nn.Parameter(torch.zeros(dim))
        self.dim = dim
        self.table = GrowingTable(self._build)

    def terms(self, x: Tensor, bias: Bias) -> AttentionTerms:
        """See `SelfAttention.terms`: u is part of the queries, the term of the distances part of the bias."""
        q, k, v = self.project(x)
        length = x.shape[1]
        table = self.table.reaching(length, x.device)
        shown = table[self.table.length - length : self.table.length + length - 1]  # distances length - 1 .. -(length - 1)
        r = split_heads(self.position(shown.to(x.dtype)).unsqueeze(0), self.num_heads)
        by_distance = (q + self._per_head(self.position_bias, q)) @ r.transpose(-2, -1)
        logits = shift(by_distance) * q.shape[-1] ** -0.5
        extra = dense_bias(bias)
        merged = logits if extra is None else logits + extra.to(logits.dtype)
        return q + self._per_head(self.content_bias, q), k, v, merged

    def _per_head(self, vector: Tensor, q: Tensor) -> Tensor:
        """(D,) -> (H, 1, d), of q's dtype."""
        return vector.view(self.num_heads, 1, -1).to(q.dtype)

    def _build(self, length: int) -> Tensor:
        """(2 length - 1, D): sinusoids of the distances length - 1 down to -(length - 1)."""
        return interleaved(angles(torch.arange(length - 1, -length, -1, device="cpu"), self.dim))


def shift(x: Tensor) -> Tensor:
    """x (..., T, 2T - 1), by distance T - 1 .. -(T - 1) -> (..., T, T), where [i, j] is x at distance i - j.

    Row i is wanted from column T - 1 - i on. One column in front makes consecutive rows, read in the width 2T - 1, start one
    column earlier each (Dai et al. 2019, appendix B).
    """
    length = x.shape[-2]
    padded = F.pad(x, (1, 0)).flatten(-2)[..., length:]
    return padded.unflatten(-1, (length, 2 * length - 1))[..., :length]
