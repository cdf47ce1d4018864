"""CTC greedy decoding."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechtx.search.greedy import ctc_greedy


def peaked(paths: list[list[int]], vocab: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.zeros(len(paths), max(map(len, paths)), vocab)
    for row, path in enumerate(paths):
        for t, label in enumerate(path):
            logits[row, t, label] = 9.0
        logits[row, len(path) :, 4] = 9.0  # padding that would show
    return logits.log_softmax(-1), torch.tensor([len(path) for path in paths])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=12), min_size=1, max_size=4))
def test_repeats_collapse_blanks_drop_and_padding_is_silent(paths):
    log_probs, lens = peaked(paths)
    for path, hypothesis in zip(paths, ctc_greedy(log_probs, lens, blank_id=0, sos_eos_id=5), strict=True):
        assert hypothesis.tokens == tuple(label for label, _ in itertools.groupby(path) if label != 0)


def test_the_score_is_the_best_paths_log_probability():
    log_probs, lens = peaked([[1, 1, 0, 2], [3]])
    first, second = ctc_greedy(log_probs, lens, blank_id=0, sos_eos_id=5)
    assert first.score == pytest.approx(float(log_probs[0].max(-1).values.sum()), abs=1e-6) and first.ctc == first.score
    assert second.score == pytest.approx(float(log_probs[1, 0, 3]), abs=1e-6)


def test_the_end_of_sentence_symbol_is_never_emitted():
    log_probs, lens = peaked([[1, 5, 2]])
    (hypothesis,) = ctc_greedy(log_probs, lens, blank_id=0, sos_eos_id=5)
    assert 5 not in hypothesis.tokens
