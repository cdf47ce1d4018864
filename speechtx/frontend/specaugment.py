"""SpecAugment (Park et al., Interspeech 2019): a time warp, then bands of frequency and of time set to the mean."""

from __future__ import annotations

import numpy as np

from speechtx.config.schema import SpecAugmentConfig


def spec_augment(
    feats: np.ndarray, config: SpecAugmentConfig, rng: np.random.Generator, mask_rng: np.random.Generator | None = None
) -> np.ndarray:
    """Augments one utterance; the same generator state gives the same result.

    Args:
        feats: (T, F) float32, normalised, so that 0 is the mean.
        config: widths and numbers of masks; zeros switch a part off.
        rng: where randomness comes from.
        mask_rng: where that of the masks comes from, if not from `rng`: views of an utterance share their time warp.

    Returns:
        (T, F), a new array; masked cells are 0.
    """
    augmented = _time_warp(feats, config.time_warp, rng)
    rng = mask_rng or rng
    num_frames, num_bins = feats.shape
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


def _time_warp(feats: np.ndarray, window: int, rng: np.random.Generator) -> np.ndarray:
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
