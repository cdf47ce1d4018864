"""Speed perturbation: length and pitch must move together."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechtx.config.errors import AudioError
from speechtx.frontend.perturb import change_speed


def tone(frequency: float, num_samples: int = 16000) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * frequency * np.arange(num_samples) / 16000)).astype(np.float32)


def loudest(samples: np.ndarray) -> float:
    """Frequency, in Hz, of the strongest component."""
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return float(np.argmax(spectrum) * 16000 / len(samples))


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_faster_is_shorter_and_higher(factor: float) -> None:
    changed = change_speed(tone(1000.0), factor)
    assert len(changed) == round(16000 / factor)
    assert changed.dtype == np.float32
    assert loudest(changed) == pytest.approx(1000.0 * factor, abs=2.0)
    assert np.abs(changed[1000:-1000]).max() == pytest.approx(0.5, abs=0.01)


def test_factor_one_changes_nothing() -> None:
    samples = tone(440.0)
    assert np.array_equal(change_speed(samples, 1.0), samples)


@settings(max_examples=25, deadline=None)
@given(num_samples=st.integers(1, 5000), factor=st.floats(0.5, 2.0))
def test_length_is_divided_by_the_factor(num_samples: int, factor: float) -> None:
    assert abs(len(change_speed(np.zeros(num_samples, np.float32), factor)) - num_samples / factor) <= 1


def test_an_impossible_factor_is_refused() -> None:
    for factor in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(AudioError, match="speed factor"):
            change_speed(tone(440.0, 100), factor)
