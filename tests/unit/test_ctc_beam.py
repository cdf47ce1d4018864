"""CTC prefix beam search against the plain one, against brute force, and with input as bad as it comes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechtx.config.decode import DecodeConfig
from speechtx.config.lm import TransformerLmConfig
from speechtx.model.language_model import TransformerLM
from speechtx.search.ctc_beam import ctc_beam_search
from speechtx.search.ctc_beam_reference import reference_ctc_beam
from speechtx.search.hypothesis import Hypothesis
from speechtx.search.reference import ctc_log_prob
from speechtx.search.scorers import NO_SCORERS, Scorers

VOCAB = 6
BLANK, END = 0, VOCAB - 1


def posteriors(seed: int, frames: int, *, vocab: int = VOCAB, sharpness: float = 2.0) -> torch.Tensor:
    """(S, V); sharp enough to be decided here and there, with many prefixes that meet again."""
    logits = sharpness * torch.randn(frames, vocab, generator=torch.Generator().manual_seed(seed))
    logits[:, 0] += sharpness / 2
    return logits.log_softmax(dim=1)


def batch_of(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    lens = torch.tensor([len(row) for row in rows])
    padded = torch.full((len(rows), int(lens.max()), rows[0].shape[1]), torch.nan)  # padding must not be read
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return padded, lens


def search(rows: list[torch.Tensor], config: DecodeConfig, scorers: Scorers = NO_SCORERS) -> list[list[Hypothesis]]:
    log_probs, lens = batch_of(rows)
    return ctc_beam_search(log_probs, lens, config, scorers, blank_id=BLANK, sos_eos_id=log_probs.shape[2] - 1)


def plain(row: torch.Tensor, config: DecodeConfig, scorers: Scorers = NO_SCORERS) -> list[Hypothesis]:
    return reference_ctc_beam(row.numpy(), config, scorers, blank_id=BLANK, sos_eos_id=row.shape[1] - 1)


def assert_same(found: list[Hypothesis], wanted: list[Hypothesis], tolerance: float = 1e-5) -> None:
    assert [h.tokens for h in found] == [h.tokens for h in wanted]
    for a, b in zip(found, wanted, strict=True):
        for name in ("score", "ctc", "length_bonus", "lm", "ngram", "hot_words"):
            x, y = getattr(a, name), getattr(b, name)
            assert (x is None) == (y is None) and (x is None or x == pytest.approx(y, abs=tolerance)), name


def tiny_lm(seed: int = 0, vocab: int = VOCAB) -> TransformerLM:
    torch.manual_seed(seed)
    lm = TransformerLM(config=TransformerLmConfig(layers=2, dim=16, heads=2, ff_dim=32), vocab_size=vocab).eval()
    with torch.no_grad():
        lm.output.weight.mul_(4)  # opinions strong enough to matter
    return lm


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    frames=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    beam=st.integers(1, 9),
    sharpness=st.sampled_from([0.3, 1.0, 3.0]),
    bonus=st.sampled_from([-0.5, 0.0, 0.8]),
    max_len=st.sampled_from([0.3, 1.0]),
)
def test_the_batched_search_equals_the_textbook(seed, frames, beam, sharpness, bonus, max_len):
    rows = [posteriors(seed + i, n, sharpness=sharpness) for i, n in enumerate(frames)]
    config = DecodeConfig(method="ctc_beam", beam=beam, nbest=beam, length_bonus=bonus, max_len_ratio=max_len)
    for found, row in zip(search(rows, config), rows, strict=True):
        assert_same(found, plain(row, config))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), frames=st.lists(st.integers(1, 10), min_size=1, max_size=3), beam=st.integers(1, 6))
def test_with_a_transformer_the_batched_search_equals_the_textbook(seed, frames, beam):
    rows = [posteriors(seed + i, n, sharpness=1.5) for i, n in enumerate(frames)]
    config = DecodeConfig(method="ctc_beam", beam=beam, nbest=beam, length_bonus=0.4, lm_weight=0.6)
    scorers = Scorers(lm=tiny_lm(seed % 3))
    for found, row in zip(search(rows, config, scorers), rows, strict=True):
        assert_same(found, plain(row, config, scorers))


def test_a_large_beam_sums_every_alignment():
    """Nothing is pruned, so the n best are all texts by their exact probability, and together they are certain."""
    row = posteriors(3, 5, vocab=4, sharpness=1.0)
    row[:, 3] = -math.inf  # the end of the sentence is never emitted
    row = row.log_softmax(dim=1)
    exact: dict[tuple[int, ...], float] = {}
    for path in itertools.product(range(3), repeat=5):
        text = tuple(label for label, _ in itertools.groupby(path) if label)
        exact[text] = exact.get(text, 0.0) + math.exp(sum(float(row[t, label]) for t, label in enumerate(path)))
    config = DecodeConfig(method="ctc_beam", beam=100, nbest=100)
    (found,) = search([row], config)
    assert {h.tokens for h in found} == set(exact)
    for hypothesis in found:
        assert math.exp(hypothesis.score) == pytest.approx(exact[hypothesis.tokens], rel=1e-6)
        assert hypothesis.score == pytest.approx(ctc_log_prob(row.numpy(), hypothesis.tokens, blank_id=0, prefix=False), abs=1e-6)
    assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)
    assert sum(math.exp(h.score) for h in found) == pytest.approx(1.0, rel=1e-6)
