"""Filterbank features against a slow, obvious float64 reading of Kaldi's definition, and against stored numbers."""

from __future__ import annotations

import io
import math
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import soundfile

from speechtx.config.errors import AudioError, ConfigError
from speechtx.config.schema import FbankConfig
from speechtx.frontend.fbank import Backend, Fbank

BACKENDS = get_args(Backend)
STORED = Path(__file__).parent / "reference" / "fbank80.npy"
# What float32 arithmetic allows: the largest differences sit in nearly empty bins.
MAX_ERROR, MEAN_ERROR = 5e-3, 1e-5

CONFIGS = {
    "recipe": FbankConfig(),
    "telephone": FbankConfig(sample_rate=8000, num_mel_bins=23, low_freq=60.0, high_freq=-200.0, window_type="hamming"),
    "plain": FbankConfig(preemphasis=0.0, window_type="rectangular", remove_dc_offset=False, num_mel_bins=40),
    "mirrored edges": FbankConfig(snip_edges=False, window_type="hanning", frame_length_ms=20.0, frame_shift_ms=12.5),
}


def synthetic(num_samples: int, rate: int = 16000) -> np.ndarray:
    """A rising tone with harmonics, noise, and an offset; its numbers are the same on every machine and for ever."""
    state, noise = 12345, []
    for _ in range(num_samples):
        state = (1103515245 * state + 12345) % 2**31
        noise.append(state / 2**30 - 1.0)
    t = np.arange(num_samples) / rate
    phase = 2 * np.pi * (180.0 * t + 900.0 * t**2)
    tone = 0.2 * np.sin(phase) + 0.1 * np.sin(2 * phase) + 0.05 * np.sin(5 * phase)
    return (tone + 0.02 * np.array(noise) + 0.01).astype(np.float32)


def window_value(kind: str, i: int, size: int) -> float:
    a = 2 * math.pi / (size - 1)
    return {
        "povey": (0.5 - 0.5 * math.cos(a * i)) ** 0.85,
        "hanning": 0.5 - 0.5 * math.cos(a * i),
        "hamming": 0.54 - 0.46 * math.cos(a * i),
        "rectangular": 1.0,
    }[kind]


def mel(frequency: float) -> float:
    return 1127.0 * math.log(1.0 + frequency / 700.0)


