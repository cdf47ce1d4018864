"""How attention is computed: PyTorch's fused kernels, and a plain twin that says what they must equal.

Both compute softmax(q k^T / sqrt(d) + bias) v. A query whose keys are all masked attends to nothing and gets zeros.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, causal: bool = False, dropout: float = 0.0) -> Tensor:
    """Scaled dot-product attention through the fastest kernel PyTorch has for these arguments.

    On CPU the fused kernel is left for the plain one if `dropout` > 0, if the bias needs a gradient, or if the bias is not
    4-D with dimensions that are 1 or full. `causal` and `bias` do not go together.

    Args:
        q: (B, H, U, d) queries.
        k: (B, H, T, d) keys.
        v: (B, H, T, d) values.
        bias: added to the logits, broadcastable to (B, H, U, T), of q's dtype; -inf masks.
        causal: query i sees keys 0..i only.
        dropout: probability of dropping an attention weight; pass 0 outside training.

    Returns:
        (B, H, U, d)
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, is_causal=causal)


def attend_eager(
    q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, causal: bool = False, dropout: float = 0.0
) -> Tensor:
    """The same as `attend`, one obvious line after the other; softmax in float32 whatever the dtype of q."""
    weights = attention_weights(q, k, bias=bias, causal=causal)
    return F.dropout(weights, dropout).to(v.dtype) @ v


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
