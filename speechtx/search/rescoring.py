"""Attention rescoring: the decoder's opinion of what CTC prefix beam search found, all hypotheses at once.

The second pass of Zhang et al. 2020, "Unified Streaming and Non-streaming Two-pass End-to-end Model for Speech Recognition". The
decoder reads whole hypotheses instead of one token after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from speechtx.config.decode import DecodeConfig
from speechtx.config.errors import ConfigError
from speechtx.model.recognizer import Recognizer
from speechtx.search.hypothesis import Hypothesis

_MAX_CELLS = 1 << 24  # tokens * frames of one call of the decoder: what an attention head holds at once


def rescore(
    model: Recognizer,
    enc_out: Tensor,
    enc_lens: Tensor,
    nbests: Sequence[Sequence[Hypothesis]],
    config: DecodeConfig,
    *,
    ctc_log_probs: Tensor | None = None,
) -> list[list[Hypothesis]]:
    """Scores hypotheses anew: (1 - ctc_weight) * att + ctc_weight * ctc, and language models and bonuses as they were.

    Args:
        model: in evaluation mode, with a decoder.
        enc_out: (B, S, D) encoder output.
        enc_lens: (B,) valid frames.
        nbests: of `ctc_beam_search`, for each utterance.
        config: ctc_weight, below 1, and nbest.
        ctc_log_probs: (B, S, V), if they are there already; computed where the decoder needs them.

    Returns:
        For every utterance at most `config.nbest` hypotheses, best first. One whose score is not finite is left out.

    Raises:
        ConfigError: the model has no decoder.
    """
    if model.decoder is None:
        raise ConfigError("method attention_rescoring needs a decoder, but this model has decoder.layers 0; use ctc_beam")
    utts = [utt for utt, nbest in enumerate(nbests) for _ in nbest]
    hypotheses = [hypothesis for nbest in nbests for hypothesis in nbest]
    with torch.inference_mode():
        att = _attention_scores(model, enc_out, enc_lens, utts, hypotheses, ctc_log_probs)
    weight = config.ctc_weight
    found: list[list[Hypothesis]] = [[] for _ in nbests]
    for utt, hypothesis, log_prob in zip(utts, hypotheses, att, strict=True):
        assert hypothesis.ctc is not None
        beside = hypothesis.score - hypothesis.ctc
        score = weight * hypothesis.ctc + beside + (1 - weight) * log_prob
        if abs(score) < torch.inf:  # neither infinite nor NaN
            found[utt].append(replace(hypothesis, score=score, att=log_prob))
    return [sorted(nbest, key=lambda h: -h.score)[: config.nbest] for nbest in found]


def _attention_scores(
    model: Recognizer,
    enc_out: Tensor,
    enc_lens: Tensor,
    utts: Sequence[int],
    hypotheses: Sequence[Hypothesis],
    ctc_log_probs: Tensor | None,
) -> list[float]:
    """log P_att(tokens, end) of each hypothesis, of utterance utts[i]."""
    decoder = model.decoder
    assert decoder is not None
    if not hypotheses:
        return []
    if ctc_log_probs is None and decoder.needs_ctc:
        ctc_log_probs = model.ctc_log_probs(enc_out)
    state = decoder.start(enc_out, enc_lens, beam=1, ctc_log_probs=ctc_log_probs)  # projects each utterance once
    targets = pad_sequence(
        [torch.tensor([*hypothesis.tokens, model.sos_eos_id]) for hypothesis in hypotheses],
        batch_first=True,
        padding_value=model.sos_eos_id,
    ).to(enc_out.device)
    lens = torch.tensor([len(hypothesis.tokens) + 1 for hypothesis in hypotheses], device=enc_out.device)
    tokens_in = targets.roll(1, dims=1)
    tokens_in[:, 0] = model.sos_eos_id
    rows = torch.tensor(utts, device=enc_out.device)
    at_once = max(1, _MAX_CELLS // (targets.shape[1] * enc_out.shape[1]))
    scores: list[Tensor] = []
    for chunk in torch.arange(len(rows), device=rows.device).split(at_once):
        logits = decoder.score(tokens_in[chunk], lens[chunk], state.keep(rows[chunk]))
        log_probs = logits.float().log_softmax(dim=2).gather(2, targets[chunk].unsqueeze(2)).squeeze(2)
        valid = torch.arange(targets.shape[1], device=rows.device) < lens[chunk].unsqueeze(1)
        scores.append(torch.where(valid, log_probs, 0.0).sum(dim=1, dtype=torch.float64))
    return torch.cat(scores).tolist()
