"""SpecAugment (Park et al., Interspeech 2019): a time warp, then bands of frequency and of time set to the mean."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from speechtx.config.schema import SpecAugmentConfig


def spec_augment(feats: np.ndarray, config: SpecAugmentConfig, rng: np.random.Generator) -> np.ndarray:
    """Augments one utterance; the same generator state gives the same result.

    Args:
        feats: (T, F) float32, normalised, so that 0 is the mean.
        config: widths and numbers of masks; zeros switch a part off.
        rng: where randomness comes from.

    Returns:
        (T, F), a new array; masked cells are 0.
    """
    return mask_bands(warp_time(feats, config.time_warp, rng), config, rng)


def spec_augment_views(
    feats: np.ndarray, config: SpecAugmentConfig, rng: np.random.Generator, view_rngs: Sequence[np.random.Generator]
) -> list[np.ndarray]:
    """Augments one utterance once for each of `view_rngs`: one time warp of `rng` for all, so that frames correspond, and masks
    of their own (Yao et al. 2025, section 3.2). Arguments and results as of `spec_augment`.
    """
    warped = warp_time(feats, config.time_warp, rng)
    return [mask_bands(warped.copy(), config, view_rng) for view_rng in view_rngs]


def mask_bands(augmented: np.ndarray, config: SpecAugmentConfig, rng: np.random.Generator) -> np.ndarray:
    """Sets the bands of frequency and of time to 0, in place."""
    num_frames, num_bins = augmented.shape
    for start, stop in _bands(num_bins, config.num_freq_masks, config.freq_mask_width, rng):
        augmented[:, start:stop] = 0.0
    widest = min(config.time_mask_width, int(config.time_mask_max_ratio * num_frames))
    number = config.num_time_masks
    if config.frames_per_time_mask:
        number = max(number, num_frames // config.frames_per_time_mask)
    for start, stop in _bands(num_frames, number, widest, rng):
        augmented[start:stop] = 0.0
    return augmented


def _bands(size: int, number: int, widest: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """`number` intervals inside [0, size): widths uniform in [0, widest], then positions uniform among those that fit."""
    bands = []
    for _ in range(number):
        width = int(rng.integers(0, min(widest, size) + 1))
        start = int(rng.integers(0, size - width + 1))
        bands.append((start, start + width))
    return bands


def warp_time(feats: np.ndarray, window: int, rng: np.random.Generator) -> np.ndarray:
    """A copy with one frame moved by up to `window` frames, and both sides stretched linearly; the ends and the length stay.

    The paper's warp of one point along the time axis, by linear interpolation between frames.
    """
    num_frames = len(feats)
    if window == 0 or num_frames <= 2 * window + 2:  # no inner frame is far enough from both ends
        return feats.copy()
    centre = int(rng.integers(window + 1, num_frames - window - 1))
    moved = centre + int(rng.integers(-window, window + 1))
    if moved == centre:
        return feats.copy()
    # Output frame `moved` shows input frame `centre`.
    position = np.interp(np.arange(num_frames), [0, moved, num_frames - 1], [0, centre, num_frames - 1])
    left = np.minimum(position.astype(np.intp), num_frames - 2)
    weight = (position - left).astype(feats.dtype)[:, None]
    warped = feats[left]
    warped += weight * (feats[left + 1] - warped)
    return warped
