"""CTC prefix beam search against the plain one, against brute force, and with input as bad as it comes."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechtx.config.decode import DecodeConfig
from speechtx.config.lm import TransformerLmConfig
from speechtx.model.language_model import TransformerLM
from speechtx.model.ngram import NgramLM
from speechtx.search.ctc_beam import ctc_beam_search
from speechtx.search.ctc_beam_reference import reference_ctc_beam
from speechtx.search.hot_words import HotWords
from speechtx.search.hypothesis import Hypothesis
from speechtx.search.reference import ctc_log_prob
from speechtx.search.scorers import NO_SCORERS, Scorers
from speechtx.text.kneser_ney import estimate_ngram

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


@settings(max_examples=12, deadline=None, derandomize=True)  # float32 of other batch sizes: no luck with near ties
@given(seed=st.integers(0, 10_000), frames=st.lists(st.integers(1, 10), min_size=1, max_size=3), beam=st.integers(1, 6))
def test_with_a_transformer_the_batched_search_equals_the_textbook(seed, frames, beam):
    rows = [posteriors(seed + i, n, sharpness=1.5) for i, n in enumerate(frames)]
    config = DecodeConfig(method="ctc_beam", beam=beam, nbest=beam, length_bonus=0.4, lm_weight=0.6)
    scorers = Scorers(lm=tiny_lm(seed % 3))
    for found, row in zip(search(rows, config, scorers), rows, strict=True):
        assert_same(found, plain(row, config, scorers))


@pytest.fixture(scope="module")
def ngram() -> NgramLM:
    rng = np.random.default_rng(0)
    pieces = ["<blank>", "<unk>", "a", "b", "c", "<sos/eos>"]
    texts = [rng.choice([2, 2, 3, 4], size=rng.integers(1, 6)).tolist() for _ in range(40)]
    return NgramLM(arpa=estimate_ngram(texts, pieces=pieces, order=3).arpa, tokens=pieces)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    frames=st.lists(st.integers(1, 10), min_size=1, max_size=3),
    beam=st.integers(1, 7),
    weight=st.sampled_from([0.3, 1.5]),
    phrases=st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), max_size=3),
    bonus=st.sampled_from([0.9, 6.0]),  # the second makes labels win that the audio hardly allows
)
def test_with_an_n_gram_and_hot_words_the_batched_search_equals_the_textbook(ngram, seed, frames, beam, weight, phrases, bonus):
    rows = [posteriors(seed + i, n, sharpness=1.5) for i, n in enumerate(frames)]
    hot = ("given as tokens",) if phrases else ()
    config = DecodeConfig(method="ctc_beam", beam=beam, nbest=beam, length_bonus=0.4, ngram_weight=weight, hot_words=hot)
    scorers = Scorers(ngram=ngram, hot_words=HotWords(phrases, bonus=bonus, vocab_size=VOCAB) if phrases else None)
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


# ------------------------------------------------------------------------------------------------ batches and bad input


@pytest.mark.parametrize("with_lm", [False, True])
def test_results_do_not_depend_on_the_batch(with_lm):
    rows = [posteriors(seed, frames, vocab=40) for seed, frames in enumerate([30, 7, 1, 55, 18])]
    config = DecodeConfig(method="ctc_beam", beam=8, nbest=8, length_bonus=0.1, lm_weight=0.5 if with_lm else 0.0)
    scorers = Scorers(lm=tiny_lm(vocab=40)) if with_lm else NO_SCORERS
    together = search(rows, config, scorers)
    for row, found in zip(rows, together, strict=True):
        (alone,) = search([row], config, scorers)
        assert_same(found, alone)
    assert [h[0].tokens for h in search(rows[::-1], config, scorers)] == [h[0].tokens for h in together[::-1]]


def test_nan_takes_the_hypotheses_of_its_own_utterance_only():
    rows = [posteriors(seed, 9) for seed in range(4)]
    config = DecodeConfig(method="ctc_beam", beam=5, nbest=3)
    whole = search(rows, config)
    rows[1] = rows[1].clone()
    rows[1][4, 2] = math.nan
    rows[2] = rows[2].clone()
    rows[2][8] = -math.inf  # no label is possible in the last frame
    found = search(rows, config)
    assert found[1] == [] and found[2] == []
    assert_same(found[0], whole[0])
    assert_same(found[3], whole[3])
    (alone,) = search([rows[1]], config)
    assert alone == []


def test_an_utterance_without_speech_is_an_empty_hypothesis_with_a_score():
    silence = torch.full((20, VOCAB), 0.002)
    silence[:, 0] = 1 - 0.002 * (VOCAB - 1)
    config = DecodeConfig(method="ctc_beam", beam=4, nbest=2, ngram_weight=0.0)
    first, second = search([silence.log()], config)[0]
    assert first.tokens == () and first.score == first.ctc == pytest.approx(20 * math.log(0.99), abs=1e-5)
    assert second.score < first.score


def test_one_frame_and_a_beam_larger_than_the_vocabulary():
    row = posteriors(1, 1)
    config = DecodeConfig(method="ctc_beam", beam=50, nbest=50)
    (found,) = search([row], config)
    wanted = sorted(((float(row[0, c]), (c,) if c else ()) for c in range(VOCAB - 1)), reverse=True)
    assert [h.tokens for h in found] == [tokens for _, tokens in wanted]
    assert_same(search([posteriors(2, 6)], config)[0], plain(posteriors(2, 6), config))


def test_forbidden_labels_and_certain_ones_are_no_accident():
    """Posteriors of exactly 0 and 1, as a model that is sure writes them."""
    row = torch.full((5, VOCAB), -math.inf)
    for frame, label in enumerate([0, 2, 2, 0, 2]):
        row[frame, label] = 0.0
    (found,) = search([row], DecodeConfig(method="ctc_beam", beam=4, nbest=4))
    assert [(h.tokens, h.score) for h in found] == [((2, 2), 0.0)]


def test_scores_that_are_not_finite_leave_no_hypothesis_and_do_not_stop_the_others():
    lm = tiny_lm()

    class Half(TransformerLM):
        def step(self, tokens, state):
            scores, state = super().step(tokens, state)
            return torch.where((tokens == 2).unsqueeze(1), math.nan, scores), state

    broken = Half(config=TransformerLmConfig(layers=2, dim=16, heads=2, ff_dim=32), vocab_size=VOCAB).eval()
    broken.load_state_dict(lm.state_dict())
    config = DecodeConfig(method="ctc_beam", beam=6, nbest=6, lm_weight=0.3)
    (found,) = search([posteriors(0, 8, sharpness=1.0)], config, Scorers(lm=broken))
    assert found and all(math.isfinite(h.score) and 2 not in h.tokens[-1:] for h in found)


def test_an_hour_of_silence_is_linear_in_memory():
    """Only the tree grows with the frames: two tables of a node for each slot and frame."""
    from speechtx.search.prefix_tree import PrefixTree

    tree = PrefixTree(batch=1, beam=10, frames=90_000, blank_id=0, device=torch.device("cpu"))
    held = sum(t.numel() * t.element_size() for t in vars(tree).values() if isinstance(t, torch.Tensor))
    assert held < 16 * 10 * 90_000 + 10_000
