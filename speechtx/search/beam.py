"""Joint CTC/attention beam search, batched over utterances and hypotheses.

Label-synchronous search as in Watanabe et al. 2017: a partial hypothesis g of L tokens scores

    (1 - w) log P_att(g) + w log psi_ctc(g) + v_lm log P_lm(g) + v_ngram log P_ngram(g) + hot words + coverage + L * length_bonus

and a finished one the same with P(g, end) of decoder and language models and P_ctc(g). In every step the `beam` best of all
extensions of all live hypotheses survive, end of sentence competing like any token; those that ended leave the beam.
`speechtx.search.reference` is the same search written plainly, one hypothesis at a time. docs/decoding.md explains every key.

Tensors hold N = B * beam rows, row i belonging to utterance i // beam. A slot without a live hypothesis scores -inf.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from speechtx.config.decode import DecodeConfig
from speechtx.config.errors import ConfigError
from speechtx.model.recognizer import Recognizer
from speechtx.search.beam_state import Beam, gather_slots
from speechtx.search.hypothesis import Hypothesis
from speechtx.search.joint_scores import JointScores
from speechtx.search.repeats import Repeats
from speechtx.search.scorers import NO_SCORERS, Scorers

_RETIRE_SHARE = 4  # done utterances leave the batch once they are at least one in so many
FAR_BELOW = 10.0  # of end detection `recent`, natural logarithm
LENGTHS_FAR_BELOW = 3


def check_weights(model: Recognizer, config: DecodeConfig) -> None:
    """Refuses a search that needs a decoder the model does not have.

    Raises:
        ConfigError: `ctc_weight` below 1 with a model that has no decoder.
    """
    if config.method != "beam":
        return
    if model.decoder is None and config.ctc_weight < 1.0:
        raise ConfigError(
            f"ctc_weight {config.ctc_weight} needs a decoder, but this model has decoder.layers 0; set ctc_weight: 1.0"
        )


def beam_search(
    model: Recognizer, enc_out: Tensor, enc_lens: Tensor, config: DecodeConfig, scorers: Scorers = NO_SCORERS
) -> list[list[Hypothesis]]:
    """Searches a batch of encoded utterances.

    With `end_detection: exact` the search ends when no live hypothesis can still enter the n best of its utterance: the log
    probabilities of decoder, CTC prefixes and language models never rise as a hypothesis grows, and what bonuses may still add is
    bounded by the greatest length. The result of an utterance does not depend on the others of its batch.

    Args:
        model: in evaluation mode; `model.decoder` may be None when `config.ctc_weight` is 1.
        enc_out: (B, S, D) encoder output.
        enc_lens: (B,) valid frames, each at least 1.
        config: beam, weights, lengths.
        scorers: language models and hot words that the configuration weighs.

    Returns:
        For every utterance at most `config.nbest` hypotheses, best first; none if every score came out as -inf or NaN.

    Raises:
        ConfigError: see `check_weights` and `Scorers.weighted`.
    """
    check_weights(model, config)
    with torch.inference_mode():
        search = _BeamSearch(model=model, enc_out=enc_out, enc_lens=enc_lens, config=config, scorers=scorers)
        while search.batch:
            search.step()
            search.retire(search.done())
        return search.results


class _BeamSearch:
    """One search over one batch, which shrinks as utterances are done."""

    def __init__(self, *, model: Recognizer, enc_out: Tensor, enc_lens: Tensor, config: DecodeConfig, scorers: Scorers) -> None:
        self.config = config
        self.device = enc_out.device
        self.batch, self.beam = len(enc_out), config.beam
        self.blank_id, self.end_id = model.blank_id, model.sos_eos_id
        self.scores = JointScores(
            model=model,
            enc_out=enc_out,
            enc_lens=enc_lens,
            config=config,
            scorers=scorers.weighted(config, vocab_size=model.sos_eos_id + 1),
        )
        self.frames = enc_lens.to(self.device, torch.float64)
        self._set_limits()
        self.offsets = torch.arange(self.batch, device=self.device).unsqueeze(1) * self.beam  # first row of every utterance
        self.length = 0  # tokens of every live hypothesis
        num_parts = len(self.scores.names)
        self.active = Beam.empty(self.batch, self.beam, num_parts, self.device)
        self.active.score[:, 0] = 0.0
        self.last = torch.full((self.batch * self.beam,), self.end_id, device=self.device)  # every sentence starts with it
        self.repeats = Repeats.start(self.batch * self.beam, limit=config.max_repeats, device=self.device)
        self.finished = Beam.empty(self.batch, config.nbest, num_parts, self.device)
        self.best_ended = self.frames.new_full((self.batch,), -torch.inf)  # before length normalisation
        self.far_below = torch.zeros((self.batch,), dtype=torch.int64, device=self.device)  # lengths in a row
        self.utts = torch.arange(self.batch, device=self.device)  # where each row of the shrinking batch came from
        self.results: list[list[Hypothesis]] = [[] for _ in range(self.batch)]

    def _set_limits(self) -> None:
        self.max_len = (self.frames * self.config.max_len_ratio).long().clamp(min=1)
        self.min_len = (self.frames * self.config.min_len_ratio).long()
        self.first_at_limit, self.last_at_minimum = int(self.max_len.min()), int(self.min_len.max())

    def step(self) -> None:
        """Extends all live hypotheses by one token or by the end of the sentence."""
        dead = self.active.score == -torch.inf
        score, flat = self._best(self.scores.extend(self.last, self.active.parts, dead))
        while self.scores.doubtful(score, flat):
            score, flat = self._best(self.scores.extend_again(self.active.tokens, dead))
        vocab = self.end_id + 1
        slots, labels = flat // vocab, flat % vocab
        tokens = torch.cat([gather_slots(self.active.tokens, slots), labels.unsqueeze(2)], dim=2)
        new = Beam(score, self.scores.parts_of(slots, flat), tokens, torch.full_like(labels, self.length + 1))
        ended = labels == self.end_id
        if ended.any() or self.config.end_detection == "recent":
            self._finish(new, ended)
            new.score = score.masked_fill(ended, -torch.inf)
        self.active = new
        self.last = labels.view(-1)
        rows = (self.offsets + slots).view(-1)
        self.scores.follow(rows, self.last, (new.score == -torch.inf).view(-1))
        if self.config.max_repeats:
            self.repeats = self.repeats.select(rows).append(self.last)
        self.length += 1

    def _best(self, total: Tensor) -> tuple[Tensor, Tensor]:
        """(B, beam) the scores of the best extensions, and where they stand among the beam * V of their utterance."""
        self._forbid(total)
        return total.view(self.batch, -1).topk(self.beam, dim=1)

    def _forbid(self, total: Tensor) -> None:
        """Adds the bonus for length and sets to -inf, in place, what must not follow: (B, beam, V)."""
        config = self.config
        if config.length_bonus:
            total += config.length_bonus * (self.length + 1)
            total[:, :, self.end_id] -= config.length_bonus  # the end is no token
        total[:, :, self.blank_id] = -torch.inf
        if self.length < self.last_at_minimum:
            total[:, :, self.end_id].masked_fill_((self.length < self.min_len).unsqueeze(1), -torch.inf)
        if self.length >= self.first_at_limit:
            at_limit = (self.length >= self.max_len).view(-1, 1, 1)
            total[:, :, : self.end_id].masked_fill_(at_limit, -torch.inf)  # which is the last column
        if config.max_repeats:
            self.repeats.forbid(total.view(self.batch * self.beam, -1))

    def _finish(self, new: Beam, ended: Tensor) -> None:
        """Enters those of the new hypotheses that ended among the finished."""
        score = new.score.masked_fill(~ended, -torch.inf)
        normalised = score / (self.length + 1) ** self.config.length_normalization
        lengths = torch.full_like(new.lengths, self.length)
        self.finished = self.finished.best_of(Beam(normalised, new.parts, new.tokens, lengths))
        if self.config.end_detection == "recent":
            best = score.amax(dim=1)
            self.best_ended = torch.maximum(self.best_ended, best)
            live = new.score.masked_fill(ended, -torch.inf).amax(dim=1)
            is_below = torch.maximum(best, live) < self.best_ended - FAR_BELOW
            self.far_below = torch.where(is_below, self.far_below + 1, 0)

    def done(self) -> Tensor:
        """(B,) whether no live hypothesis can still enter the n best of its utterance, or is not expected to."""
        reachable = self._reachable().amax(dim=1)
        done = (reachable == -torch.inf) | (reachable <= self.finished.score[:, -1])
        if self.config.end_detection == "recent":
            done |= self.far_below >= LENGTHS_FAR_BELOW
        return done

    def _reachable(self) -> Tensor:
        """(B, beam) what no descendant of a live hypothesis can score more than."""
        config = self.config
        reachable = self.active.score
        remaining = (self.max_len - self.length).clamp(min=0).unsqueeze(1)
        bonus = config.length_bonus
        if "hot_words" in self.scores.names:
            bonus += config.hot_word_bonus  # at most, of each token
        if bonus > 0:
            reachable = reachable + bonus * remaining
        if "coverage" in self.scores.names:
            covered = self.active.parts[:, :, self.scores.names.index("coverage")]
            reachable = reachable + config.coverage_weight * (self.frames.unsqueeze(1) - covered)
        if config.length_normalization:
            # A sum below 0 gains by being divided by more, one above 0 by being divided by less.
            longest = (self.length + 1 + remaining) ** config.length_normalization
            shortest = (self.length + 1) ** config.length_normalization
            reachable = torch.where(reachable < 0, reachable / longest, reachable / shortest)
        return reachable

    def retire(self, done: Tensor) -> None:
        """Moves utterances that are done from the batch to the results, once they are worth the copy of what remains."""
        count = int(done.sum())
        if count * _RETIRE_SHARE < self.batch:
            return
        self._collect(done)
        if count == self.batch:
            self.batch = 0
            return
        remaining = (~done).nonzero().squeeze(1)
        rows = (self.offsets[remaining] + torch.arange(self.beam, device=self.device)).view(-1)
        self.scores.keep(remaining)
        self.last, self.repeats = self.last[rows], self.repeats.select(rows)
        self.active, self.finished = self.active.keep(remaining), self.finished.keep(remaining)
        self.best_ended, self.far_below = self.best_ended[remaining], self.far_below[remaining]
        self.frames, self.utts = self.frames[remaining], self.utts[remaining]
        self._set_limits()
        self.batch = len(remaining)
        self.offsets = self.offsets[: self.batch]

    def _collect(self, done: Tensor) -> None:
        """Turns the finished hypotheses of utterances `done` into results, best first."""
        beam = self.finished.keep(done)
        columns = (beam.score.tolist(), beam.parts.tolist(), beam.tokens.tolist(), beam.lengths.tolist())
        for utt, *slots in zip(self.utts[done].tolist(), *columns, strict=True):
            self.results[utt] = [self._hypothesis(*slot) for slot in zip(*slots, strict=True) if slot[0] > -torch.inf]

    def _hypothesis(self, score: float, parts: list[float], tokens: list[int], length: int) -> Hypothesis:
        named: dict[str, Any] = dict(zip(self.scores.names, parts, strict=True))
        return Hypothesis(tokens=tuple(tokens[:length]), score=score, length_bonus=self.config.length_bonus * length, **named)
