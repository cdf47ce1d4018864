"""Perturbation of log mel energies before normalisation: another tempo, another vocal tract, noise, another level."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from speechtx.config.schema import FbankConfig, NoiseConfig, PerturbConfig
from speechtx.frontend.specaugment import read_at

VTLP_BOUNDARY = 0.6  # of Nyquist: 4800 Hz at 16 kHz, above the formants that matter (Jaitly and Hinton 2013, section 2)
PAUSE_SHARE = 0.1  # of an utterance's frames, the quietest, count as its pauses
DECIBEL = np.log(10.0) / 10.0  # in the features' unit, nepers of power


class FeaturePerturbation:
    """Changes one utterance's features; the same generator state gives the same result.

    Args:
        config: what to change, and how much.
        fbank: of the features; vocal tract length needs the frequencies of the bins.
    """

    def __init__(self, *, config: PerturbConfig, fbank: FbankConfig) -> None:
        self.config = config
        self.fbank = fbank

    def __call__(self, feats: np.ndarray, rng: np.random.Generator, other: Callable[[], np.ndarray]) -> np.ndarray:
        """Perturbs one utterance.

        Args:
            feats: (T, F) float32, natural logarithms of mel energies, not normalised.
            rng: where randomness comes from; what is switched off draws nothing.
            other: gives the features of another utterance, of which noise is made; called only when needed.

        Returns:
            (T, F) float32, a new array unless nothing is changed.
        """
        if self.config.vtlp:
            alpha = rng.uniform(1.0 - self.config.vtlp, 1.0 + self.config.vtlp)
            feats = warp_frequency(feats, alpha, self.fbank)
        noise = self.config.noise
        if noise is not None and rng.random() < noise.probability:
            feats = add_noise(feats, make_noise(other(), len(feats), noise, rng), snr_db=rng.uniform(*noise.snr_db))
        if self.config.volume_db:
            feats = feats + np.float32(DECIBEL * rng.uniform(-self.config.volume_db, self.config.volume_db))
        return feats


def tempo_span(num_frames: int, tempo: float, *, shortest: int, longest: int) -> tuple[int, int]:
    """The fewest and the most frames that an utterance of T frames may have when it is spoken at a rate in 1 +- `tempo`.

    Args:
        num_frames: T.
        tempo: of the configuration, 0 to 0.5.
        shortest: faster speech has at least these, unless T is less already: what the transcript needs.
        longest: slower speech has at most these, unless T is more already: what fits into a batch.
    """
    if num_frames < 2:  # nothing to read between
        return num_frames, num_frames
    fewest = max(round(num_frames / (1.0 + tempo)), min(shortest, num_frames))
    return fewest, min(round(num_frames / (1.0 - tempo)), max(longest, num_frames))


def at_length(feats: np.ndarray, length: int) -> np.ndarray:
    """(T, F) features spoken faster or slower: (`length`, F), read between frames, first and last as they were."""
    return feats if length == len(feats) else read_at(feats, np.linspace(0, len(feats) - 1, length))


def warp_frequency(feats: np.ndarray, alpha: float, fbank: FbankConfig) -> np.ndarray:
    """Vocal tract length perturbation: the energy at frequency f becomes what was at `warped(f)`.

    The paper moves the filters of the filterbank; between the logarithms of neighbouring filters this interpolates linearly.

    Args:
        feats: (T, F).
        alpha: above 1 moves formants down, as a longer vocal tract does.
        fbank: of the features.
    """
    nyquist = fbank.sample_rate / 2
    high = fbank.high_freq if fbank.high_freq > 0 else nyquist + fbank.high_freq
    low_mel, high_mel = _mel(np.array([fbank.low_freq, high]))
    step = (high_mel - low_mel) / (fbank.num_mel_bins + 1)
    centres = _hertz(low_mel + step * np.arange(1, fbank.num_mel_bins + 1))
    position = np.clip((_mel(warped(centres, alpha, nyquist)) - low_mel) / step - 1.0, 0, fbank.num_mel_bins - 1)
    left = np.minimum(position.astype(np.intp), fbank.num_mel_bins - 2)
    weight = (position - left).astype(np.float32)
    return feats[:, left] * (1.0 - weight) + feats[:, left + 1] * weight


def warped(frequency: np.ndarray, alpha: float, nyquist: float) -> np.ndarray:
    """alpha * f up to a boundary, then straight to Nyquist, which stays (Jaitly and Hinton 2013, equation 1)."""
    boundary = VTLP_BOUNDARY * nyquist * min(alpha, 1.0) / alpha
    slope = (nyquist - alpha * boundary) / (nyquist - boundary)
    return np.where(frequency <= boundary, alpha * frequency, nyquist - slope * (nyquist - frequency))


def make_noise(other: np.ndarray, num_frames: int, config: NoiseConfig, rng: np.random.Generator) -> np.ndarray:
    """`num_frames` frames out of another utterance (T', F), from a random one on and around its end: all, or its pauses only."""
    if config.source == "pauses":
        energy = other.mean(axis=1)
        quietest = np.argsort(energy, kind="stable")[: max(1, int(PAUSE_SHARE * len(other)))]
        other = other[np.sort(quietest)]
    return other[(rng.integers(len(other)) + np.arange(num_frames)) % len(other)]


def add_noise(feats: np.ndarray, noise: np.ndarray, *, snr_db: float) -> np.ndarray:
    """Adds energies: what recordings do on average over the phases, which features no longer know.

    Args:
        feats: (T, F) natural logarithms.
        noise: (T, F), of any level.
        snr_db: ten times the decimal logarithm of the ratio of both energies, summed over frames and bins.
    """
    level = _log_energy(feats) - _log_energy(noise) - DECIBEL * snr_db
    return np.logaddexp(feats, noise + np.float32(level))


def _log_energy(feats: np.ndarray) -> float:
    """Of the mean over frames and bins."""
    peak = float(feats.max())
    return peak + float(np.log(np.exp(feats - peak, dtype=np.float64).mean()))


def _mel(hertz: np.ndarray) -> np.ndarray:
    """Kaldi's scale (feat/mel-computations.h)."""
    return 1127.0 * np.log1p(hertz / 700.0)


def _hertz(mel: np.ndarray) -> np.ndarray:
    return 700.0 * np.expm1(mel / 1127.0)
