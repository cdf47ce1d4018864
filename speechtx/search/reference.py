"""The beam search of `speechtx.search.beam` written plainly: one utterance, one hypothesis, one extension at a time.

No caches and no batches: decoder and language models read every prefix from its start, and CTC scores come from the textbook
forward algorithm, run from the first frame for every single extension. Slow on purpose; tests tie the fast search to it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from speechtx.attention.kernels import attention_weights
from speechtx.attention.multihead import split_heads
from speechtx.config.decode import DecodeConfig
from speechtx.model.ensemble import Ensemble
from speechtx.model.recognizer import Recognizer
from speechtx.search.hypothesis import Hypothesis
from speechtx.search.scorers import NO_SCORERS, Scorers


def ctc_log_prob(log_probs: np.ndarray, labels: Sequence[int], *, blank_id: int, prefix: bool) -> float:
    """log-probability that CTC emits `labels`, or with `prefix` anything that begins with `labels`, in float64.

    The forward algorithm of Graves et al. 2006 over blank l1 blank l2 ... lU blank. Once lU has been emitted for the first time
    the labels begin with the prefix whatever follows, so its probability is the sum of those first arrivals.

    Args:
        log_probs: (S, V) CTC log-probabilities.
        labels: U labels without blank.
        blank_id: the CTC blank.
        prefix: whether more labels may follow.
    """
    if prefix and not labels:
        return 0.0
    extended = [blank_id]
    for label in labels:
        extended += [label, blank_id]
    last = len(extended) - 2  # where l_U stands
    alpha = [-math.inf] * len(extended)  # probability of being at each position after the frames so far
    arrivals = -math.inf
    for t, frame in enumerate(np.asarray(log_probs, dtype=np.float64)):
        new = [-math.inf] * len(extended)
        for i, label in enumerate(extended):
            sources = [alpha[i]]
            if i >= 1:
                sources.append(alpha[i - 1])
            if i >= 2 and label != blank_id and label != extended[i - 2]:
                sources.append(alpha[i - 2])
            if t == 0:
                sources = [0.0 if i < 2 else -math.inf]
            new[i] = _log_add(*sources) + float(frame[label])
            if i == last:
                arrivals = _log_add(arrivals, _log_add(*sources[0 if t == 0 else 1 :]) + float(frame[label]))
        alpha = new
    return arrivals if prefix else _log_add(*alpha[-2:])


def reference_search(model: Recognizer, enc_out: Tensor, config: DecodeConfig, scorers: Scorers = NO_SCORERS) -> list[Hypothesis]:
    """Searches one utterance to its greatest length; the counterpart of one row of `beam_search`.

    Args:
        model: in evaluation mode.
        enc_out: (S, D) encoder output without padding.
        config: as for `beam_search`; with `end_detection: exact`.
        scorers: as for `beam_search`.

    Returns:
        At most `config.nbest` hypotheses, best first.
    """
    search = _Reference(model=model, enc_out=enc_out, config=config, scorers=scorers)
    min_len = int(len(enc_out) * config.min_len_ratio)
    max_len = max(1, int(len(enc_out) * config.max_len_ratio))
    active = [search.scored((), ended=False)]
    finished: list[Hypothesis] = []
    for length in range(max_len + 1):
        extensions: list[tuple[Hypothesis, bool]] = []
        for hypothesis in active:
            tokens = hypothesis.tokens
            if length >= min_len:
                extensions.append((search.scored(tokens, ended=True), True))
            for token in range(model.sos_eos_id):
                longer = (*tokens, token)
                if token != model.blank_id and length < max_len and not _stutters(longer, config.max_repeats):
                    extensions.append((search.scored(longer, ended=False), False))
        survivors = [e for e in sorted(extensions, key=lambda e: -e[0].score)[: config.beam] if e[0].score > -math.inf]
        finished += [hypothesis for hypothesis, ended in survivors if ended]
        active = [hypothesis for hypothesis, ended in survivors if not ended]
    ranked = [replace(h, score=h.score / (len(h.tokens) + 1) ** config.length_normalization) for h in finished]
    return sorted(ranked, key=lambda h: -h.score)[: config.nbest]


class _Reference:
    """Scores any hypothesis of one utterance from nothing but its tokens."""

    def __init__(self, *, model: Recognizer, enc_out: Tensor, config: DecodeConfig, scorers: Scorers) -> None:
        self.model, self.enc_out, self.config = model, enc_out, config
        self.scorers = scorers.weighted(config, vocab_size=model.sos_eos_id + 1)
        outputs = model.ctc_outputs(enc_out.unsqueeze(0)) if config.ctc_weight > 0 else []  # several of an ensemble
        self.ctc = [log_probs[0].detach().double().numpy() for log_probs in outputs]
        self.run_decoder = functools.cache(self._run_decoder)
        self.run_scorer = functools.cache(self._run_scorer)

    def scored(self, tokens: tuple[int, ...], *, ended: bool) -> Hypothesis:
        """The hypothesis with the parts of its score and their weighted sum (before length normalisation)."""
        config = self.config
        bonus = config.length_bonus * len(tokens)
        wanted = (*tokens, self.model.sos_eos_id) if ended else tokens
        parts: dict[str, float] = {}
        weights: dict[str, float] = {}
        if config.ctc_weight < 1:
            parts["att"] = sum(float(self.run_decoder(wanted[:i])[0][token]) for i, token in enumerate(wanted))
            weights["att"] = 1 - config.ctc_weight
            if config.coverage_weight > 0:
                seen = sum((self.run_decoder(wanted[:i])[1] for i in range(len(wanted))), torch.zeros(len(self.enc_out)))
                parts["coverage"] = float((seen > config.coverage_threshold).sum())
                weights["coverage"] = config.coverage_weight
        if self.ctc:
            scores = [ctc_log_prob(own, tokens, blank_id=self.model.blank_id, prefix=not ended) for own in self.ctc]
            parts["ctc"] = sum(scores) / len(scores)
            weights["ctc"] = config.ctc_weight
        for index, (name, weight, _) in enumerate(self.scorers):
            parts[name] = sum(float(self.run_scorer(index, wanted[:i])[token]) for i, token in enumerate(wanted))
            weights[name] = weight
        score = bonus + sum(weights[name] * part for name, part in parts.items())
        fields: dict[str, Any] = {"score": score if not math.isnan(score) else -math.inf, "length_bonus": bonus, **parts}
        return Hypothesis(tokens=tokens, **fields)

    def _run_decoder(self, tokens: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """What the decoder says after `tokens`, which it reads as a whole.

        Returns:
            (V,) log-probabilities of the next token, and (S,) where the last layer looked for it, on average over heads (and over
            the members of an ensemble).
        """
        model, decoder = self.model, self.model.decoder
        assert decoder is not None
        tokens_in = torch.tensor([[model.sos_eos_id, *tokens]])
        lens, frames = torch.tensor([tokens_in.shape[1]]), torch.tensor([len(self.enc_out)])
        looked: list[Tensor] = []

        def watch(attn: Any, args: Any, kwargs: Any) -> None:
            query, keys, _ = args
            looked.append(attention_weights(split_heads(attn.q(query), attn.num_heads), keys, bias=kwargs["bias"]))

        lasts: list[Any] = [own.layers[-1] for own in _decoders(model)]
        handles = [last.cross.register_forward_pre_hook(watch, with_kwargs=True) for last in lasts]
        with torch.inference_mode():
            log_probs = model.ctc_log_probs(self.enc_out.unsqueeze(0)) if decoder.needs_ctc else None
            logits = decoder(tokens_in, lens, self.enc_out.unsqueeze(0), frames, ctc_log_probs=log_probs)
        for handle in handles:
            handle.remove()
        return logits[0, -1].double().log_softmax(dim=-1), torch.stack([own[0, :, -1].mean(dim=0) for own in looked]).mean(dim=0)

    def _run_scorer(self, index: int, tokens: tuple[int, ...]) -> Tensor:
        """(V,) what a scorer says of the next token, having read `tokens` one by one."""
        scorer = self.scorers[index].scorer
        state = scorer.start(1)
        with torch.inference_mode():
            for token in (self.model.sos_eos_id, *tokens):
                scores, state = scorer.step(torch.tensor([token]), state)
        return scores[0].double()


def _decoders(model: Recognizer | Ensemble) -> list[Any]:
    """The decoder of a model, or those of an ensemble's members."""
    return [member.decoder for member in model.members] if isinstance(model, Ensemble) else [model.decoder]


def _stutters(tokens: Sequence[int], limit: int) -> bool:
    """Whether the last tokens, any number of them, stand more than `limit` times in a row."""
    if not limit:
        return False
    for period in range(1, len(tokens) // (limit + 1) + 1):
        unit = tuple(tokens[-period:])
        if tuple(tokens[-period * (limit + 1) :]) == unit * (limit + 1):
            return True
    return False


def _log_add(*values: float) -> float:
    highest = max(values)
    if highest == -math.inf:
        return -math.inf
    return highest + math.log(sum(math.exp(value - highest) for value in values))
