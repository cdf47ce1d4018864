"""Batches: every utterance once an epoch, never over the budget, the same for the same seed and epoch."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speechtx.data.batching import make_batches

LENGTHS = st.lists(st.integers(1, 300), max_size=60)


@given(
    lengths=LENGTHS,
    max_utts=st.integers(1, 10),
    seed=st.one_of(st.none(), st.integers(0, 5)),
    epoch=st.integers(0, 3),
    together=st.integers(1, 4),
)
def test_every_utterance_once_and_within_the_budget(
    lengths: list[int], max_utts: int, seed: int | None, epoch: int, together: int
) -> None:
    batches = make_batches(lengths, frames_per_batch=400, max_utts=max_utts, seed=seed, epoch=epoch, together=together)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert 1 <= len(batch) <= max_utts
        assert len(batch) * max(lengths[i] for i in batch) <= 400


def test_same_seed_and_epoch_give_the_same_batches_and_another_epoch_others() -> None:
    lengths = [50 + 7 * i % 90 for i in range(40)]

    def of(seed: int, epoch: int) -> list[list[int]]:
        return make_batches(lengths, frames_per_batch=600, max_utts=8, seed=seed, epoch=epoch)

    assert of(1, 1) == of(1, 1)
    assert of(1, 1) != of(1, 2)
    assert of(1, 1) != of(2, 1)


def test_batches_of_one_step_are_of_similar_lengths_and_steps_are_not() -> None:
    lengths = [100 + 13 * i % 400 for i in range(1000)]
    batches = make_batches(lengths, frames_per_batch=1200, max_utts=64, seed=1, epoch=1, together=2)
    longest = [max(lengths[i] for i in batch) for batch in batches]
    within = [abs(a - b) for a, b in zip(longest[0::2], longest[1::2], strict=False)]
    between = [abs(a - b) for a, b in zip(longest[1::2], longest[2::2], strict=False)]
    assert sum(within) / len(within) < 0.25 * sum(between) / len(between)


@pytest.mark.parametrize("seed", range(10))
def test_the_batches_that_fill_no_step_are_the_last_ones(seed: int) -> None:
    lengths = [100 * (i + 1) for i in range(7)]  # a tenth of jitter keeps their order but for neighbours
    batches = make_batches(lengths, frames_per_batch=700, max_utts=1, seed=seed, epoch=1, together=3)
    assert len(batches) == 7 and lengths[batches[6][0]] >= 600


def test_without_a_seed_the_longest_come_first() -> None:
    lengths = [10, 30, 20, 40]
    flat = [i for batch in make_batches(lengths, frames_per_batch=60, max_utts=4) for i in batch]
    assert [lengths[i] for i in flat] == [40, 30, 20, 10]


def test_padding_stays_small_on_varied_lengths() -> None:
    lengths = [100 + 13 * i % 400 for i in range(1000)]
    batches = make_batches(lengths, frames_per_batch=8000, max_utts=128, seed=1, epoch=1)
    padded = sum(len(b) * max(lengths[i] for i in b) for b in batches)
    assert sum(lengths) / padded > 0.85


def test_an_utterance_over_the_budget_is_an_error() -> None:
    with pytest.raises(ValueError, match="utterance 1 has 500 frames"):
        make_batches([10, 500], frames_per_batch=400, max_utts=4)
