"""The CTC prefix beam search of `speechtx.search.ctc_beam` written plainly: a dictionary of prefixes, every label of every frame.

Slow on purpose; tests tie the fast search to it.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch

from speechtx.config.decode import DecodeConfig
from speechtx.search.hypothesis import Hypothesis
from speechtx.search.scorers import NO_SCORERS, Scorers, Weighted

Prefix = tuple[int, ...]


def reference_ctc_beam(
    log_probs: np.ndarray, config: DecodeConfig, scorers: Scorers = NO_SCORERS, *, blank_id: int, sos_eos_id: int
) -> list[Hypothesis]:
    """Searches one utterance; the counterpart of one row of `ctc_beam_search`.

    Args:
        log_probs: (S, V) CTC log-probabilities.
        config: as for `ctc_beam_search`.
        scorers: the same.
        blank_id: the CTC blank.
        sos_eos_id: never emitted.

    Returns:
        At most `config.nbest` hypotheses, best first.
    """
    weighted = scorers.weighted(config, vocab_size=log_probs.shape[1])
    sums = functools.lru_cache(maxsize=None)(functools.partial(_sums, weighted, sos_eos_id))

    def beside(prefix: Prefix, *, ended: bool) -> float:
        parts = sums(prefix, ended)
        return config.length_bonus * len(prefix) + sum(w.weight * part for w, part in zip(weighted, parts, strict=True))

    max_len = max(1, int(len(log_probs) * config.max_len_ratio))
    beam: dict[Prefix, tuple[float, float]] = {(): (-math.inf, 0.0)}  # ending in the last label, ending in blank
    for frame in np.asarray(log_probs, dtype=np.float64):
        new: dict[Prefix, tuple[float, float]] = {}

        def add(prefix: Prefix, n: float, b: float, new: dict[Prefix, tuple[float, float]] = new) -> None:
            old_n, old_b = new.get(prefix, (-math.inf, -math.inf))
            new[prefix] = _log_add(old_n, n), _log_add(old_b, b)

        for prefix, (n, b) in beam.items():
            add(prefix, -math.inf, _log_add(n, b) + frame[blank_id])
            for label, log_y in enumerate(frame):
                if label in (blank_id, sos_eos_id):
                    continue
                repeats = bool(prefix) and label == prefix[-1]
                if repeats:
                    add(prefix, n + log_y, -math.inf)
                if len(prefix) < max_len:
                    add((*prefix, label), (b if repeats else _log_add(n, b)) + log_y, -math.inf)
        ranked = sorted(((_log_add(*nb) + beside(prefix, ended=False), prefix) for prefix, nb in new.items()), reverse=True)
        beam = {prefix: new[prefix] for score, prefix in ranked[: config.beam] if score > -math.inf}

    found = []
    for prefix, nb in beam.items():
        ctc = _log_add(*nb)
        parts: dict[str, Any] = {w.name: part for w, part in zip(weighted, sums(prefix, True), strict=True)}
        bonus = config.length_bonus * len(prefix)
        found.append(Hypothesis(tokens=prefix, score=ctc + beside(prefix, ended=True), ctc=ctc, length_bonus=bonus, **parts))
    return sorted((h for h in found if h.score > -math.inf), key=lambda h: -h.score)[: config.nbest]


def _log_add(a: float, b: float) -> float:
    return float(np.logaddexp(a, b))


def _sums(weighted: tuple[Weighted, ...], sos_eos_id: int, prefix: Prefix, ended: bool) -> list[float]:
    """What each scorer gives the whole prefix, fed from its start."""
    tokens = [*prefix, sos_eos_id] if ended else list(prefix)
    sums = []
    for scorer in (w.scorer for w in weighted):
        state, total = scorer.start(1), 0.0
        for fed, scored in zip([sos_eos_id, *tokens], tokens, strict=False):
            with torch.inference_mode():
                scores, state = scorer.step(torch.tensor([fed]), state)
            total += float(scores[0, scored])
        sums.append(total)
    return sums
