"""CTC prefix scores of many hypotheses at once, without a loop over frames, labels, hypotheses or utterances.

For a prefix g, let n(t) and b(t) be the probabilities that frames 1..t emit exactly g, ending in g's last label or in blank
(Watanabe et al. 2017, "Hybrid CTC/Attention Architecture for End-to-End Speech Recognition", algorithm 2). With y(t, c) the
posterior of label c at frame t:

    phi(t, c) = b(t-1) + [c != last(g)] n(t-1)             g is complete before t and c may start at t
    psi(g c)  = sum over t of phi(t, c) y(t, c)            probability that the labels begin with g c
    P(g)      = n(S) + b(S)                                probability that the labels are exactly g
    n'(t) = (n'(t-1) + phi(t, c)) y(t, c)                  forward variables of g c
    b'(t) = (b'(t-1) + n'(t-1)) y(t, blank)

Two observations make this cheap. psi needs the forward variables of g only, so all V extensions are one matrix product, and
no candidates have to be chosen beforehand; forward variables are computed for the survivors alone. And both recursions are
first-order linear: x(t) = (x(t-1) + u(t)) y(t) has the solution x(t) = Y(t) * sum over s <= t of u(s) / Y(s-1) with
Y(t) = y(1)...y(t), which in logarithms is a cumulative sum and a cumulative log-sum-exp. All terms are positive, so nothing
cancels; float64 keeps the error near 1e-12.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_LOG_ZERO = -1.0e4  # stands for log 0 where -inf would give inf - inf; exp of it is exactly 0


@dataclass(frozen=True)
class CtcState:
    """Forward variables of N prefixes.

    Attributes:
        log_n: (N, S+1) float64, log n(t) for t = 0..S.
        log_b: (N, S+1) float64, log b(t) for t = 0..S.
        last: (N,) the last label of each prefix, -1 for the empty prefix.
    """

    log_n: Tensor
    log_b: Tensor
    last: Tensor


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
        batch, frames, vocab = log_probs.shape
        self._beam, self._blank_id = beam, blank_id
        log_y = log_probs.to(torch.float64).clamp(min=_LOG_ZERO)
        padding = (torch.arange(frames, device=log_y.device) >= enc_lens.to(log_y.device).unsqueeze(1)).unsqueeze(2)
        # Beyond the end only blank is possible, with probability 1: P(g) is then n(S) + b(S) whatever the length.
        certain_blank = log_y.new_full((vocab,), _LOG_ZERO).index_fill(0, torch.tensor(blank_id, device=log_y.device), 0.0)
        log_y = torch.where(padding, certain_blank, log_y)
        self._y = log_y.exp()
        self._by_label = log_y.transpose(1, 2).reshape(batch * vocab, frames)  # row b * V + c
        self._row_of_utt = torch.arange(batch, device=log_y.device).repeat_interleave(beam) * vocab
        log_y_blank = self._labels(torch.full_like(self._row_of_utt, blank_id))
        self._cum_blank = _cumulative(log_y_blank)

    def start(self) -> CtcState:
        """The state of the empty prefix in every row: all frames so far were blank."""
        log_n = torch.full_like(self._cum_blank, -torch.inf)
        last = torch.full_like(self._row_of_utt, -1)
        return CtcState(log_n=log_n, log_b=self._cum_blank, last=last)

    def score(self, state: CtcState) -> tuple[Tensor, Tensor]:
        """Scores every extension of every prefix.

        Returns:
            (N, V) float64 log psi(g c), -inf for blank, and (N,) float64 log P(g), the score if g ends here.
        """
        before = torch.logaddexp(state.log_n, state.log_b)  # (N, S+1)
        phi = before[:, :-1]
        # Scaled by the row's maximum: what float64 then loses is below e^-700 of the prefix's own probability.
        scale = phi.amax(dim=1, keepdim=True).clamp(min=-1.0e300)
        batch, frames, vocab = self._y.shape
        mass = (phi - scale).exp().view(batch, self._beam, frames)
        log_psi = torch.bmm(mass, self._y).view(-1, vocab).log() + scale
        # A repeated label needs a blank in between.
        last = state.last.clamp(min=0).unsqueeze(1)
        repeated = torch.logsumexp(state.log_b[:, :-1] + self._labels(last.squeeze(1)), dim=1, keepdim=True)
        is_empty = (state.last < 0).unsqueeze(1)
        log_psi.scatter_(1, last, torch.where(is_empty, log_psi.gather(1, last), repeated))
        log_psi[:, self._blank_id] = -torch.inf
        return log_psi, before[:, -1]

    def extend(self, state: CtcState, rows: Tensor, labels: Tensor) -> CtcState:
        """The state after prefix `rows[i]` took label `labels[i]`, for i in 0..N-1 (rows stay within their utterance)."""
        log_n, log_b, last = state.log_n[rows], state.log_b[rows], state.last[rows]
        phi = torch.where((last == labels).unsqueeze(1), log_b, torch.logaddexp(log_n, log_b))[:, :-1]
        new_n = _solve(phi, _cumulative(self._labels(labels)))
        new_b = _solve(new_n[:, :-1], self._cum_blank)
        return CtcState(log_n=new_n, log_b=new_b, last=labels)

    def keep(self, state: CtcState, utterances: Tensor) -> CtcState:
        """Drops all utterances but these (int64 indices into B) from the scorer, and from the state that is returned."""
        batch, frames, vocab = self._y.shape
        self._y = self._y[utterances]
        self._by_label = self._by_label.view(batch, vocab, frames)[utterances].flatten(0, 1)
        rows = (utterances.unsqueeze(1) * self._beam + torch.arange(self._beam, device=utterances.device)).view(-1)
        self._cum_blank = self._cum_blank[rows]
        self._row_of_utt = self._row_of_utt[: len(rows)]
        return CtcState(log_n=state.log_n[rows], log_b=state.log_b[rows], last=state.last[rows])

    def _labels(self, labels: Tensor) -> Tensor:
        """(N, S) log y(t, labels[i]) of each row's utterance."""
        return self._by_label[self._row_of_utt + labels]


def _cumulative(log_y: Tensor) -> Tensor:
    """(N, S) -> (N, S+1): log Y(t) for t = 0..S."""
    return torch.nn.functional.pad(log_y.cumsum(dim=1), (1, 0))


def _solve(log_u: Tensor, log_cum: Tensor) -> Tensor:
    """Solves x(t) = (x(t-1) + u(t)) y(t), x(0) = 0, in logarithms: (N, S), (N, S+1) -> (N, S+1)."""
    inner = torch.logcumsumexp(log_u - log_cum[:, :-1], dim=1) + log_cum[:, 1:]
    return torch.nn.functional.pad(inner, (1, 0), value=-torch.inf)
