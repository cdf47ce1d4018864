"""The hypotheses of a beam, all utterances and slots at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Beam:
    """Hypotheses of B utterances in K slots each; a slot without one scores -inf.

    Attributes:
        score: (B, K) float64, what they are ranked by.
        parts: (B, K, P) float64, the unweighted parts of the score.
        tokens: (B, K, L) int64.
        lengths: (B, K) int64; what `tokens` holds behind them has no meaning.
    """

    score: Tensor
    parts: Tensor
    tokens: Tensor
    lengths: Tensor

    @staticmethod
    def empty(batch: int, slots: int, num_parts: int, device: torch.device) -> Beam:
        """A beam without hypotheses, but with room for them."""
        score = torch.full((batch, slots), -torch.inf, dtype=torch.float64, device=device)
        tokens = torch.zeros((batch, slots, 0), dtype=torch.int64, device=device)
        return Beam(score, score.new_zeros(batch, slots, num_parts), tokens, tokens.new_zeros(batch, slots))

    def keep(self, utterances: Tensor) -> Beam:
        """Keeps these utterances, given as indices or as a mask."""
        return Beam(self.score[utterances], self.parts[utterances], self.tokens[utterances], self.lengths[utterances])

    def best_of(self, other: Beam) -> Beam:
        """The best of both, as many as this one has slots."""
        width = max(self.tokens.shape[2], other.tokens.shape[2])
        score, slots = torch.cat([self.score, other.score], dim=1).topk(self.score.shape[1], dim=1)
        tokens = [F.pad(beam.tokens, (0, width - beam.tokens.shape[2])) for beam in (self, other)]
        return Beam(
            score=score,
            parts=gather_slots(torch.cat([self.parts, other.parts], dim=1), slots),
            tokens=gather_slots(torch.cat(tokens, dim=1), slots),
            lengths=torch.cat([self.lengths, other.lengths], dim=1).gather(1, slots),
        )


def gather_slots(values: Tensor, slots: Tensor) -> Tensor:
    """values (B, K, X) at slots (B, k) -> (B, k, X)"""
    return values.gather(1, slots.unsqueeze(2).expand(-1, -1, values.shape[2]))
