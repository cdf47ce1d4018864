"""Background noise for the mini corpus, made with NumPy: white, pink, babble-like and mains hum."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def white(rng: np.random.Generator, length: int, sample_rate: int) -> np.ndarray:
    """Equal power at all frequencies, as the hiss of an amplifier."""
    return rng.standard_normal(length)


def pink(rng: np.random.Generator, length: int, sample_rate: int) -> np.ndarray:
    """Power falling by 3 dB an octave, as in many rooms; flat below 50 Hz."""
    frequencies = np.maximum(np.fft.rfftfreq(length, 1 / sample_rate), 50.0)
    return _shape(rng.standard_normal(length), 1 / np.sqrt(frequencies))


def babble(rng: np.random.Generator, length: int, sample_rate: int) -> np.ndarray:
    """Several talkers far away: noise with formant-like spectra, each swelling and fading a few times a second."""
    frequencies = np.fft.rfftfreq(length, 1 / sample_rate)
    total = np.zeros(length)
    for _ in range(6):
        spectrum = 0.05 / (1 + frequencies / 500)
        for centre, width in ((500, 150), (1500, 250), (2500, 350)):
            spectrum += np.exp(-0.5 * ((frequencies - centre * rng.uniform(0.7, 1.3)) / width) ** 2) / (1 + centre / 500)
        slow = _shape(rng.standard_normal(length), (frequencies < 4.0).astype(float))
        total += _shape(rng.standard_normal(length), spectrum) * np.maximum(slow / (slow.std() + 1e-12) + 0.5, 0)
    return total


def hum(rng: np.random.Generator, length: int, sample_rate: int) -> np.ndarray:
    """Mains at 50 or 60 Hz with its harmonics, over a little hiss."""
    mains = rng.choice([50.0, 60.0])
    time = np.arange(length) / sample_rate
    total = 0.1 * rng.standard_normal(length)
    for harmonic in range(1, 8):
        total += rng.uniform(0.3, 1.0) / harmonic * np.sin(2 * np.pi * mains * harmonic * time + rng.uniform(0, 2 * np.pi))
    return total


def _shape(samples: np.ndarray, gains: np.ndarray) -> np.ndarray:
    return np.fft.irfft(np.fft.rfft(samples) * gains, n=samples.size)


def make_noise(kind: str, rng: np.random.Generator, length: int, sample_rate: int) -> np.ndarray:
    """(N,) samples of one of `KINDS`; made at the next power of two, where the FFT is fast, and cut."""
    return KINDS[kind](rng, 1 << (length - 1).bit_length(), sample_rate)[:length]


KINDS: dict[str, Callable[[np.random.Generator, int, int], np.ndarray]] = {
    "white": white,
    "pink": pink,
    "babble": babble,
    "hum": hum,
}


def add_noise(speech: np.ndarray, noise: np.ndarray, *, snr_db: float) -> np.ndarray:
    """`speech` plus `noise` scaled so that the ratio of their mean powers is `snr_db`, over the samples where somebody speaks.

    Args:
        speech: (N,) samples; zeros count as pauses.
        noise: (N,) samples of any level.
        snr_db: signal to noise ratio in dB.
    """
    speech_power = np.mean(np.square(speech[speech != 0]))
    gain = np.sqrt(speech_power / np.mean(np.square(noise)) / 10 ** (snr_db / 10))
    return speech + gain * noise
