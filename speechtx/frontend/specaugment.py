"""SpecAugment (Park et al., Interspeech 2019): a time warp, then bands of frequency and of time set to the mean."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from speechtx.config.schema import SpecAugmentConfig


@dataclass(frozen=True)
class Augmentation:
    """What SpecAugment does to one utterance; it is drawn without looking at the features."""

    position: np.ndarray | None  # (T,) float64: where in the utterance, between its frames, each frame is read; None: where it is
    keep_frames: np.ndarray  # (T,) bool, False where masked
    keep_bins: np.ndarray  # (F,) bool


def draw(
    num_frames: int,
    num_bins: int,
    config: SpecAugmentConfig,
    rng: np.random.Generator,
    mask_rng: np.random.Generator | None = None,
) -> Augmentation:
    """Draws for one utterance of T frames and F bins; the same generator state gives the same result.

    Args:
        num_frames: T.
        num_bins: F.
        config: widths and numbers of masks; zeros switch a part off.
        rng: where randomness comes from.
        mask_rng: where that of the masks comes from, if not from `rng`: views of an utterance share their time warp.
    """
    position = _time_warp(num_frames, config.time_warp, rng)
    rng = mask_rng or rng
    keep_frames, keep_bins = np.ones(num_frames, dtype=bool), np.ones(num_bins, dtype=bool)
    for start, stop in _bands(num_bins, config.num_freq_masks, config.freq_mask_width, rng):
        keep_bins[start:stop] = False
    widest = min(config.time_mask_width, int(config.time_mask_max_ratio * num_frames))
    number = config.num_time_masks
    if config.frames_per_time_mask:
        number = max(number, num_frames // config.frames_per_time_mask)
    for start, stop in _bands(num_frames, number, widest, rng):
        keep_frames[start:stop] = False
    return Augmentation(position, keep_frames, keep_bins)


def spec_augment(
    feats: np.ndarray, config: SpecAugmentConfig, rng: np.random.Generator, mask_rng: np.random.Generator | None = None
) -> np.ndarray:
    """Augments one utterance (T, F) float32, normalised, so that 0 is the mean; the other arguments are those of `draw`.

    Returns:
        (T, F), a new array; masked cells are 0.
    """
    num_frames, num_bins = feats.shape
    drawn = draw(num_frames, num_bins, config, rng, mask_rng)
    augmented = feats.copy() if drawn.position is None else read_at(feats, drawn.position)
    augmented[:, ~drawn.keep_bins] = 0.0
    augmented[~drawn.keep_frames] = 0.0
    return augmented


def _bands(size: int, number: int, widest: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """`number` intervals inside [0, size): widths uniform in [0, widest], then positions uniform among those that fit."""
    bands = []
    for _ in range(number):
        width = int(rng.integers(0, min(widest, size) + 1))
        start = int(rng.integers(0, size - width + 1))
        bands.append((start, start + width))
    return bands


def _time_warp(num_frames: int, window: int, rng: np.random.Generator) -> np.ndarray | None:
    """One frame is moved by up to `window` frames, and both sides stretched linearly; the ends and the length stay.

    The paper's warp of one point along the time axis.

    Returns:
        (T,) float64, where each frame is read; None where nothing moves.
    """
    if window == 0 or num_frames <= 2 * window + 2:  # no inner frame is far enough from both ends
        return None
    centre = int(rng.integers(window + 1, num_frames - window - 1))
    moved = centre + int(rng.integers(-window, window + 1))
    if moved == centre:
        return None
    # Output frame `moved` shows input frame `centre`.
    return np.interp(np.arange(num_frames), [0, moved, num_frames - 1], [0, centre, num_frames - 1])


def read_at(feats: np.ndarray, position: np.ndarray) -> np.ndarray:
    """(T', F): features (T, F), T at least 2, linearly interpolated between frames at positions (T',) in [0, T - 1]."""
    left = np.minimum(position.astype(np.intp), len(feats) - 2)
    weight = (position - left).astype(feats.dtype)[:, None]
    warped = feats[left]
    warped += weight * (feats[left + 1] - warped)
    return warped
