"""Joint CTC/attention beam search, batched over utterances and hypotheses.

Label-synchronous search as in Watanabe et al. 2017: a partial hypothesis g of L tokens scores
(1 - w) log P_att(g) + w log psi_ctc(g) + L * length_bonus, a finished one the same with P_att(g, end) and P_ctc(g). In every
step the `beam` best of all extensions of all live hypotheses survive, end of sentence competing like any token; those that
ended leave the beam. `speechtx.search.reference` is the same search written plainly, one hypothesis at a time.

Tensors hold N = B * beam rows, row i belonging to utterance i // beam. A slot without a live hypothesis scores -inf.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from speechtx.config.decode import DecodeConfig
from speechtx.config.errors import ConfigError
from speechtx.model.ctc_forward import CtcState
from speechtx.model.decoder import DecoderState
from speechtx.model.recognizer import Recognizer
from speechtx.search.ctc_prefix import CtcPrefixScorer
from speechtx.search.hypothesis import Hypothesis
from speechtx.search.scorers import NO_SCORERS, Scorers

_RETIRE_SHARE = 4  # done utterances leave the batch once they are at least one in so many


@dataclass
class _Beam:
    """Hypotheses of the batch: (B, K) scores and parts, (B, K, L) tokens, (B, K) lengths."""

    score: Tensor
    att: Tensor
    ctc: Tensor
    tokens: Tensor
    lengths: Tensor

    def select(self, slots: Tensor) -> _Beam:
        """Keeps slots (B, k) of every utterance."""
        return _Beam(
            score=self.score.gather(1, slots),
            att=self.att.gather(1, slots),
            ctc=self.ctc.gather(1, slots),
            tokens=self.tokens.gather(1, slots.unsqueeze(2).expand(-1, -1, self.tokens.shape[2])),
            lengths=self.lengths.gather(1, slots),
        )

    def keep(self, utterances: Tensor) -> _Beam:
        """Keeps these utterances, given as indices or as a mask."""
        parts = (self.score, self.att, self.ctc, self.tokens, self.lengths)
        return _Beam(*(part[utterances] for part in parts))

    def best_of(self, other: _Beam, keep: int) -> _Beam:
        """The `keep` best of both."""
        both = _Beam(
            score=torch.cat([self.score, other.score], dim=1),
            att=torch.cat([self.att, other.att], dim=1),
            ctc=torch.cat([self.ctc, other.ctc], dim=1),
            tokens=torch.cat([self.tokens, other.tokens], dim=1),
            lengths=torch.cat([self.lengths, other.lengths], dim=1),
        )
        return both.select(both.score.topk(keep, dim=1).indices)


def check_weights(model: Recognizer, config: DecodeConfig) -> None:
    """Refuses a search that needs a decoder the model does not have.

    Raises:
        ConfigError: `ctc_weight` below 1 with a model that has no decoder.
    """
    if model.decoder is None and config.method == "beam" and config.ctc_weight < 1.0:
        raise ConfigError(
            f"ctc_weight {config.ctc_weight} needs a decoder, but this model has decoder.layers 0; set ctc_weight: 1.0"
        )


def beam_search(
    model: Recognizer, enc_out: Tensor, enc_lens: Tensor, config: DecodeConfig, scorers: Scorers = NO_SCORERS
) -> list[list[Hypothesis]]:
    """Searches a batch of encoded utterances.

    The search ends when no live hypothesis can still enter the n best of its utterance, which is exact: CTC prefix and attention
    scores never rise as a hypothesis grows, and the bonus it may still collect is bounded by the greatest length. The result of
    an utterance does not depend on the others of its batch.

    Args:
        model: in evaluation mode; `model.decoder` may be None when `config.ctc_weight` is 1.
        enc_out: (B, S, D) encoder output.
        enc_lens: (B,) valid frames, each at least 1.
        config: beam, weights, lengths.
        scorers: language models and hot words that the configuration weighs.

    Returns:
        For every utterance at most `config.nbest` hypotheses, best first; none if every score came out as -inf or NaN.

    Raises:
        ConfigError: see `check_weights`.
    """
    check_weights(model, config)
    with torch.inference_mode():
        search = _BeamSearch(model=model, enc_out=enc_out, enc_lens=enc_lens, config=config)
        step = 0
        while search.batch:
            search.step(step)
            step += 1
            search.retire(search.done(step))
        return search.results


class _BeamSearch:
    """One search over one batch, which shrinks as utterances are done."""

    def __init__(self, *, model: Recognizer, enc_out: Tensor, enc_lens: Tensor, config: DecodeConfig) -> None:
        self.config = config
        self.device = enc_out.device
        self.batch, self.beam = len(enc_out), config.beam
        self.blank_id, self.end_id = model.blank_id, model.sos_eos_id
        self.max_len = (enc_lens.to(self.device, torch.float64) * config.max_len_ratio).long().clamp(min=1)
        self.offsets = torch.arange(self.batch, device=self.device).unsqueeze(1) * self.beam  # first row of every utterance

        self.decoder = model.decoder if config.ctc_weight < 1 else None
        log_probs = None  # computed once, for the prefix scores and for a penalty whose axis CTC measures
        if config.ctc_weight > 0 or (self.decoder is not None and self.decoder.needs_ctc):
            log_probs = model.ctc_log_probs(enc_out)
        self.scorer: CtcPrefixScorer | None = None
        self.ctc_state: CtcState | None = None
        if config.ctc_weight > 0:
            assert log_probs is not None
            self.scorer = CtcPrefixScorer(log_probs=log_probs, enc_lens=enc_lens, blank_id=self.blank_id, beam=self.beam)
            self.ctc_state = self.scorer.start()
        self.decoder_state: DecoderState | None = None
        if self.decoder is not None:
            self.decoder_state = self.decoder.start(enc_out, enc_lens, beam=self.beam, ctc_log_probs=log_probs)
        self.last = torch.full((self.batch * self.beam,), self.end_id, device=self.device)  # every sentence starts with it

        self.active = self._empty(self.beam)
        self.active.score[:, 0] = 0.0
        self.finished = self._empty(config.nbest)
        self.utts = torch.arange(self.batch, device=self.device)  # where each row of the shrinking batch came from
        self.results: list[list[Hypothesis]] = [[] for _ in range(self.batch)]

    def _empty(self, slots: int) -> _Beam:
        score = torch.full((self.batch, slots), -torch.inf, dtype=torch.float64, device=self.device)
        tokens = torch.zeros((self.batch, slots, int(self.max_len.max()) + 1), dtype=torch.int64, device=self.device)
        lengths = torch.zeros((self.batch, slots), dtype=torch.int64, device=self.device)
        return _Beam(score, torch.zeros_like(score), torch.zeros_like(score), tokens, lengths)

    def step(self, step: int) -> None:
        """Extends hypotheses of `step` tokens by one token or by the end of the sentence."""
        config = self.config
        att, ctc = self._extension_scores()  # (B, beam, V) cumulative parts
        total = torch.full_like(self.active.score, config.length_bonus * (step + 1)).unsqueeze(2)
        if att is not None:
            total = total + (1 - config.ctc_weight) * att
        if ctc is not None:
            total = total + config.ctc_weight * ctc
        total[:, :, self.end_id] -= config.length_bonus  # the end is no token
        total = total.masked_fill((self.active.score == -torch.inf).unsqueeze(2) | total.isnan(), -torch.inf)
        total[:, :, self.blank_id] = -torch.inf
        self._end_at_max_len(total, step)

        vocab = total.shape[2]
        score, flat = total.view(self.batch, -1).topk(self.beam, dim=1)
        slots, labels = flat // vocab, flat % vocab
        ended = labels == self.end_id
        new = self.active.select(slots)
        new.score = score
        for name, part in (("att", att), ("ctc", ctc)):
            if part is not None:
                setattr(new, name, part.reshape(self.batch, -1).gather(1, flat))
        new.tokens[:, :, step] = labels
        new.lengths = torch.where(ended, step, step + 1)
        just_finished = _Beam(score.masked_fill(~ended, -torch.inf), new.att, new.ctc, new.tokens, new.lengths)
        self.finished = self.finished.best_of(just_finished, config.nbest)
        new.score = score.masked_fill(ended, -torch.inf)
        self.active = new
        self._advance_states(slots, labels)

    def _extension_scores(self) -> tuple[Tensor | None, Tensor | None]:
        att = ctc = None
        shape = (self.batch, self.beam, -1)
        if self.decoder is not None:
            assert self.decoder_state is not None
            log_probs, self.decoder_state = self.decoder.step(self.last, self.decoder_state)
            att = self.active.att.unsqueeze(2) + log_probs.view(shape).to(torch.float64)
        if self.scorer is not None:
            assert self.ctc_state is not None
            log_psi, log_end = self.scorer.score(self.ctc_state)
            log_psi[:, self.end_id] = log_end
            ctc = log_psi.view(shape)
        return att, ctc

    def _end_at_max_len(self, total: Tensor, step: int) -> None:
        """Leaves utterances that reached their greatest length nothing but the end, in place."""
        at_limit = step >= self.max_len
        ends = total[:, :, self.end_id].clone()
        total.masked_fill_(at_limit.view(-1, 1, 1), -torch.inf)
        total[:, :, self.end_id] = ends

    def _advance_states(self, slots: Tensor, labels: Tensor) -> None:
        rows, labels = (self.offsets + slots).view(-1), labels.reshape(-1)
        if self.decoder_state is not None:
            self.decoder_state = self.decoder_state.select(rows)
        if self.scorer is not None and self.ctc_state is not None:
            self.ctc_state = self.scorer.extend(self.ctc_state, rows, labels)
        self.last = labels

    def done(self, length: int) -> Tensor:
        """(B,) whether no live hypothesis, now of `length` tokens, can still enter the n best of its utterance."""
        to_gain = max(0.0, self.config.length_bonus) * (self.max_len - length).clamp(min=0)
        reachable = self.active.score.amax(dim=1) + to_gain
        return (reachable == -torch.inf) | (reachable <= self.finished.score[:, -1])

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
        if self.decoder_state is not None:
            self.decoder_state = self.decoder_state.keep(remaining)
        if self.scorer is not None and self.ctc_state is not None:
            self.ctc_state = self.scorer.keep(self.ctc_state, remaining)
        self.last = self.last.view(self.batch, self.beam)[remaining].view(-1)
        self.active, self.finished = self.active.keep(remaining), self.finished.keep(remaining)
        self.max_len, self.utts = self.max_len[remaining], self.utts[remaining]
        self.batch = len(remaining)
        self.offsets = self.offsets[: self.batch]

    def _collect(self, done: Tensor) -> None:
        """Turns the finished hypotheses of utterances `done` into results, best first."""
        beam = self.finished.keep(done)
        columns = (beam.score.tolist(), beam.att.tolist(), beam.ctc.tolist(), beam.tokens.tolist(), beam.lengths.tolist())
        for utt, *parts in zip(self.utts[done].tolist(), *columns, strict=True):
            self.results[utt] = [self._hypothesis(*slot) for slot in zip(*parts, strict=True) if slot[0] > -torch.inf]

    def _hypothesis(self, score: float, att: float, ctc: float, tokens: list[int], length: int) -> Hypothesis:
        return Hypothesis(
            tokens=tuple(tokens[:length]),
            score=score,
            ctc=ctc if self.scorer is not None else None,
            att=att if self.decoder is not None else None,
            length_bonus=self.config.length_bonus * length,
        )
