"""A second opinion on the n best: how well the phones of each hypothesis fit what lower encoder layers hear.

A model whose intermediate CTC predicts phones (`model.intermediate_ctc.lexicon`) says twice what was spoken: as tokens at the top
and as phones in the middle. The two err differently, and P(phones of the text | audio) is one CTC forward pass a hypothesis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from speechtx.config.decode import DecodeConfig
from speechtx.search.hypothesis import Hypothesis
from speechtx.text.phones import Phones
from speechtx.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Pronouncer:
    """The phones of tokens, by way of the words they spell."""

    tokenizer: Tokenizer
    phones: Phones

    def __call__(self, tokens: Sequence[int]) -> list[int] | None:
        """Phones from 1 on; None if a word has no pronunciation."""
        text = self.tokenizer.decode(tokens)
        return self.phones.encode(text) if self.phones.knows(text) else None


def add_phone_scores(
    nbests: Sequence[Sequence[Hypothesis]],
    outputs: Sequence[Tensor],
    enc_lens: Tensor,
    pronounce: Pronouncer,
    config: DecodeConfig,
) -> list[list[Hypothesis]]:
    """Adds phone_weight * log P_ctc(phones | audio) to scores, and ranks anew.

    Args:
        nbests: of each utterance.
        outputs: (B, S, P + 1) log-probabilities of phones and, first, the blank: of each layer that predicts them, and of each
            model of an ensemble. The mean of what they say of a hypothesis, in logarithms, counts.
        enc_lens: (B,) valid frames.
        pronounce: from tokens to phones.
        config: phone_weight, length_normalization and nbest.

    Returns:
        At most `config.nbest` hypotheses of each utterance, best first. Those with a word that has no pronunciation, or with more
        phones than frames, come last, with the score and in the order that they had.
    """
    found = []
    for row, nbest in enumerate(nbests):
        heard = [output[row, : int(enc_lens[row])] for output in outputs]
        scored = []
        for hypothesis, log_prob in zip(nbest, _log_probs(heard, [pronounce(h.tokens) for h in nbest]), strict=True):
            if log_prob is not None:
                share = config.phone_weight / (len(hypothesis.tokens) + 1) ** config.length_normalization
                hypothesis = replace(hypothesis, score=hypothesis.score + share * log_prob, phones=log_prob)
            scored.append(hypothesis)
        found.append(sorted(scored, key=lambda h: (h.phones is None, -h.score))[: config.nbest])
    return found


def _log_probs(heard: Sequence[Tensor], labels: Sequence[list[int] | None]) -> list[float | None]:
    """log P(labels | audio) of each hypothesis, the mean over what was heard, (S, P + 1) each; None where it is none."""
    known = [place for place, own in enumerate(labels) if own is not None]
    result: list[float | None] = [None] * len(labels)
    if not known:
        return result
    rows = [torch.tensor(labels[place], dtype=torch.int64) for place in known]
    lens = torch.tensor([len(row) for row in rows])
    targets = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    frames = torch.full((len(rows),), len(heard[0]))
    losses = [
        F.ctc_loss(own.cpu().double().unsqueeze(1).expand(-1, len(rows), -1), targets, frames, lens, blank=0, reduction="none")
        for own in heard
    ]
    for place, loss in zip(known, torch.stack(losses).mean(dim=0).tolist(), strict=True):
        if math.isfinite(loss):
            result[place] = -loss
    return result
