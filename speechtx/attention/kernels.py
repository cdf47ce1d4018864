"""How attention is computed: PyTorch's fused kernels, and a plain twin that says what they must equal.

Both compute softmax(q k^T / sqrt(d) + bias) v. A query whose keys are all masked attends to nothing and gets zeros.

A bias is a tensor for PyTorch's fused kernel, or an object that knows a faster way for its own structure (blocks of a window, a
Gaussian folded into q and k, ...); each of those kernels has a file of its own, and `dense()` ties it to the plain twin.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor


@runtime_checkable
class StructuredBias(Protocol):
    """A bias with a kernel of its own."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, dropout: float) -> Tensor:
        """q (B, H, U, d), k and v (B, H, T, d) -> (B, H, U, d)"""

    def dense(self) -> Tensor:
        """The same bias as a tensor (1 or B, 1 or H, U, T), at least float32: what the plain twin adds to the logits."""


Bias = Tensor | StructuredBias | None


def attend(q: Tensor, k: Tensor, v: Tensor, *, bias: Bias = None, causal: bool = False, dropout: float = 0.0) -> Tensor:
    """Scaled dot-product attention through the fastest kernel there is for these arguments.

    On CPU the fused kernel is left for the plain one if `dropout` > 0, if the bias needs a gradient, or if the bias is not
    4-D with dimensions that are 1 or full. `causal` and `bias` do not go together.

    Args:
        q: (B, H, U, d) queries.
        k: (B, H, T, d) keys.
        v: (B, H, T, d) values.
        bias: added to the logits: a tensor broadcastable to (B, H, U, T), of q's dtype, where -inf masks; or a structured bias,
            which brings its own kernel.
        causal: query i sees keys 0..i only.
        dropout: probability of dropping an attention weight; pass 0 outside training.

    Returns:
        (B, H, U, d)
    """
    if bias is None or isinstance(bias, Tensor):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, is_causal=causal)
    assert not causal, "a structured bias is causal by itself"
    return bias.attend(q, k, v, dropout=dropout)


def attend_eager(
    q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, causal: bool = False, dropout: float = 0.0
) -> Tensor:
    """The same as `attend`, one obvious line after the other; softmax in float32 whatever the dtype of q."""
    weights = attention_weights(q, k, bias=bias, causal=causal)
    return F.dropout(weights, dropout).to(v.dtype) @ v


@dataclass(frozen=True)
class EagerBias:
    """A dense bias computed the plain way, for `backend: eager`."""

    bias: Tensor

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, dropout: float) -> Tensor:
        return attend_eager(q, k, v, bias=self.bias, dropout=dropout)

    def dense(self) -> Tensor:
        return self.bias


def dense_bias(bias: Bias) -> Tensor | None:
    """Any bias as the tensor that the plain twin adds to the logits."""
    return bias if bias is None or isinstance(bias, Tensor) else bias.dense()


def padding_bias(mask: Tensor | None, *, dtype: torch.dtype = torch.float32) -> Tensor | None:
    """0 where a key is data, -inf where it is padding: (B, 1, 1, T) from a mask (B, T); None for no mask."""
    if mask is None:
        return None
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))[:, None, None, :]


def attention_weights(q: Tensor, k: Tensor, *, bias: Tensor | None = None, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) (B, H, U, T), at least float32; rows without any key are zero."""
    precise = torch.promote_types(q.dtype, torch.float32)
    logits = (q.to(precise) * q.shape[-1] ** -0.5) @ k.to(precise).transpose(-2, -1)
    if bias is not None:
        logits = logits + bias.to(precise)
    if causal:
        future = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        logits = logits.masked_fill(future, float("-inf"))
    # -inf everywhere would make softmax NaN, in the value and in the gradient; such a row is computed on zeros and then erased.
    empty = (logits == float("-inf")).all(dim=-1, keepdim=True)
    return logits.masked_fill(empty, 0.0).softmax(dim=-1).masked_fill(empty, 0.0)
