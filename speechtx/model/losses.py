"""The joint loss: CTC on the encoder, label-smoothed cross entropy on the decoder (Watanabe et al. 2017, section II-C)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -1  # target of a padded position


@dataclass(frozen=True)
class Losses:
    """Sums over the batch, as tensors on its device, so that batches and processes add up exactly; divide by num_tokens last.

    Attributes:
        total: differentiable, ctc_weight * ctc + (1 - ctc_weight) * att.
        ctc: negative log-likelihood in nats, detached.
        att: label-smoothed cross entropy in nats, detached; 0 without a decoder.
        num_tokens: int64, tokens plus one end of sentence per utterance.
        num_correct: int64, of num_tokens, how many the decoder's argmax gets right given the right prefix; 0 without a decoder.
    """

    total: Tensor
    ctc: Tensor
    att: Tensor
    num_tokens: Tensor
    num_correct: Tensor


def ctc_min_frames(tokens: Sequence[int]) -> int:
    """The least number of encoder frames CTC can emit `tokens` in: one each, plus a blank between equal neighbours."""
    return len(tokens) + sum(left == right for left, right in pairwise(tokens))


def ctc_loss(log_probs: Tensor, enc_lens: Tensor, tokens: Tensor, token_lens: Tensor, *, blank_id: int) -> Tensor:
    """Summed CTC negative log-likelihood (Graves et al. 2006) in float32.

    An utterance with fewer than `ctc_min_frames` frames has infinite loss, and it is not hidden: the caller leaves such
    utterances out beforehand, and sees that something is wrong if one gets here.

    Args:
        log_probs: (B, S, V) float32.
        enc_lens: (B,) valid frames.
        tokens: (B, U) int64 without start or end; padding may be any value.
        token_lens: (B,).
        blank_id: of the blank.
    """
    return F.ctc_loss(
        log_probs.transpose(0, 1), tokens, enc_lens, token_lens, blank=blank_id, reduction="sum", zero_infinity=False
    )


def decoder_targets(tokens: Tensor, token_lens: Tensor, *, sos_eos_id: int) -> tuple[Tensor, Tensor]:
    """Input <sos> y_1 .. y_U and target y_1 .. y_U <eos> of the decoder.

    Args:
        tokens: (B, U) int64; padding may be any value.
        token_lens: (B,).
        sos_eos_id: the one id that starts and ends a sentence.

    Returns:
        tokens_in (B, U + 1), padded with sos_eos_id, and targets (B, U + 1), padded with IGNORE.
    """
    position = torch.arange(tokens.shape[1] + 1, device=tokens.device)
    ends = token_lens.unsqueeze(1)
    targets = F.pad(tokens, (0, 1)).masked_fill(position == ends, sos_eos_id).masked_fill(position > ends, IGNORE)
    tokens_in = F.pad(tokens, (1, 0)).masked_fill((position == 0) | (position > ends), sos_eos_id)
    return tokens_in, targets


def attention_loss(logits: Tensor, targets: Tensor, *, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """Summed label-smoothed cross entropy (Szegedy et al. 2016, section 7) and the number of right argmaxes.

    The smoothed target is (1 - e) on the right token plus e / V on every token, as in the paper and in PyTorch.

    Args:
        logits: (B, U, V).
        targets: (B, U) int64, IGNORE where padded.
        label_smoothing: e.

    Returns:
        the loss (float32 scalar) and an int64 scalar.
    """
    loss = F.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE, reduction="sum", label_smoothing=label_smoothing
    )
    return loss, (logits.argmax(dim=-1) == targets).sum()
