"""The bootstrap: known intervals, reproducible, paired where it says so."""

from __future__ import annotations

import numpy as np
import pytest

from speechtx.config.errors import ScoringError
from speechtx.scoring.significance import bootstrap_interval, paired_bootstrap


def test_the_interval_of_bernoulli_words_is_the_binomial_one() -> None:
    errors = np.repeat([1, 0], [100, 900])  # one word an utterance, 10 % wrong
    low, high = bootstrap_interval(errors, np.ones(1000))
    half = 100 * 1.96 * np.sqrt(0.1 * 0.9 / 1000)
    assert low == pytest.approx(10 - half, abs=0.15)
    assert high == pytest.approx(10 + half, abs=0.15)


def test_errors_that_come_together_widen_the_interval() -> None:
    spread = bootstrap_interval(np.full(100, 1), np.full(100, 10))
    together = bootstrap_interval(np.repeat([10, 0], [10, 90]), np.full(100, 10))
    assert spread == (10.0, 10.0)
    assert together[1] - together[0] > 8


def test_the_same_counts_give_the_same_interval_whatever_the_global_seed() -> None:
    errors, reference = np.arange(50) % 3, np.full(50, 6)
    np.random.seed(0)
    first = bootstrap_interval(errors, reference)
    np.random.seed(1)
    assert bootstrap_interval(errors, reference) == first


def test_pairing_sees_a_small_but_steady_difference() -> None:
    rng = np.random.default_rng(3)
    hard = rng.integers(0, 10, size=400)  # utterances differ far more than systems do
    a, b = hard, hard + (np.arange(400) % 4 == 0)
    found = paired_bootstrap(a, b, np.full(400, 20))
    assert found.difference == pytest.approx(100 * (a.sum() - b.sum()) / 8000)
    assert found.significant
    assert found.a_better == 1.0
    alone_a, alone_b = bootstrap_interval(a, np.full(400, 20)), bootstrap_interval(b, np.full(400, 20))
    assert alone_a[1] > alone_b[0]  # without pairing the two intervals overlap


def test_equal_systems_do_not_differ() -> None:
    found = paired_bootstrap([1, 0, 2], [1, 0, 2], [5, 5, 5])
    assert (found.difference, found.low, found.high, found.a_better, found.significant) == (0, 0, 0, 0.5, False)


def test_swapping_the_systems_mirrors_the_result() -> None:
    a, b, n = [1, 0, 2, 3], [0, 0, 3, 1], [5, 6, 7, 8]
    one, two = paired_bootstrap(a, b, n), paired_bootstrap(b, a, n)
    assert one.difference == pytest.approx(-two.difference)
    assert (one.low, one.high) == pytest.approx((-two.high, -two.low))


@pytest.mark.parametrize(("errors", "reference"), [([], []), ([1, 2], [3]), ([0, 1], [0, 0])])
def test_counts_that_mean_nothing_are_refused(errors: list[int], reference: list[int]) -> None:
    with pytest.raises(ScoringError):
        bootstrap_interval(errors, reference)


def test_draws_of_empty_references_only_do_not_divide_by_zero() -> None:
    low, high = bootstrap_interval([1, 1], [0, 10])
    assert np.isfinite([low, high]).all()
