"""Rotary positions (RoFormer, Su et al. 2021): queries and keys are turned by angles that grow with their position."""

from __future__ import annotations

import torch
from torch import Tensor

from speechtx.attention.sinusoids import GrowingTable, angles


class Rotary:
    """Turns each pair (2k, 2k + 1) of a head's dimensions by position / 10000^(2k / d); nothing is learned.

    A turned query times a turned key depends on the positions through their difference only (equation 16 of the paper), and keys
    that were turned once can be kept in step-by-step decoding. A penalty or mask is added to the logits after this, so the two
    combine freely and the fused kernels stay.

    Args:
        dim: d, of one head, even.
    """

    def __init__(self, *, dim: int) -> None:
        if dim % 2:
            raise ValueError(f"rotary positions turn pairs of dimensions; {dim} in a head is odd")
        self.dim = dim
        self.table = GrowingTable(self._build)

    def __call__(self, x: Tensor, *, start: int = 0) -> Tensor:
        """x (B, H, T, d) at positions start .. start + T - 1, turned; computed in float32 at least, of x's dtype."""
        end = start + x.shape[2]
        precise = torch.promote_types(x.dtype, torch.float32)
        cos, sin = self.table.reaching(end, x.device)[:, start:end].to(precise).unbind(0)
        even, odd = x.to(precise).unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)

    def _build(self, length: int) -> Tensor:
        """(2, length, d / 2) float32, cosines and sines."""
        angle = angles(torch.arange(length, device="cpu"), self.dim)
        return torch.stack((angle.cos(), angle.sin())).float()
