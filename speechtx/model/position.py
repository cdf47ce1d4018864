"""Positions that are added to the input of an encoder or decoder, or left out there."""

from __future__ import annotations

import functools
import math
from typing import Literal

import torch
from torch import Tensor, nn

from speechtx.attention.sinusoids import GrowingTable, angles, concatenated, interleaved
from speechtx.model.dropout import Dropout


def sinusoids(length: int, dim: int, *, halves: bool = False) -> Tensor:
    """(length, dim) float32, wavelengths from 2 pi to 10000 * 2 pi in geometric steps (Vaswani et al. 2017, section 3.5).

    Args:
        length: positions 0 .. length - 1.
        dim: even.
        halves: all sines and then all cosines, as in Tensor2Tensor, instead of the two interleaved, as in the paper. The same up
            to a permutation of dimensions, which the layers around can learn: nothing is to be gained, but weights of one
            layout are wrong in the other.
    """
    angle = angles(torch.arange(length, device="cpu"), dim)
    return concatenated(angle) if halves else interleaved(angle)


class SinusoidalPosition(nn.Module):
    """x * sqrt(D) + position, then dropout.

    The table is computed when it is first needed and grows with the longest input; it belongs to no checkpoint.

    Args:
        dim: D, even.
        dropout: probability.
        halves: see `sinusoids`.
    """

    def __init__(self, *, dim: int, dropout: float, halves: bool = False) -> None:
        super().__init__()
        self.dim = dim
        self.dropout = Dropout(dropout)
        self.table = GrowingTable(functools.partial(sinusoids, dim=dim, halves=halves))

    def forward(self, x: Tensor, *, start: int | Tensor = 0) -> Tensor:
        """x (B, T, D) at positions start .. start + T - 1 -> (B, T, D); `start` may be another for each row, (B,)."""
        if isinstance(start, Tensor):
            positions = start.unsqueeze(1) + torch.arange(x.shape[1], device=x.device)
            added = self.table.reaching(int(positions.max()) + 1, x.device)[positions]
        else:
            end = start + x.shape[1]
            added = self.table.reaching(end, x.device)[start:end]
        return self.dropout(x * math.sqrt(self.dim) + added.to(x.dtype))


class NoPosition(nn.Module):
    """x * sqrt(D), then dropout: nothing is added.

    Either the layers bring positions themselves (rotary, relative), or there are none, and order is left to the convolutions,
    the penalty and, in a decoder, the causal mask. The factor stays although no position is to be balanced: the front end and
    the embedding are initialised for it, so that the residual stream starts with unit variance, and options can be compared.

    Args:
        dim: D.
        dropout: probability.
    """

    def __init__(self, *, dim: int, dropout: float) -> None:
        super().__init__()
        self.dim = dim
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, *, start: int = 0) -> Tensor:
        """(B, T, D) -> (B, T, D); `start` as in `SinusoidalPosition`."""
        return self.dropout(x * math.sqrt(self.dim))


def input_position(
    kind: Literal["sinusoidal", "sinusoidal_concatenated", "none", "rotary", "relative"], *, dim: int, dropout: float
) -> SinusoidalPosition | NoPosition:
    """What happens to the input for the `position` of a configuration."""
    if kind in ("sinusoidal", "sinusoidal_concatenated"):
        return SinusoidalPosition(dim=dim, dropout=dropout, halves=kind == "sinusoidal_concatenated")
    return NoPosition(dim=dim, dropout=dropout)
