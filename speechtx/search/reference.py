"""The beam search of `speechtx.search.beam` written plainly: one utterance, one hypothesis, one extension at a time.

No caches and no batches: the decoder reads every prefix from its start, and CTC scores come from the textbook forward algorithm,
run from the first frame for every single extension. Slow on purpose; tests tie the fast search to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from speechtx.config.decode import DecodeConfig
from speechtx.model.recognizer import Recognizer
from speechtx.search.hypothesis import Hypothesis


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


def reference_search(model: Recognizer, enc_out: Tensor, config: DecodeConfig) -> list[Hypothesis]:
    """Searches one utterance; the counterpart of one row of `beam_search`.

    Args:
        model: in evaluation mode.
        enc_out: (S, D) encoder output without padding.
        config: as for `beam_search`.

    Returns:
        At most `config.nbest` hypotheses, best first.
    """
    end = model.sos_eos_id
    ctc = model.ctc_log_probs(enc_out.unsqueeze(0))[0].detach().double().numpy() if config.ctc_weight > 0 else None
    max_len = max(1, int(len(enc_out) * config.max_len_ratio))
    active = [Hypothesis(tokens=(), score=0.0, ctc=None if ctc is None else 0.0, att=None if config.ctc_weight == 1 else 0.0)]
    finished: list[Hypothesis] = []
    for length in range(max_len + 1):
        extensions: list[tuple[Hypothesis, bool]] = []
        for hypothesis in active:
            att = _next_log_probs(model, enc_out, hypothesis.tokens) if config.ctc_weight < 1 else None
            for token in range(model.sos_eos_id + 1):
                if token == model.blank_id or (length == max_len and token != end):
                    continue
                extensions.append((_extend(hypothesis, token, att, ctc, model, config), token == end))
        survivors = [e for e in sorted(extensions, key=lambda e: -e[0].score)[: config.beam] if e[0].score > -math.inf]
        finished += [hypothesis for hypothesis, ended in survivors if ended]
        active = [hypothesis for hypothesis, ended in survivors if not ended]
    return sorted(finished, key=lambda h: -h.score)[: config.nbest]


def _extend(
    hypothesis: Hypothesis, token: int, att: Tensor | None, ctc: np.ndarray | None, model: Recognizer, config: DecodeConfig
) -> Hypothesis:
    ended = token == model.sos_eos_id
    tokens = hypothesis.tokens if ended else (*hypothesis.tokens, token)
    bonus = config.length_bonus * len(tokens)
    score = bonus
    new_att = new_ctc = None
    if att is not None:
        assert hypothesis.att is not None
        new_att = hypothesis.att + float(att[token])
        score += (1 - config.ctc_weight) * new_att
    if ctc is not None:
        new_ctc = ctc_log_prob(ctc, tokens, blank_id=model.blank_id, prefix=not ended)
        score += config.ctc_weight * new_ctc
    return Hypothesis(tokens=tokens, score=score, ctc=new_ctc, att=new_att, length_bonus=bonus)


def _next_log_probs(model: Recognizer, enc_out: Tensor, tokens: Sequence[int]) -> Tensor:
    """(V,) log-probabilities of the token after `tokens`, from a decoder that reads the whole prefix."""
    assert model.decoder is not None
    tokens_in = torch.tensor([[model.sos_eos_id, *tokens]])
    lens, frames = torch.tensor([tokens_in.shape[1]]), torch.tensor([len(enc_out)])
    with torch.inference_mode():
        log_probs = model.ctc_log_probs(enc_out.unsqueeze(0)) if model.decoder.needs_ctc else None
        logits = model.decoder(tokens_in, lens, enc_out.unsqueeze(0), frames, ctc_log_probs=log_probs)
    return logits[0, -1].double().log_softmax(dim=-1)


def _log_add(*values: float) -> float:
    highest = max(values)
    if highest == -math.inf:
        return -math.inf
    return highest + math.log(sum(math.exp(value - highest) for value in values))
