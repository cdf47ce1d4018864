"""Scores of next tokens for hypotheses that grow at different times.

A label-synchronous search asks its scorers for all hypotheses in every step. A frame-synchronous one extends few of them in any
frame, and the others keep what was computed when they were extended themselves. So what a scorer answered, and its state, lie in
a pool of rows; a hypothesis keeps its row as it moves through the beam; a new one takes a row that fell free.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from speechtx.search.prefix_tree import Survivors
from speechtx.search.scorers import Weighted


class PrefixScores:
    """What P scorers say of B * K prefixes, all of them empty at first.

    Args:
        scorers: what to ask, and its weights.
        batch: B, utterances.
        beam: K, prefixes an utterance.
        sos_eos_id: the token that is fed first, and scored as the end.
        device: of the search.
    """

    def __init__(self, *, scorers: Sequence[Weighted], batch: int, beam: int, sos_eos_id: int, device: torch.device) -> None:
        self._scorers, self._end, self._beam = scorers, sos_eos_id, beam
        self._weights = torch.tensor([weighted.weight for weighted in scorers], dtype=torch.float64, device=device)
        self._first_row = torch.arange(batch, device=device).unsqueeze(1) * beam
        self._row = torch.arange(beam, device=device).repeat(batch, 1)  # (B, K) of each slot, counted from the utterance's first
        self._sums = torch.zeros((batch, beam, len(scorers)), dtype=torch.float64, device=device)
        self._states: list[Any] = []
        self._next: list[Tensor] = []  # of every scorer (B * K, V) float32
        start = torch.full((batch * beam,), sos_eos_id, device=device)
        for weighted in scorers:
            scores, state = weighted.scorer.step(start, weighted.scorer.start(len(start)))
            self._states.append(state)
            self._next.append(scores)
        self._best = self._bound(self._next)

    def _bound(self, scores: Sequence[Tensor]) -> Tensor:
        """(n,) float64, not exceeded by the weighted score of any next token."""
        return torch.stack([s.amax(dim=1).to(torch.float64) for s in scores], dim=1) @ self._weights

    def best(self) -> Tensor:
        """(B, K) float64, not exceeded by the weighted score of any next token."""
        return self._best[self._first_row + self._row]

    def weighted(self, labels: Tensor) -> Tensor:
        """(B, K, C) float64, the weighted scores of labels (B, C) after each prefix."""
        rows, labels = (self._first_row + self._row).unsqueeze(2), labels.unsqueeze(1)
        return torch.stack([scores[rows, labels] for scores in self._next], dim=3).to(torch.float64) @ self._weights

    def _raw(self, rows: Tensor, labels: Tensor) -> Tensor:
        """(B, K, P) float64, what each scorer gives label (B, K) after the prefix in its row (B, K)."""
        return torch.stack([scores[rows, labels] for scores in self._next], dim=2).to(torch.float64)

    def advance(self, new: Survivors) -> Tensor:
        """Follows the survivors of a frame; returns (B, K) float64, what those that grew gain by it, weighted."""
        before = self._row.gather(1, new.source)
        gained = self._raw(self._first_row + before, new.label).masked_fill(~new.grown.unsqueeze(2), 0.0)
        self._sums = self._sums.gather(1, new.source.unsqueeze(2).expand_as(self._sums)) + gained

        taken = torch.zeros((len(before), self._beam + 1), dtype=torch.int8, device=before.device)
        taken.scatter_(1, torch.where(new.alive & ~new.grown, before, self._beam), 1)
        free = taken[:, :-1].argsort(dim=1, stable=True)
        nth = (new.grown.cumsum(dim=1) - 1).clamp(min=0)
        self._row = torch.where(new.grown, free.gather(1, nth), before)
        self._ask(
            (self._first_row + before)[new.grown], labels=new.label[new.grown], rows=(self._first_row + self._row)[new.grown]
        )
        return gained @ self._weights

    def _ask(self, parents: Tensor, *, labels: Tensor, rows: Tensor) -> None:
        """Puts the prefixes of rows `parents` (n,), each with one more label (n,), into `rows` (n,), whose prefixes are gone."""
        if not len(rows):
            return
        answers = []
        for index, weighted in enumerate(self._scorers):
            scores, state = weighted.scorer.step(labels, self._states[index].select(parents))
            self._states[index] = self._states[index].put(rows, state)
            self._next[index].index_copy_(0, rows, scores)
            answers.append(scores)
        self._best.index_copy_(0, rows, self._bound(answers))

    def finish(self) -> tuple[Tensor, Tensor]:
        """What the end of the sentence adds, weighted (B, K), and the sums of each scorer with it (B, K, P), both float64."""
        rows = self._first_row + self._row
        end = self._raw(rows, torch.full_like(rows, self._end))
        return end @ self._weights, self._sums + end
