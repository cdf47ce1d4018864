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
        total: differentiable, ctc_weight * ctc + (1 - ctc_weight) * att, and what regularisers add in training.
        ctc: negative log-likelihood in nats, detached.
        att: label-smoothed cross entropy in nats, detached; 0 without a decoder.
        num_tokens: int64, tokens plus one end of sentence per utterance, which a decoder of type mask_ctc is not asked for.
        num_correct: of num_tokens, how many the decoder's argmax gets right, given the right prefix or the right tokens that are
            not hidden; int64, but float32 where training estimates it from those it hides; 0 without a decoder.
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


def consistency_loss(log_probs: Tensor, lens: Tensor, *, teachers_learn: bool = False) -> Tensor:
    """Summed divergence of the outputs of two views of the same utterances (Yao et al., ICLR 2025, section 3).

    Each view learns from the other, D(sg(b) || a) + D(sg(a) || b) in every frame: no gradient flows into the distribution that
    teaches. Half of this is the paper's loss; the other half is in the number of tokens, which counts both views too.

    Args:
        log_probs: (2N, S, V) float32, rows n and N + n being two views of utterance n.
        lens: (2N,) valid frames, or tokens.
        teachers_learn: let gradients flow into both distributions, as R-Drop does (Liang et al., NeurIPS 2021, equation 2).
    """
    valid = torch.arange(log_probs.shape[1], device=log_probs.device) < lens[: len(lens) // 2].unsqueeze(1)
    first, second = (view[valid] for view in log_probs.chunk(2))
    teachers = (first, second) if teachers_learn else (first.detach(), second.detach())
    return F.kl_div(first, teachers[1], reduction="sum", log_target=True) + F.kl_div(
        second, teachers[0], reduction="sum", log_target=True
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


def draw_hidden(token_lens: Tensor, size: int) -> Tensor:
    """Which tokens a training step hides: of U, a number uniform in 1 .. U, drawn anywhere alike (Ghazvininejad et al. 2019).

    Draws from the generator that dropout draws from, of token_lens' device; the trainer seeds it anew for every batch.

    Args:
        token_lens: (B,) U of each utterance; of none, none is hidden.
        size: padded length.

    Returns:
        (B, size) bool, True where hidden.
    """
    device = token_lens.device
    count = (torch.rand(len(token_lens), device=device) * token_lens).long() + 1
    order = torch.rand(len(token_lens), size, device=device).masked_fill(~_valid(token_lens, size), 2.0)
    rank = order.argsort(dim=1).argsort(dim=1)
    return rank < torch.minimum(count, token_lens).unsqueeze(1)  # float32 may round up to U


def hidden_targets(tokens: Tensor, token_lens: Tensor, hidden: Tensor, *, blank_id: int) -> tuple[Tensor, Tensor]:
    """Input and target of a decoder that fills in hidden tokens.

    Args:
        tokens: (B, U) int64; padding may be any value.
        token_lens: (B,).
        hidden: (B, U) bool, no padding among them.
        blank_id: stands for what is hidden, and for padding.

    Returns:
        tokens_in (B, U), and targets (B, U), IGNORE where nothing is hidden.
    """
    shown = _valid(token_lens, tokens.shape[1]) & ~hidden
    return tokens.masked_fill(~shown, blank_id), tokens.masked_fill(~hidden, IGNORE)


def every_other(token_lens: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """What evaluation hides, in two passes: tokens 0, 2, ... and then 1, 3, ..., so that each is asked for once; (B, size)."""
    valid = _valid(token_lens, size)
    even = torch.arange(size, device=token_lens.device) % 2 == 0
    return valid & even, valid & ~even


def _valid(token_lens: Tensor, size: int) -> Tensor:
    return torch.arange(size, device=token_lens.device) < token_lens.unsqueeze(1)


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
