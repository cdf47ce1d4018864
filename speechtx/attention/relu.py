"""ReLU attention weights (Wortsman et al. 2023, "Replacing softmax with ReLU in Vision Transformers").

A = relu(q k^T / sqrt(d) + bias) / n, with n the number of keys that the query sees. The weights of a query need not add up to 1,
and no key takes away from another. A penalty is a threshold here: a key at distance d counts once its match exceeds P(d).
This is the plain computation, T x T weights held in memory: the fused kernels know softmax only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def relu_weights(q: Tensor, k: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """The attention weights, at least float32; a query that sees no key has zeros.

    Args:
        q: (B, H, U, d) queries.
        k: (B, H, T, d) keys.
        bias: added to the logits, broadcastable to (B, H, U, T); -inf masks, any finite value leaves the key counted in n.

    Returns:
        (B, H, U, T)
    """
    precise = torch.promote_types(q.dtype, torch.float32)
    logits = (q.to(precise) * q.shape[-1] ** -0.5) @ k.to(precise).transpose(-2, -1)
    if bias is None:
        return logits.relu() / k.shape[-2]
    visible = (bias > float("-inf")).sum(dim=-1, keepdim=True) if bias.shape[-1] > 1 else torch.full_like(bias, k.shape[-2])
    return (logits + bias).relu() / visible.clamp(min=1)


def attend_relu(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """`kernels.attend` with ReLU weights: q (B, H, U, d), k and v (B, H, T, d) -> (B, H, U, d); `dropout` of the weights."""
    return F.dropout(relu_weights(q, k, bias=bias), dropout).to(v.dtype) @ v