def reference_fbank(samples: np.ndarray, config: FbankConfig) -> np.ndarray:
    """Kaldi's feat/feature-window.cc and feat/mel-computations.cc, line by line, in float64."""
    wave = samples.astype(np.float64) * 32768.0
    size = int(config.sample_rate * config.frame_length_ms / 1000)
    shift = int(config.sample_rate * config.frame_shift_ms / 1000)
    fft_size = 2 ** math.ceil(math.log2(size))
    high = config.high_freq if config.high_freq > 0 else config.sample_rate / 2 + config.high_freq
    mel_low, mel_high = mel(config.low_freq), mel(high)
    step = (mel_high - mel_low) / (config.num_mel_bins + 1)
    num_frames = 1 + (len(wave) - size) // shift if config.snip_edges else (len(wave) + shift // 2) // shift
    feats = np.zeros((num_frames, config.num_mel_bins))
    for frame in range(num_frames):
        start = frame * shift if config.snip_edges else frame * shift + shift // 2 - size // 2
        piece = []
        for i in range(start, start + size):
            while not 0 <= i < len(wave):  # mirrored at the edges
                i = -i - 1 if i < 0 else 2 * len(wave) - 1 - i
            piece.append(wave[i])
        x = np.array(piece)
        if config.remove_dc_offset:
            x = x - x.mean()
        x = x - config.preemphasis * np.concatenate([x[:1], x[:-1]])
        x = x * np.array([window_value(config.window_type, i, size) for i in range(size)])
        power = np.abs(np.fft.rfft(x, fft_size)) ** 2
        for b in range(config.num_mel_bins):
            left, centre, right = (mel_low + (b + k) * step for k in range(3))
            energy = 0.0
            for k in range(fft_size // 2):
                m = mel(k * config.sample_rate / fft_size)
                if left < m < right:
                    weight = (m - left) / (centre - left) if m <= centre else (right - m) / (right - centre)
                    energy += weight * power[k]
            feats[frame, b] = math.log(max(energy, float(np.finfo(np.float32).eps)))
    return feats


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_features_are_kaldis_for_every_option(name: str, backend: Backend) -> None:
    config = CONFIGS[name]
    samples = synthetic(3500, config.sample_rate)
    feats = Fbank(config=config, backend=backend)(samples)
    error = np.abs(feats - reference_fbank(samples, config))
    assert feats.dtype == np.float32
    assert error.max() < MAX_ERROR
    assert error.mean() < MEAN_ERROR


@pytest.mark.parametrize("backend", BACKENDS)
def test_features_stay_what_they_were_when_the_reference_was_stored(backend: Backend) -> None:
    stored = np.load(STORED)
    assert stored.shape == (20, 80)
    error = np.abs(Fbank(config=FbankConfig(), backend=backend)(synthetic(3500)) - stored)
    assert error.max() < MAX_ERROR
    assert error.mean() < MEAN_ERROR


@pytest.mark.parametrize("option", ["num_mel_bins", "low_freq", "high_freq", "preemphasis", "window_type", "remove_dc_offset"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_option_is_ignored(option: str, backend: Backend) -> None:
    other = {"num_mel_bins": 79, "low_freq": 100.0, "high_freq": 6000.0, "preemphasis": 0.5, "window_type": "hamming"}
    config = FbankConfig.model_validate({option: other.get(option, False)})
    plain, changed = (Fbank(config=c, backend=backend)(synthetic(800)) for c in (FbankConfig(), config))
    assert plain.shape != changed.shape or np.abs(plain - changed).max() > 0.01


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("snip_edges", [True, False])
def test_number_of_frames_is_known_before_and_right(backend: Backend, snip_edges: bool) -> None:
    fbank = Fbank(config=FbankConfig(snip_edges=snip_edges), backend=backend)
    for num_samples in (400, 401, 559, 560, 1000, 1039, 1040):
        assert len(fbank(synthetic(num_samples))) == fbank.num_frames(num_samples)
    assert fbank.num_frames(0) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_digital_silence_gives_kaldis_floor_not_minus_infinity(backend: Backend) -> None:
    feats = Fbank(config=FbankConfig(), backend=backend)(np.zeros(1600, np.float32))
    np.testing.assert_allclose(feats, math.log(np.finfo(np.float32).eps), rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dither_makes_every_pass_different_and_none_repeats_exactly(backend: Backend) -> None:
    samples = synthetic(1600)
    still, dithered = Fbank(config=FbankConfig(), backend=backend), Fbank(config=FbankConfig(dither=1.0), backend=backend)
    assert np.array_equal(still(samples), still(samples))
    assert not np.array_equal(dithered(samples), dithered(samples))


@pytest.mark.parametrize("backend", BACKENDS)
def test_less_than_one_frame_is_refused_with_its_length(backend: Backend) -> None:
    with pytest.raises(AudioError, match=r"399 samples are 24.9 ms, less than one frame of 25.0 ms"):
        Fbank(config=FbankConfig(), backend=backend)(np.zeros(399, np.float32))


def test_an_unknown_backend_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="librosa"):
        Fbank(config=FbankConfig(), backend="librosa")  # type: ignore[arg-type]


def test_the_default_backend_does_not_pay_for_importing_torch() -> None:
    code = (
        "import sys, numpy; from speechtx.config.schema import FbankConfig; from speechtx.frontend.fbank import Fbank;"
        "Fbank(config=FbankConfig())(numpy.zeros(800, 'f4')); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_both_libraries_agree_on_recorded_speech(shared_data: Path) -> None:
    """The first recordings of AN4; bins e^20 below their frame's loudest are beyond float32."""
    extractors = [Fbank(config=FbankConfig(), backend=backend) for backend in BACKENDS]
    with tarfile.open(shared_data / "an4_sphere.tar.gz") as archive:
        recordings = (member for member in archive if member.name.endswith(".sph"))
        for _ in range(12):
            content = archive.extractfile(next(recordings))
            assert content is not None
            samples = soundfile.read(io.BytesIO(content.read()), dtype="float32")[0]
            one, other = (extractor(samples) for extractor in extractors)
            error = np.abs(one - other)
            assert error[one > one.max(axis=1, keepdims=True) - 20].max() < MAX_ERROR
            assert error.mean() < MEAN_ERROR
