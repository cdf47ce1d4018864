"""Sines and cosines of positions (Vaswani et al. 2017, section 3.5), shared by all encodings that are made of them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def angles(position: Tensor, dim: int) -> Tensor:
    """position (T,) -> (T, dim / 2) float64: position / 10000^(2 k / dim) for k = 0 .. dim / 2 - 1."""
    # float64: at position 5000 float32 would already be wrong in the fourth digit of the angle.
    frequency = torch.exp(torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") * (-math.log(10000.0) / dim))
    return position.double().unsqueeze(1) * frequency


def interleaved(angle: Tensor) -> Tensor:
    """angle (T, dim / 2) -> (T, dim) float32: sin, cos, sin, cos, ... from the highest frequency to the lowest."""
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1).float()


def concatenated(angle: Tensor) -> Tensor:
    """angle (T, dim / 2) -> (T, dim) float32: all sines, then all cosines (as Tensor2Tensor lays them out)."""
    return torch.cat((angle.sin(), angle.cos()), dim=-1).float()


class GrowingTable:
    """A constant table over positions: computed when first needed, longer when a longer input comes, in no checkpoint.

    Args:
        build: length -> the table for inputs of up to that length, on the CPU.
    """

    def __init__(self, build: Callable[[int], Tensor]) -> None:
        self.build = build
        self.length = 0
        self._table: Tensor | None = None

    def reaching(self, length: int, device: torch.device) -> Tensor:
        """The table for `self.length` positions, at least `length`, a power of two; on `device`."""
        if self._table is None or self._table.device != device or self.length < length:
            self.length = max(512, 1 << (length - 1).bit_length())
            self._table = self.build(self.length).to(device)
        return self._table
