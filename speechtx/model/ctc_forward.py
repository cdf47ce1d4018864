"""The forward variables of CTC for many prefixes at once, without a loop over frames, prefixes or utterances.

For a prefix g, let n(t) and b(t) be the probabilities that frames 1..t emit exactly g, ending in g's last label or in blank
(Watanabe et al. 2017, "Hybrid CTC/Attention Architecture for End-to-End Speech Recognition", algorithm 2). With y(t, c) the
posterior of label c at frame t:

    phi(t, c) = b(t-1) + [c != last(g)] n(t-1)             g is complete before t and c may start at t
    n'(t) = (n'(t-1) + phi(t, c)) y(t, c)                  forward variables of g c
    b'(t) = (b'(t-1) + n'(t-1)) y(t, blank)

Both recursions are first-order linear: x(t) = (x(t-1) + u(t)) y(t) has the solution
x(t) = Y(t) * sum over s <= t of u(s) / Y(s-1) with Y(t) = y(1)...y(t), which in logarithms is a cumulative sum and a cumulative
log-sum-exp. All terms are positive, so nothing cancels; float64 keeps the error near 1e-12.

Two users: the search scores prefixes by them (speechtx.search.ctc_prefix), and the axis `ctc_prefix` of cross-attention asks
where in time a prefix ends (speechtx.model.axis).

A state may hold a window of the frames only: what lies outside counts as 0. The search says which frames it does without, and
knows what that costs it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

LOG_ZERO = -1.0e4  # stands for log 0 where -inf would give inf - inf; exp of it is exactly 0


@dataclass(frozen=True)
class CtcState:
    """Forward variables of N prefixes in a window of W frames, all S of them unless it was cut.

    Attributes:
        log_any: (N, W+1) float64, log (n(t) + b(t)) for t = first..first+W.
        log_b: (N, W+1) float64, log b(t) for the same t.
        last: (N,) the last label of each prefix, -1 for the empty prefix.
        log_y: (N, W) log y(t, last) for t = first+1..first+W, arbitrary for the empty prefix.
        first: where the window begins.
    """

    log_any: Tensor
    log_b: Tensor
    last: Tensor
    log_y: Tensor
    first: int = 0

    @property
    def end(self) -> int:
        """The last t of the window."""
        return self.first + self.log_y.shape[1]

    def select(self, rows: Tensor) -> CtcState:
        """The state of these rows (N,)."""
        log_any, log_b, last, log_y = (part.index_select(0, rows) for part in (self.log_any, self.log_b, self.last, self.log_y))
        return CtcState(log_any, log_b, last, log_y, self.first)

    def cut(self, first: int, end: int) -> CtcState:
        """The state without what lies outside t = first..end, which must lie in the window."""
        start, stop = first - self.first, end - self.first
        log_any, log_b = (part[:, start : stop + 1] for part in (self.log_any, self.log_b))
        return replace(self, log_any=log_any, log_b=log_b, log_y=self.log_y[:, start:stop], first=first)


class CtcForward:
    """The recursion over B utterances with equally many prefixes each, N rows, utterance by utterance; immutable.

    Args:
        log_probs: (B, S, V) CTC log-probabilities; frames beyond the lengths may hold anything.
        enc_lens: (B,) valid frames.
        blank_id: the CTC blank.
        beam: prefixes an utterance of the states that `start` makes.
    """

    def __init__(self, *, log_probs: Tensor, enc_lens: Tensor, blank_id: int, beam: int) -> None:
        self.log_probs, self.enc_lens = log_probs, enc_lens.to(log_probs.device)
        self.blank_id, self.beam = blank_id, beam
        self.valid = torch.arange(log_probs.shape[1], device=log_probs.device) < self.enc_lens.unsqueeze(1)  # (B, S)
        self._utt = torch.arange(len(log_probs), device=log_probs.device).repeat_interleave(beam)
        # (B, V, S). Beyond the end only blank is possible, with probability 1: P(g) is n(S) + b(S) whatever the length.
        self._log_y = log_probs.clamp(min=LOG_ZERO).transpose(1, 2).contiguous()
        self._log_y.masked_fill_(~self.valid.unsqueeze(1), LOG_ZERO)
        self._log_y[:, blank_id].masked_fill_(~self.valid, 0.0)
        self._cum_blank = _cumulative(self._log_y[:, blank_id].to(torch.float64))  # (B, S+1)

    @property
    def frames(self) -> int:
        """S."""
        return self._log_y.shape[2]

    def labels(self, labels: Tensor, first: int = 0, end: int | None = None) -> Tensor:
        """(N, W) float64 log y(t, labels[i]) of each row's utterance, t = first+1..end (all unless they are given)."""
        return self._log_y[:, :, first:end][self._utts(len(labels)), labels].to(torch.float64)

    def _utts(self, num: int) -> Tensor:
        """(N,) the utterance of each of N rows."""
        return self._utt if num == len(self._utt) else self._utt[:: self.beam].repeat_interleave(num // len(self._log_y))

    def start(self, beam: int | None = None) -> CtcState:
        """The state of the empty prefix in every row, `beam` an utterance: all frames so far were blank."""
        cum_blank = self._cum_blank.repeat_interleave(self.beam if beam is None else beam, dim=0)
        last = torch.full((len(cum_blank),), -1, device=cum_blank.device)
        return CtcState(log_any=cum_blank, log_b=cum_blank, last=last, log_y=cum_blank[:, 1:])

    def extend(self, state: CtcState, labels: Tensor, end: int | None = None) -> CtcState:
        """The state after every prefix took one label, (N,), in a window that ends where it did, or later at `end`."""
        end = state.end if end is None else end
        log_y = self.labels(labels, state.first, end)
        log_phi = F.pad(_phi(state, labels), (0, end - state.end), value=-torch.inf)
        log_n = _solve(log_phi, _cumulative(log_y))
        cum_blank = self._cum_blank[:, state.first : end + 1].unsqueeze(1)
        log_b = _solve(log_n[:, :-1].unflatten(0, (len(cum_blank), -1)), cum_blank).flatten(0, 1)
        return CtcState(log_any=torch.logaddexp(log_n, log_b), log_b=log_b, last=labels, log_y=log_y, first=state.first)

    def first_emission(self, state: CtcState, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Where each prefix, taking one label (N,), emits it for the first time; of a state with all frames.

        Returns:
            (N, S) float64 log phi(t, c) y(t, c), -inf beyond the utterance; and (N,) the mean of its frame t, counted from 0.
            A label that cannot be emitted any more counts as emitted in the last frame.
        """
        utts = self._utts(len(labels))
        log_mass = (_phi(state, labels) + self.labels(labels)).masked_fill(~self.valid[utts], -torch.inf)
        impossible = (log_mass == -torch.inf).all(dim=1)
        weights = log_mass.masked_fill(impossible.unsqueeze(1), 0.0).softmax(dim=1)
        mean = weights @ torch.arange(log_mass.shape[1], dtype=weights.dtype, device=weights.device)
        return log_mass, torch.where(impossible, (self.enc_lens[utts] - 1).to(mean.dtype), mean)

    def keep(self, utterances: Tensor) -> CtcForward:
        """The recursion over these utterances (int64 indices into B) only."""
        return CtcForward(
            log_probs=self.log_probs[utterances], enc_lens=self.enc_lens[utterances], blank_id=self.blank_id, beam=self.beam
        )

    def rows_of(self, utterances: Tensor) -> Tensor:
        """The rows of these utterances, `beam` each."""
        return (utterances.unsqueeze(1) * self.beam + torch.arange(self.beam, device=utterances.device)).view(-1)


def _phi(state: CtcState, labels: Tensor) -> Tensor:
    """(N, S) log phi(t, labels[i])."""
    return torch.where((state.last == labels).unsqueeze(1), state.log_b, state.log_any)[:, :-1]


def _cumulative(log_y: Tensor) -> Tensor:
    """(N, S) -> (N, S+1): log Y(t) for t = 0..S."""
    return F.pad(log_y.cumsum(dim=1), (1, 0))


def _solve(log_u: Tensor, log_cum: Tensor) -> Tensor:
    """Solves x(t) = (x(t-1) + u(t)) y(t), x(0) = 0, in logarithms: (..., S), (..., S+1) -> (..., S+1)."""
    inner = torch.logcumsumexp(log_u - log_cum[..., :-1], dim=-1) + log_cum[..., 1:]
    return F.pad(inner, (1, 0), value=-torch.inf)
