"""Speed perturbation (Ko et al., Interspeech 2015): the same words, spoken faster or slower."""

from __future__ import annotations

import numpy as np

from speechtx.config.errors import AudioError


def change_speed(samples: np.ndarray, factor: float) -> np.ndarray:
    """Plays a recording `factor` times as fast; pitch and tempo change together, as with `sox speed`.

    Args:
        samples: (N,) float32.
        factor: above 1 is faster and shorter; 1.0 returns the samples as they are.

    Returns:
        (round(N / factor),) float32, at the same nominal sample rate.

    Raises:
        AudioError: the factor is not a positive number.
    """
    if not 0.0 < factor < float("inf"):
        raise AudioError(f"speed factor {factor} must be a positive number, such as 0.9 or 1.1")
    if factor == 1.0 or len(samples) == 0:
        return samples
    import soxr

    # Reading the samples as if they were `factor` times as dense, and resampling back to the nominal rate.
    return np.asarray(soxr.resample(samples, factor, 1.0), dtype=np.float32)
