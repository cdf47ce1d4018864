"""Hypotheses that stutter: which tokens would make a run of tokens stand too many times in a row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Repeats:
    """How periodic the ends of N hypotheses of L tokens are.

    With run(p) the number of last tokens that equal the token p places before them, the p last tokens stand r + 1 times in a row
    as soon as run(p) reaches r p; the token that would do so is the one p places back.

    Attributes:
        limit: how many times in a row any run of tokens may stand.
        tokens: (N, L) the hypotheses backwards, the last token first.
        run: (N, L) run(p) for p = 1 .. L.
    """

    limit: int
    tokens: Tensor
    run: Tensor

    @staticmethod
    def start(num: int, *, limit: int, device: torch.device) -> Repeats:
        """Of `num` empty hypotheses."""
        nothing = torch.zeros((num, 0), dtype=torch.int64, device=device)
        return Repeats(limit, nothing, nothing)

    def forbid(self, total: Tensor) -> None:
        """Sets tokens that must not come next to -inf in total (N, V), in place."""
        period = torch.arange(1, self.tokens.shape[1] + 1, device=total.device)
        row, place = (self.run + 1 >= self.limit * period).nonzero(as_tuple=True)
        total[row, self.tokens[row, place]] = -torch.inf

    def select(self, rows: Tensor) -> Repeats:
        """The state of these rows (M,)."""
        return Repeats(self.limit, self.tokens[rows], self.run[rows])

    def append(self, labels: Tensor) -> Repeats:
        """The state after each hypothesis took one label (N,)."""
        label = labels.unsqueeze(1)
        run = F.pad(torch.where(self.tokens == label, self.run + 1, 0), (0, 1))
        return Repeats(self.limit, torch.cat([label, self.tokens], dim=1), run)
