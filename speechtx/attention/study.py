"""A penalty added after softmax: a widespread mistake, kept so that its effect can be measured. Never recognise speech with it.

With w = softmax(q k^T / sqrt(d_k) + mask) it computes w - P, lifts everything by the smallest value of the whole batch, and
divides each row by its sum. Of each row only a share of about 1 / (s T^2) still depends on q and k, masked keys receive weight
again, and an utterance's output depends on the others of its batch (docs/attention_penalty.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from speechtx.attention.kernels import attention_weights


@dataclass(frozen=True)
class AfterSoftmax:
    """The mistake.

    Attributes:
        penalty: P (1 or H, T, T), finite.
        padding: (B, 1, 1, T) of 0 and -inf, or None.
    """

    penalty: Tensor
    padding: Tensor | None

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """The weights (B, H, T, T) that come out: rows sum to 1, padding included."""
        lifted = attention_weights(q, k, bias=self.padding) - self.penalty
        lifted = lifted - lifted.min()
        return lifted / lifted.sum(dim=-1, keepdim=True)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, dropout: float) -> Tensor:
        return F.dropout(self.weights(q, k), dropout).to(v.dtype) @ v

    def dense(self) -> Tensor:
        raise NotImplementedError("what is added after softmax is no bias of the logits; use `weights`")
