"""Pre-norm layers one position at a time, as plain functions of weights that are fetched once for a whole search.

A search feeds a layer ten vectors or so, and then calling its modules costs more than their arithmetic: a decoder step took 1.6
times as long through them. What the layers compute is said by their `forward`; tests tie every step to it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from speechtx.attention.linear import PackedLinear
from speechtx.attention.multihead import SelfAttention
from speechtx.attention.rotary import Rotary
from speechtx.model.encoder import FeedForward

Norm = tuple[Tensor, Tensor]  # weight and bias


def norm_of(module: nn.LayerNorm) -> Norm:
    """Its weight and bias; it must have PyTorch's own epsilon."""
    assert module.bias is not None and module.eps == 1e-5
    return module.weight, module.bias


def normed(x: Tensor, norm: Norm) -> Tensor:
    """x (N, D), normalised."""
    return F.layer_norm(x, x.shape[1:], *norm)


class OwnStep(NamedTuple):
    """Self-attention of a layer: what stands around the attention itself, which depends on where keys and values are kept."""

    heads: int
    rotary: Rotary | None
    norm: Norm
    qkv: PackedLinear
    out: PackedLinear

    @staticmethod
    def of(norm: nn.LayerNorm, attn: SelfAttention) -> OwnStep:
        return OwnStep(attn.num_heads, attn.rotary, norm_of(norm), PackedLinear.of(attn.qkv), PackedLinear.of(attn.out))

    def project(self, x: Tensor, position: int = 0) -> Tensor:
        """x (N, D) -> (N, 3, H, d): query, key and value; `position` matters to rotary attention only."""
        qkv = self.qkv(normed(x, self.norm)).view(len(x), 3, self.heads, -1)
        if self.rotary is not None:
            qkv[:, :2] = self.rotary(qkv[:, :2].flatten(1, 2).unsqueeze(2), start=position).view_as(qkv[:, :2])
        return qkv

    def add(self, x: Tensor, found: Tensor) -> Tensor:
        """x (N, D) and what attention found, (..., H, d) of as many numbers -> (N, D)"""
        return x + self.out(found.reshape(x.shape))


class FeedForwardStep(NamedTuple):
    """The feed-forward part of a layer, with ReLU."""

    norm: Norm
    inner: PackedLinear
    outer: PackedLinear

    @staticmethod
    def of(norm: nn.LayerNorm, ff: FeedForward) -> FeedForwardStep:
        assert isinstance(ff.activation, nn.ReLU)
        return FeedForwardStep(norm_of(norm), PackedLinear.of(ff.inner), PackedLinear.of(ff.outer))

    def __call__(self, x: Tensor) -> Tensor:
        """(N, D) -> (N, D)"""
        return x + self.outer(self.inner(normed(x, self.norm)).relu_())
