"""CTC prefix scores of many hypotheses at once, without a loop over frames, labels, hypotheses or utterances.

With the forward variables n and b of a prefix g, and phi, of speechtx.model.ctc_forward (Watanabe et al. 2017, algorithm 2):

    psi(g c)  = sum over t of phi(t, c) y(t, c)            probability that the labels begin with g c
    P(g)      = n(S) + b(S)                                probability that the labels are exactly g

psi needs the forward variables of g only, so all V extensions are one matrix product, and no candidates have to be chosen
beforehand; forward variables are computed for the survivors alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from speechtx.model.ctc_forward import LOG_ZERO, CtcForward, CtcState


class CtcPrefixScorer:
    """Prefix scores of B utterances with `beam` hypotheses each, N = B * beam rows, row i belonging to utterance i // beam."""

    def __init__(self, *, log_probs: Tensor, enc_lens: Tensor, blank_id: int, beam: int) -> None:
        """Prepares the posteriors.

        Args:
            log_probs: (B, S, V) CTC log-probabilities; frames beyond the lengths may hold anything.
            enc_lens: (B,) valid frames.
            blank_id: the CTC blank.
            beam: hypotheses an utterance.
        """
        self._forward = CtcForward(log_probs=log_probs, enc_lens=enc_lens, blank_id=blank_id, beam=beam)
        certain_blank = torch.zeros(log_probs.shape[2], dtype=torch.float64, device=log_probs.device)
        certain_blank[blank_id] = 1.0
        y = log_probs.to(torch.float64).clamp(min=LOG_ZERO).exp()
        self._y = torch.where(self._forward.valid.unsqueeze(2), y, certain_blank)

    def start(self) -> CtcState:
        """The state of the empty prefix in every row: all frames so far were blank."""
        return self._forward.start()

    def score(self, state: CtcState) -> tuple[Tensor, Tensor]:
        """Scores every extension of every prefix.

        Returns:
            (N, V) float64 log psi(g c), -inf for blank, and (N,) float64 log P(g), the score if g ends here.
        """
        phi = state.log_any[:, :-1]
        # Scaled by the row's maximum: what float64 then loses is below e^-700 of the prefix's own probability.
        scale = phi.amax(dim=1, keepdim=True).clamp(min=-1.0e300)
        batch, frames, vocab = self._y.shape
        mass = (phi - scale).exp().view(batch, self._forward.beam, frames)
        log_psi = torch.bmm(mass, self._y).view(-1, vocab).log() + scale
        # A repeated label needs a blank in between.
        last = state.last.clamp(min=0).unsqueeze(1)
        repeated = torch.logsumexp(state.log_b[:, :-1] + state.log_y, dim=1, keepdim=True)
        is_empty = (state.last < 0).unsqueeze(1)
        log_psi.scatter_(1, last, torch.where(is_empty, log_psi.gather(1, last), repeated))
        log_psi[:, self._forward.blank_id] = -torch.inf
        return log_psi, state.log_any[:, -1]

    def extend(self, state: CtcState, rows: Tensor, labels: Tensor) -> CtcState:
        """The state after prefix `rows[i]` took label `labels[i]`, for i in 0..N-1 (rows stay within their utterance)."""
        return self._forward.extend(state.select(rows), labels)

    def keep(self, state: CtcState, utterances: Tensor) -> CtcState:
        """Drops all utterances but these (int64 indices into B) from the scorer, and from the state that is returned."""
        rows = self._forward.rows_of(utterances)
        self._forward, self._y = self._forward.keep(utterances), self._y[utterances]
        return state.select(rows)
