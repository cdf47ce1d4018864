"""The batched filterbank against kaldi-native-fbank and against Kaldi's definition, alone and beside longer utterances."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from test_fbank import CONFIGS, MAX_ERROR, MEAN_ERROR, reference_fbank, synthetic

from speechtx.config.errors import ConfigError
from speechtx.config.schema import FbankConfig
from speechtx.frontend.fbank import Fbank
from speechtx.frontend.fbank_torch import BatchFbank, batch_fbank

CPU = torch.device("cpu")
WAVE = synthetic(16000)


def computed(config: FbankConfig, waves: list[np.ndarray], padding: float = 0.0) -> list[np.ndarray]:
    """Features of waves that were computed in one batch."""
    lengths = torch.tensor([len(wave) for wave in waves])
    samples = torch.full((len(waves), int(lengths.max())), padding)
    for row, wave in zip(samples, waves, strict=True):
        row[: len(wave)] = torch.from_numpy(wave)
    fbank = BatchFbank(config=config, device=CPU)
    feats = fbank(samples, lengths)
    return [row[: fbank.framing.num_frames(len(wave))].numpy() for row, wave in zip(feats, waves, strict=True)]


@pytest.mark.parametrize("name", CONFIGS)
def test_features_are_kaldis_for_every_option(name: str) -> None:
    config = CONFIGS[name]
    samples = synthetic(3500, config.sample_rate)
    (feats,) = computed(config, [samples])
    error = np.abs(feats - reference_fbank(samples, config))
    assert feats.dtype == np.float32
    assert error.max() < MAX_ERROR
    assert error.mean() < MEAN_ERROR


@settings(max_examples=60, deadline=None)
@given(
    config=st.builds(
        FbankConfig,
        sample_rate=st.sampled_from([8000, 16000]),
        num_mel_bins=st.integers(4, 90),
        frame_length_ms=st.sampled_from([16.0, 20.0, 25.0, 32.0]),
        frame_shift_ms=st.sampled_from([5.0, 10.0, 12.5]),
        low_freq=st.floats(0.0, 200.0),
        high_freq=st.sampled_from([0.0, -300.0, 3700.0]),
        preemphasis=st.sampled_from([0.0, 0.5, 0.97]),
        window_type=st.sampled_from(["povey", "hamming", "hanning", "rectangular"]),
        remove_dc_offset=st.booleans(),
        snip_edges=st.booleans(),
    ),
    lengths=st.lists(st.integers(512, 3000), min_size=1, max_size=4),
    start=st.integers(0, 12000),
    padding=st.sampled_from([0.0, 0.7]),
)
def test_a_padded_batch_has_the_features_that_stage_fbank_dumps(
    config: FbankConfig, lengths: list[int], start: int, padding: float
) -> None:
    waves = [WAVE[start : start + length] for length in lengths]
    try:
        fbank, _ = Fbank(config=config), BatchFbank(config=config, device=CPU)
    except ConfigError:  # more bins than lines of the spectrum
        reject()
    for wave, feats in zip(waves, computed(config, waves, padding), strict=True):
        expected = fbank(wave)
        assert feats.shape == expected.shape
        error = np.abs(feats - expected)
        loud = expected > expected.max(axis=1, keepdims=True) - 20  # below, float32 has no digits left
        assert error[loud].max() < MAX_ERROR
        assert error[loud].mean() < 2 * MEAN_ERROR  # a few frames of a few bins vary more than an utterance does


def test_more_bins_than_the_spectrum_has_lines_are_refused_by_both() -> None:
    config = FbankConfig(sample_rate=8000, num_mel_bins=42, frame_length_ms=16.0, low_freq=0.0, high_freq=-300.0)
    for make in (lambda: Fbank(config=config), lambda: BatchFbank(config=config, device=CPU)):
        with pytest.raises(ConfigError, match="num_mel_bins 42 is too many for frames of 16"):
            make()


def test_it_agrees_with_kaldi_on_recorded_speech(shared_data: Path) -> None:
    waves = []
    with tarfile.open(shared_data / "an4_sphere.tar.gz") as archive:
        for member in (member for member in archive if member.name.endswith(".sph")):
            content = archive.extractfile(member)
            assert content is not None
            waves.append(soundfile.read(io.BytesIO(content.read()), dtype="float32")[0])
            if len(waves) == 12:
                break
    fbank = Fbank(config=FbankConfig())
    for wave, feats in zip(waves, computed(FbankConfig(), waves), strict=True):
        expected = fbank(wave)
        error = np.abs(feats - expected)
        assert error[expected > expected.max(axis=1, keepdims=True) - 20].max() < MAX_ERROR
        assert error.mean() < MEAN_ERROR


def test_digital_silence_gives_kaldis_floor_not_minus_infinity() -> None:
    (feats,) = computed(FbankConfig(), [np.zeros(1600, np.float32)])
    np.testing.assert_allclose(feats, np.log(np.finfo(np.float32).eps), rtol=1e-6)


@pytest.mark.parametrize("option", ["num_mel_bins", "low_freq", "high_freq", "preemphasis", "window_type", "remove_dc_offset"])
def test_no_option_is_ignored(option: str) -> None:
    other = {"num_mel_bins": 79, "low_freq": 100.0, "high_freq": 6000.0, "preemphasis": 0.5, "window_type": "hamming"}
    config = FbankConfig.model_validate({option: other.get(option, False)})
    plain, changed = (computed(c, [WAVE[:800]])[0] for c in (FbankConfig(), config))
    assert plain.shape != changed.shape or np.abs(plain - changed).max() > 0.01


def test_dither_is_refused_because_it_could_not_be_the_same() -> None:
    with pytest.raises(ConfigError, match=r"dither 1\.0"):
        batch_fbank(FbankConfig(dither=1.0), CPU)
