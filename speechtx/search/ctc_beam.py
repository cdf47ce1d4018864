"""CTC prefix beam search, frame by frame, batched over utterances and prefixes.

For every prefix g in the beam (Graves 2012, "Supervised Sequence Labelling with Recurrent Neural Networks", section 7.5.3; Hannun
et al. 2014, "First-Pass Large Vocabulary Continuous Speech Recognition using Bi-Directional Recurrent DNNs") two probabilities
are carried: that the frames so far emit g and end in its last label, n, or in blank, b. One frame with posteriors y makes them

    b'(g)   = (n(g) + b(g)) y(blank)
    n'(g)   = (n(g) + phi(h, last g)) y(last g)     with g = h last(g), and no phi if h is not in the beam
    n'(g c) = phi(g, c) y(c)                        for g c that is not in the beam
    phi(g, c) = b(g) + [c != last(g)] n(g)

and the `beam` best of all survive, by log(n + b) + weighted language models + hot words + length bonus. The same prefix is never
there twice (`speechtx.search.prefix_tree`).

Only labels that could displace a prefix of the beam are looked at, which changes no result: a frame in which blank is nearly
certain has none, and costs a few operations. `speechtx.search.ctc_beam_reference` is the same search written plainly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from speechtx.config.decode import DecodeConfig
from speechtx.search.hypothesis import Hypothesis
from speechtx.search.prefix_scores import PrefixScores
from speechtx.search.prefix_tree import PrefixTree, Survivors
from speechtx.search.scorers import NO_SCORERS, Scorers


def ctc_beam_search(
    log_probs: Tensor,
    enc_lens: Tensor,
    config: DecodeConfig,
    scorers: Scorers = NO_SCORERS,
    *,
    blank_id: int,
    sos_eos_id: int,
) -> list[list[Hypothesis]]:
    """Searches a batch. The result of an utterance does not depend on the others of its batch.

    Time grows linearly with frames; beside the posteriors, 16 * beam bytes are held for every frame of every utterance.

    Args:
        log_probs: (B, S, V) CTC log-probabilities; frames beyond the lengths may hold anything.
        enc_lens: (B,) valid frames.
        config: beam, nbest, length_bonus, max_len_ratio and the weights of scorers. The weight of CTC is 1.
        scorers: language models and hot words.
        blank_id: the CTC blank.
        sos_eos_id: never emitted; language models score it as the end of the sentence.

    Returns:
        For every utterance at most `config.nbest` hypotheses, best first; none if its posteriors hold NaN or allow nothing. Their
        `ctc` sums the alignments that stayed in the beam, a lower bound of log P_ctc(tokens) that a larger beam tightens.

    Raises:
        ConfigError: see `Scorers.weighted`.
    """
    with torch.inference_mode():
        search = _CtcBeam(log_probs, enc_lens, config, scorers, blank_id=blank_id, sos_eos_id=sos_eos_id)
        for t in range(log_probs.shape[1]):
            search.frame(t)
        return search.results()


class _CtcBeam:
    """One search over one batch. All (B, K) tensors are of the K slots of the beam; one without a prefix has n = b = 0."""

    def __init__(
        self, log_probs: Tensor, enc_lens: Tensor, config: DecodeConfig, scorers: Scorers, *, blank_id: int, sos_eos_id: int
    ) -> None:
        self.config, self.log_probs, self.blank_id = config, log_probs, blank_id
        batch, frames, vocab = log_probs.shape
        device = log_probs.device
        enc_lens = enc_lens.to(device)
        broken = _not_finite(log_probs, enc_lens)
        self.lens = enc_lens.masked_fill(broken, 0)
        self.max_len = (enc_lens.to(torch.float64) * config.max_len_ratio).long().clamp(min=1).unsqueeze(1)
        self.never_emitted = torch.tensor([blank_id, sos_eos_id], device=device)
        self.certain_blank = torch.full((vocab,), -torch.inf, dtype=torch.float64, device=device)
        self.certain_blank[blank_id] = 0.0

        self.tree = PrefixTree(batch=batch, beam=config.beam, frames=frames, blank_id=blank_id, device=device)
        self.log_n = torch.full((batch, config.beam), -torch.inf, dtype=torch.float64, device=device)
        self.log_b = self.log_n.clone()
        self.log_b[:, 0] = torch.where(broken, -torch.inf, 0.0)
        self.beside = torch.zeros_like(self.log_n)  # what is added to the logarithm of n + b
        self.weighted = scorers.weighted(config, vocab_size=vocab)
        self.scores: PrefixScores | None = None
        if self.weighted:
            self.scores = PrefixScores(scorers=self.weighted, batch=batch, beam=config.beam, sos_eos_id=sos_eos_id, device=device)

    def frame(self, t: int) -> None:
        """Takes frame t. Beyond its end an utterance goes on with blanks of probability 1, which change nothing."""
        y = torch.where((t < self.lens).unsqueeze(1), self.log_probs[:, t].to(torch.float64), self.certain_blank)  # (B, V)
        tree = self.tree
        total = torch.logaddexp(self.log_n, self.log_b)
        parent = tree.parent.clamp(min=0)
        phi = torch.where(tree.last.gather(1, parent) == tree.last, self.log_b.gather(1, parent), total.gather(1, parent))
        log_n = torch.logaddexp(self.log_n, phi.masked_fill(tree.parent < 0, -torch.inf)) + y.gather(1, tree.last)
        log_b = total + y[:, self.blank_id].unsqueeze(1)
        y.index_fill_(1, self.never_emitted, -torch.inf)
        staying = torch.logaddexp(log_n, log_b) + self.beside
        count = self._count_labels(y, total, staying)
        if count:
            log_y, labels = y.topk(count, dim=1)
            log_n, log_b = self._grow(total, staying, log_n, log_b, log_y=log_y, labels=labels)
        self.log_n, self.log_b = log_n, log_b

    def _count_labels(self, y: Tensor, total: Tensor, staying: Tensor) -> int:
        """How many of each utterance's best labels could grow a prefix that displaces one that stays, in any utterance."""
        best = total + self.beside
        if self.scores is not None:
            best = best + self.scores.best()
        # NaN, of utterances that allow nothing, is above no threshold and above by nothing.
        threshold = staying.amin(dim=1) - best.amax(dim=1) - self.config.length_bonus
        count = int((y > threshold.unsqueeze(1)).sum(dim=1).amax())
        # Without scorers all prefixes grow best by the same labels, but for the one that each would repeat.
        return min(count, self.config.beam + 1) if self.scores is None else count

    def _grow(
        self, total: Tensor, staying: Tensor, log_n: Tensor, log_b: Tensor, *, log_y: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Lets prefixes that stay compete with those that grow by one of the labels (B, C); returns n and b of the winners."""
        beam, count = self.config.beam, labels.shape[1]
        repeats = self.tree.last.unsqueeze(2) == labels.unsqueeze(1)  # (B, K, C)
        grown_n = torch.where(repeats, self.log_b.unsqueeze(2), total.unsqueeze(2)) + log_y.unsqueeze(1)
        grown_n = self._without_known(grown_n, repeats)
        grown_n.masked_fill_((self.tree.length >= self.max_len).unsqueeze(2), -torch.inf)
        score = grown_n + (self.beside + self.config.length_bonus).unsqueeze(2)
        if self.scores is not None:
            score = score + self.scores.weighted(labels)
            score.masked_fill_(score.isnan(), -torch.inf)
        score, pick = torch.cat([staying, score.flatten(1)], dim=1).topk(beam, dim=1)
        other = (pick - beam).clamp(min=0)
        alive = score > -torch.inf
        grown = (pick >= beam) & alive
        new = Survivors(
            source=torch.where(pick < beam, pick, other // count), label=labels.gather(1, other % count), grown=grown, alive=alive
        )
        self.beside = self.beside.gather(1, new.source) + grown * self.config.length_bonus
        if self.scores is not None:
            self.beside = self.beside + self.scores.advance(new)
        self.tree.advance(new)
        new_n = torch.cat([log_n, grown_n.flatten(1)], dim=1).gather(1, pick)
        return new_n.masked_fill(~alive, -torch.inf), log_b.gather(1, new.source).masked_fill(grown | ~alive, -torch.inf)

    def _without_known(self, grown_n: Tensor, repeats: Tensor) -> Tensor:
        """Removes from (B, K, C) what is in the beam already: it got its share there. `repeats`: a label is the slot's last."""
        batch, beam, count = grown_n.shape
        known = repeats.any(dim=2) & (self.tree.parent >= 0)
        place = torch.where(known, self.tree.parent * count + repeats.to(torch.int8).argmax(dim=2), beam * count)
        flat = torch.cat([grown_n.flatten(1), grown_n.new_empty((batch, 1))], dim=1)
        return flat.scatter_(1, place, -torch.inf)[:, :-1].view_as(grown_n)

    def results(self) -> list[list[Hypothesis]]:
        """The n best of every utterance, after its last frame."""
        ctc = torch.logaddexp(self.log_n, self.log_b)
        score = ctc + self.beside
        parts = ctc.new_zeros((*ctc.shape, 0))
        if self.scores is not None:
            end, parts = self.scores.finish()
            score = score + end
        score, slots = score.masked_fill(score.isnan(), -torch.inf).topk(self.config.nbest, dim=1)
        labels, lengths = self.tree.labels(slots)
        parts = parts.gather(1, slots.unsqueeze(2).expand(-1, -1, parts.shape[2]))
        columns = [tensor.tolist() for tensor in (score, ctc.gather(1, slots), parts, labels, lengths)]
        return [
            [self._hypothesis(*slot) for slot in zip(*row, strict=True) if slot[0] > -torch.inf]
            for row in zip(*columns, strict=True)
        ]

    def _hypothesis(self, score: float, ctc: float, parts: list[float], labels: list[int], length: int) -> Hypothesis:
        named: dict[str, Any] = {scorer.name: part for scorer, part in zip(self.weighted, parts, strict=True)}
        return Hypothesis(
            tokens=tuple(labels[:length]), score=score, ctc=ctc, length_bonus=self.config.length_bonus * length, **named
        )


def _not_finite(log_probs: Tensor, enc_lens: Tensor) -> Tensor:
    """(B,) whether a valid frame holds NaN or +inf."""
    valid = torch.arange(log_probs.shape[1], device=log_probs.device) < enc_lens.unsqueeze(1)
    return (valid & ~(log_probs.amax(dim=2) < torch.inf)).any(dim=1)
