"""CTC prefix scores of many hypotheses at once, without a loop over frames, labels, hypotheses or utterances.

With the forward variables n and b of a prefix g, and phi, of speechtx.model.ctc_forward (Watanabe et al. 2017, algorithm 2):

    psi(g c)  = sum over t of phi(t, c) y(t, c)            probability that the labels begin with g c
    P(g)      = n(S) + b(S)                                probability that the labels are exactly g

psi needs the forward variables of g only, so all V extensions are one matrix product, and no candidates have to be chosen
beforehand; forward variables are computed for the survivors alone.

**Long audio.** The probability of a prefix lies in few frames, around the one where its last label was said. Alignments far
behind or far ahead of it are possible, but improbable. Of an audio of more than `SHORT` frames only the window is kept in which
log (n(t) + b(t)) > -depth for any living prefix: a step then costs as much at the end of a long audio as at its beginning.

What this loses is bounded. An alignment of g c is lost if after some t frames it has emitted exactly the first i labels of g, and
t is outside the window that they had. Sort the lost ones by the first such (i, t): those of one pair were whole up to there, so
together they have no more than the probability for which it was left out, exp(-depth). With (|g| + 1) (S + 1) pairs

    psi of the window <= psi <= psi of the window + lost,    log lost = log((|g| + 1) (S + 1)) - depth,

and the same for P. `score` returns the upper bound: what does not survive although it is overrated need not be known better. A
survivor is believed if it is `BELIEVED` above lost, hence exact to exp(-BELIEVED) = 1e-7. If one is in doubt, depth grows, and
the forward variables of the living are computed again from their labels (`restart`), those that they share only once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from speechtx.model.ctc_forward import LOG_ZERO, CtcForward, CtcState

SHORT = 256  # frames of an utterance, or of the longest of a batch, up to which no window pays
DEPTH = 100.0  # natural logarithms; an alignment that misses a label of a trained model loses 5 to 15
DEEPER = 2.0  # times the depth, where it was not enough; where this is not either, all frames are kept
BELIEVED = 16.0
AHEAD = 32  # frames that a label may lie behind the window before the window is widened for it


@dataclass(frozen=True)
class PrefixState:
    """Of N prefixes.

    Attributes:
        forward: their forward variables.
        log_lost: by how much at most psi and P exceed what the forward variables say; -inf: they say it exactly.
    """

    forward: CtcState
    log_lost: float = -math.inf


class CtcPrefixScorer:
    """Prefix scores of B utterances with `beam` hypotheses each, N = B * beam rows, row i belonging to utterance i // beam."""

    def __init__(
        self, *, log_probs: Tensor, enc_lens: Tensor, blank_id: int, beam: int, short: int = SHORT, depth: float = DEPTH
    ) -> None:
        """Prepares the posteriors.

        Args:
            log_probs: (B, S, V) CTC log-probabilities; frames beyond the lengths may hold anything.
            enc_lens: (B,) valid frames.
            blank_id: the CTC blank.
            beam: hypotheses an utterance.
            short: S up to which all frames are kept.
            depth: how improbable an alignment must be to be left out, at first.
        """
        self._forward = CtcForward(log_probs=log_probs, enc_lens=enc_lens, blank_id=blank_id, beam=beam)
        certain_blank = torch.zeros(log_probs.shape[2], dtype=torch.float64, device=log_probs.device)
        certain_blank[blank_id] = 1.0
        y = log_probs.to(torch.float64).clamp(min=LOG_ZERO).exp()
        self._y = torch.where(self._forward.valid.unsqueeze(2), y, certain_blank)
        self._depth = depth if log_probs.shape[1] > short else math.inf
        self._restarted_at = -1  # labels of the prefixes then

    def start(self) -> PrefixState:
        """The state of the empty prefix in every row: all frames so far were blank."""
        return self._cut(PrefixState(self._forward.start()), None)

    def score(self, state: PrefixState) -> tuple[Tensor, Tensor]:
        """Scores every extension of every prefix.

        Returns:
            (N, V) float64 log psi(g c), -inf for blank, and (N,) float64 log P(g), the score if g ends here. Both are
            upper bounds, see `doubtful`.
        """
        forward = state.forward
        phi = forward.log_any[:, :-1]
        # Scaled by the row's maximum: what float64 then loses is below e^-700 of the prefix's own probability.
        scale = phi.amax(dim=1, keepdim=True).clamp(min=-1.0e300)
        y = self._y[:, forward.first : forward.end]
        batch, frames, vocab = y.shape
        mass = (phi - scale).exp().view(batch, -1, frames)
        log_psi = torch.bmm(mass, y).view(-1, vocab).log() + scale
        # A repeated label needs a blank in between.
        last = forward.last.clamp(min=0).unsqueeze(1)
        repeated = torch.logsumexp(forward.log_b[:, :-1] + forward.log_y, dim=1, keepdim=True)
        is_empty = (forward.last < 0).unsqueeze(1)
        log_psi.scatter_(1, last, torch.where(is_empty, log_psi.gather(1, last), repeated))
        log_end = forward.log_any[:, -1]
        if state.log_lost > -math.inf:
            log_psi = _at_most(log_psi, state.log_lost)
            reached = forward.end == self._forward.frames
            log_end = _at_most(log_end if reached else torch.full_like(log_end, -torch.inf), state.log_lost)
        log_psi[:, self._forward.blank_id] = -torch.inf
        return log_psi, log_end

    def is_windowed(self, state: PrefixState) -> bool:
        """Whether scores may be too high at all."""
        return state.log_lost > -math.inf

    def doubtful(self, state: PrefixState, scores: Tensor) -> Tensor:
        """Which of these scores, that `score` gave, may be more than 1e-6 too high."""
        return scores < state.log_lost + BELIEVED

    def extend(self, state: PrefixState, rows: Tensor, labels: Tensor, dead: Tensor | None = None) -> PrefixState:
        """The state after prefix `rows[i]` took label `labels[i]`, for i in 0..N-1 (rows stay within their utterance).

        Args:
            dead: (N,) rows of the result that hold no hypothesis; nothing is kept for them, nor promised.
        """
        return self._extend(state, state.forward.select(rows), labels, dead)

    def restart(self, tokens: Tensor, dead: Tensor) -> PrefixState:
        """The state of given prefixes (B, beam, L), more exact than before; dead (B, beam): slots without one."""
        batch, beam, length = tokens.shape
        self._depth = math.inf if length == self._restarted_at else DEEPER * self._depth
        self._restarted_at = length
        alive = (~dead).to(torch.int8).argmax(dim=1).view(-1, 1, 1).expand(-1, -1, length)
        tokens = torch.where(dead.unsqueeze(2), tokens.gather(1, alive), tokens)  # any that lives: they share the more
        shared = int((tokens == tokens[:, :1]).flatten(0, 1).all(dim=0).to(torch.int64).cumprod(dim=0).sum())
        state = self._cut(PrefixState(self._forward.start(beam=1)), None)
        for labels in tokens[:, 0, :shared].unbind(1):
            state = self._extend(state, state.forward, labels, None)
        rows = torch.arange(batch, device=tokens.device).repeat_interleave(beam)
        state = PrefixState(state.forward.select(rows), state.log_lost)
        for labels in tokens[:, :, shared:].flatten(0, 1).unbind(1):
            state = self._extend(state, state.forward, labels, dead.view(-1))
        return state

    def keep(self, state: PrefixState, utterances: Tensor) -> PrefixState:
        """Drops all utterances but these (int64 indices into B) from the scorer, and from the state that is returned."""
        rows = self._forward.rows_of(utterances)
        self._forward, self._y = self._forward.keep(utterances), self._y[utterances]
        return PrefixState(state.forward.select(rows), state.log_lost)

    def _extend(self, state: PrefixState, forward: CtcState, labels: Tensor, dead: Tensor | None) -> PrefixState:
        """The state `state`, of the prefixes `forward`, after each took one label."""
        frames = self._forward.frames
        ahead = AHEAD
        while True:
            end = frames if math.isinf(self._depth) else min(frames, forward.end + ahead)
            longer = self._forward.extend(forward, labels, end)
            if end == frames or not _among(longer.log_any[:, -1] > -self._depth, dead).any():
                return self._cut(PrefixState(longer, state.log_lost), dead)
            ahead *= 2

    def _cut(self, state: PrefixState, dead: Tensor | None) -> PrefixState:
        """The state in the window that holds what is more probable than exp(-depth) in any living row."""
        if math.isinf(self._depth):
            return state
        forward = state.forward
        kept = _among((forward.log_any > -self._depth).T, dead).any(dim=1).nonzero()
        first, last = (forward.first + int(kept[0]), forward.first + int(kept[-1])) if len(kept) else (forward.first,) * 2
        first = min(first, forward.end - 1)  # one frame at least
        lost = math.log(self._forward.frames + 1) - self._depth
        high, low = max(state.log_lost, lost), min(state.log_lost, lost)
        return PrefixState(forward.cut(first, min(last + 1, forward.end)), high + math.log1p(math.exp(low - high)))


def _among(mask: Tensor, dead: Tensor | None) -> Tensor:
    """mask (..., N) without dead rows (N,)"""
    return mask if dead is None else mask & ~dead


def _at_most(log_p: Tensor, log_lost: float) -> Tensor:
    """log (p + lost); NaN stays."""
    return torch.logaddexp(log_p, log_p.new_tensor(log_lost))
