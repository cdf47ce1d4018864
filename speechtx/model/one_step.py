"""Pre-norm layers one position at a time, as plain functions of weights that are fetched once for a whole search.

A search feeds a layer ten vectors or so, and then calling its modules costs more than their arithmetic: a decoder step took 1.6
times as long through them. What the layers compute is said by their `forward`; tests tie every step to it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from speechtx.attention.multihead import SelfAttention
from speechtx.attention.rotary import Rotary
from speechtx.model.encoder import FeedForward

Affine = tuple[Tensor, Tensor]  # weight and bias, of a linear layer or of a norm


def affine(module: nn.Linear | nn.LayerNorm) -> Affine:
    """Its weight and bias; a norm must have PyTorch's own epsilon."""
    assert module.bias is not None and getattr(module, "eps", 1e-5) == 1e-5
    return module.weight, module.bias


def normed(x: Tensor, norm: Affine) -> Tensor:
    """x (N, D), normalised."""
    return F.layer_norm(x, x.shape[1:], *norm)


class OwnStep(NamedTuple):
    """Self-attention of a layer: what stands around the attention itself, which depends on where keys and values are kept."""

    heads: int
    rotary: Rotary | None
    norm: Affine
    qkv: Affine
    out: Affine

    @staticmethod
    def of(norm: nn.LayerNorm, attn: SelfAttention) -> OwnStep:
        return OwnStep(attn.num_heads, attn.rotary, affine(norm), affine(attn.qkv), affine(attn.out))

    def project(self, x: Tensor, position: int = 0) -> Tensor:
        """x (N, D) -> (N, 3, H, d): query, key and value; `position` matters to rotary attention only."""
        qkv = F.linear(normed(x, self.norm), *self.qkv).view(len(x), 3, self.heads, -1)
        if self.rotary is not None:
            qkv[:, :2] = self.rotary(qkv[:, :2].flatten(1, 2).unsqueeze(2), start=position).view_as(qkv[:, :2])
        return qkv

    def add(self, x: Tensor, found: Tensor) -> Tensor:
        """x (N, D) and what attention found, (..., H, d) of as many numbers -> (N, D)"""
        return x + F.linear(found.reshape(x.shape), *self.out)


class FeedForwardStep(NamedTuple):
    """The feed-forward part of a layer, with ReLU."""

    norm: Affine
    inner: Affine
    outer: Affine

    @staticmethod
    def of(norm: nn.LayerNorm, ff: FeedForward) -> FeedForwardStep:
        assert isinstance(ff.activation, nn.ReLU)
        return FeedForwardStep(affine(norm), affine(ff.inner), affine(ff.outer))

    def __call__(self, x: Tensor) -> Tensor:
        """(N, D) -> (N, D)"""
        return x + F.linear(F.linear(normed(x, self.norm), *self.inner).relu_(), *self.outer)
