"""SpecAugment: what it may touch, what it must leave, and that it costs next to nothing."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from speechtx.config.schema import SpecAugmentConfig
from speechtx.frontend.specaugment import spec_augment

OFF = SpecAugmentConfig(time_warp=0, num_freq_masks=0, num_time_masks=0)
configs = st.builds(
    SpecAugmentConfig,
    time_warp=st.integers(0, 10),
    num_freq_masks=st.integers(0, 3),
    freq_mask_width=st.integers(0, 40),
    num_time_masks=st.integers(0, 3),
    time_mask_width=st.integers(0, 60),
    time_mask_max_ratio=st.floats(0.0, 1.0),
)


def ones(num_frames: int, num_bins: int = 20) -> np.ndarray:
    return np.ones((num_frames, num_bins), np.float32)


@given(config=configs, num_frames=st.integers(1, 120), num_bins=st.integers(1, 30), seed=st.integers(0, 1000))
def test_any_utterance_keeps_its_shape_and_the_input_stays_untouched(
    config: SpecAugmentConfig, num_frames: int, num_bins: int, seed: int
) -> None:
    feats = np.random.default_rng(seed).normal(size=(num_frames, num_bins)).astype(np.float32)
    before = feats.copy()
    augmented = spec_augment(feats, config, np.random.default_rng(seed))
    assert augmented.shape == feats.shape
    assert augmented.dtype == np.float32
    assert np.isfinite(augmented).all()
    assert not np.shares_memory(augmented, feats)
    assert np.array_equal(feats, before)
    assert np.array_equal(augmented, spec_augment(feats, config, np.random.default_rng(seed)))


def test_another_state_of_the_generator_gives_another_result() -> None:
    feats, rng = np.random.default_rng(0).normal(size=(200, 80)).astype(np.float32), np.random.default_rng(1)
    assert not np.array_equal(spec_augment(feats, SpecAugmentConfig(), rng), spec_augment(feats, SpecAugmentConfig(), rng))


@given(num_frames=st.integers(1, 200), seed=st.integers(0, 1000))
def test_everything_switched_off_is_a_copy(num_frames: int, seed: int) -> None:
    feats = np.random.default_rng(seed).normal(size=(num_frames, 7)).astype(np.float32)
    assert np.array_equal(spec_augment(feats, OFF, np.random.default_rng(seed)), feats)


@given(seed=st.integers(0, 100_000), width=st.integers(0, 30))
def test_one_frequency_mask_is_one_band_not_wider_than_allowed(seed: int, width: int) -> None:
    config = OFF.model_copy(update={"num_freq_masks": 1, "freq_mask_width": width})
    masked = (spec_augment(ones(5), config, np.random.default_rng(seed)) == 0).all(axis=0)
    assert masked.sum() <= min(width, 20)
    assert np.abs(np.diff(masked.astype(int))).sum() <= 2  # connected


@given(seed=st.integers(0, 100_000), num_frames=st.integers(1, 100), ratio=st.floats(0.0, 1.0))
def test_one_time_mask_never_exceeds_its_width_nor_its_share(seed: int, num_frames: int, ratio: float) -> None:
    config = OFF.model_copy(update={"num_time_masks": 1, "time_mask_width": 40, "time_mask_max_ratio": ratio})
    masked = (spec_augment(ones(num_frames), config, np.random.default_rng(seed)) == 0).all(axis=1)
    assert masked.sum() <= min(40, ratio * num_frames)
    assert np.abs(np.diff(masked.astype(int))).sum() <= 2


def test_mask_widths_are_uniform_from_none_to_the_full_width_and_reach_both_edges() -> None:
    config = OFF.model_copy(update={"num_freq_masks": 1, "freq_mask_width": 3})
    rng = np.random.default_rng(0)
    masks = np.array([(spec_augment(ones(2), config, rng) == 0).all(axis=0) for _ in range(4000)])
    share = np.bincount(masks.sum(axis=1), minlength=4) / len(masks)
    np.testing.assert_allclose(share, 0.25, atol=0.03)
    assert masks[:, 0].any() and masks[:, -1].any()


def test_long_utterances_get_a_time_mask_for_every_so_many_frames_and_short_ones_no_less_than_before() -> None:
    config = OFF.model_copy(update={"time_mask_width": 1, "time_mask_max_ratio": 1.0, "frames_per_time_mask": 50})
    for num_masks, num_frames, most in ((0, 500, 10), (0, 49, 0), (3, 49, 3), (3, 500, 10)):
        masked = [
            int((spec_augment(ones(num_frames), config.model_copy(update={"num_time_masks": num_masks}), rng) == 0).all(1).sum())
            for rng in map(np.random.default_rng, range(200))
        ]
        assert max(masked) <= most
        assert np.mean(masked) == pytest.approx(most / 2, rel=0.15)  # each mask is 0 or 1 frame wide


@given(seed=st.integers(0, 100_000), num_frames=st.integers(1, 80), window=st.integers(1, 10))
def test_time_warp_keeps_both_ends_and_never_runs_backwards(seed: int, num_frames: int, window: int) -> None:
    clock = np.arange(num_frames, dtype=np.float32)[:, None] * np.ones((1, 3), np.float32)
    warped = spec_augment(clock, OFF.model_copy(update={"time_warp": window}), np.random.default_rng(seed))[:, 0]
    assert warped[0] == 0
    assert warped[-1] == pytest.approx(num_frames - 1)
    assert (np.diff(warped) > 0).all()
    assert np.abs(warped - clock[:, 0]).max() <= window + 1e-3


def test_time_warp_moves_frames_by_up_to_the_window_and_in_both_directions() -> None:
    clock, rng = np.arange(100, dtype=np.float32)[:, None], np.random.default_rng(0)
    config = OFF.model_copy(update={"time_warp": 5})
    moves = [(spec_augment(clock, config, rng) - clock)[:, 0] for _ in range(300)]
    assert max(m.max() for m in moves) == pytest.approx(5, abs=0.01)
    assert min(m.min() for m in moves) == pytest.approx(-5, abs=0.01)


def test_augmenting_500_frames_takes_well_under_a_millisecond() -> None:
    feats, rng = np.random.default_rng(0).normal(size=(500, 80)).astype(np.float32), np.random.default_rng(1)

    def once() -> float:
        start = time.perf_counter()
        spec_augment(feats, SpecAugmentConfig(), rng)
        return time.perf_counter() - start

    assert min(once() for _ in range(50)) < 1e-3
