"""Sinusoidal positions (Vaswani et al. 2017, section 3.5)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from speechtx.model.dropout import Dropout


def sinusoids(length: int, dim: int) -> Tensor:
    """(length, dim) float32: sin and cos interleaved, wavelengths from 2 pi to 10000 * 2 pi in geometric steps."""
    # float64: at position 5000 float32 would already be wrong in the fourth digit of the angle.
    position = torch.arange(length, dtype=torch.float64, device="cpu").unsqueeze(1)
    frequency = torch.exp(torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") * (-math.log(10000.0) / dim))
    angle = position * frequency
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1).float()


class SinusoidalPosition(nn.Module):
    """x * sqrt(D) + position, then dropout.

    The table is computed when it is first needed and grows with the longest input; it belongs to no checkpoint.

    Args:
        dim: D, even.
        dropout: probability.
    """

    def __init__(self, *, dim: int, dropout: float) -> None:
        super().__init__()
        self.dim = dim
        self.dropout = Dropout(dropout)
        self._table: Tensor | None = None

    def forward(self, x: Tensor, *, start: int = 0) -> Tensor:
        """x (B, T, D) at positions start .. start + T - 1 -> (B, T, D)."""
        end = start + x.shape[1]
        return self.dropout(x * math.sqrt(self.dim) + self._table_to(end, x.device)[start:end].to(x.dtype))

    def _table_to(self, length: int, device: torch.device) -> Tensor:
        if self._table is None or self._table.device != device or len(self._table) < length:
            self._table = sinusoids(max(512, 1 << (length - 1).bit_length()), self.dim).to(device)
        return self._table
