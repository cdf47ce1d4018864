"""Perturbed features are what perturbed audio would give: level exactly, noise on average, vocal tracts as their formula says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy_corpus import BINS, REGULARISERS, make_training_data, tiny_config

from speechtx.config.errors import ConfigError
from speechtx.config.schema import FbankConfig, FeaturesConfig, NoiseConfig, PerturbConfig
from speechtx.data.loader import Corpus, FeatureReader
from speechtx.data.manifest import load_manifest
from speechtx.experiment.experiment import Experiment
from speechtx.frontend.fbank import Fbank
from speechtx.frontend.perturb_features import (
    FeaturePerturbation,
    add_noise,
    at_length,
    make_noise,
    tempo_span,
    warp_frequency,
    warped,
)
from speechtx.training.prepare import TrainingData, build_corpora
from speechtx.training.train import train

FBANK = FbankConfig()
EVERYTHING = PerturbConfig(tempo=0.2, vtlp=0.1, volume_db=6.0, noise=NoiseConfig(probability=1.0))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    return make_training_data(tmp_path_factory.mktemp("toy"))


def make_corpus(data: TrainingData, perturb: PerturbConfig | None, *, epoch: int = 1, cmvn: str = "none") -> Corpus:
    utterances = load_manifest(data.train)
    return Corpus(
        utterances=utterances,
        tokens=[[1, 2]] * len(utterances),
        reader=FeatureReader(config=FeaturesConfig(cmvn=cmvn), num_mel_bins=BINS, data_dir=data.train),
        perturb=perturb and FeaturePerturbation(config=perturb, fbank=FbankConfig(num_mel_bins=BINS)),
        spans=perturb and [tempo_span(u.num_frames, perturb.tempo, shortest=11, longest=3000) for u in utterances],
        seed=5,
    ).at_epoch(epoch)


def noise_of(samples: int, seed: int, tilt: float) -> np.ndarray:
    """Coloured noise, so that the spectra of two signals differ."""
    white = np.random.default_rng(seed).normal(size=samples)
    spectrum = np.fft.rfft(white) * np.linspace(1.0, tilt, samples // 2 + 1)
    return (0.05 * np.fft.irfft(spectrum, samples)).astype(np.float32)


# ------------------------------------------------------------------------------------------------ tempo


@given(num_frames=st.integers(1, 500), tempo=st.floats(0.0, 0.5), shortest=st.integers(1, 400), longest=st.integers(300, 600))
def test_another_tempo_leaves_what_the_transcript_needs_and_makes_no_more_than_a_batch_may_hold(
    num_frames: int, tempo: float, shortest: int, longest: int
) -> None:
    fewest, most = tempo_span(num_frames, tempo, shortest=shortest, longest=longest)
    assert fewest <= num_frames <= most
    assert min(shortest, num_frames) <= fewest
    assert most <= max(longest, num_frames)
    assert num_frames / (1 + tempo) - 1 <= fewest and most <= num_frames / (1 - tempo) + 1


@given(num_frames=st.integers(2, 300), length=st.integers(2, 300))
def test_another_tempo_keeps_both_ends_and_the_order_of_frames(num_frames: int, length: int) -> None:
    feats = np.arange(num_frames, dtype=np.float32)[:, None]
    other = at_length(feats, length)
    assert other.shape == (length, 1)
    assert (other[0], other[-1]) == (0, num_frames - 1)
    assert (np.diff(other[:, 0]) > 0).all()


def test_tempo_is_uniform_about_one(data: TrainingData) -> None:
    corpus = make_corpus(data, PerturbConfig(tempo=0.25))
    frames = np.array([utterance.num_frames for utterance in corpus.utterances])
    rates = np.concatenate([frames / corpus.at_epoch(epoch).lengths() for epoch in range(200)])
    assert np.quantile(rates, [0.0, 0.25, 0.5, 0.75, 1.0]) == pytest.approx([0.75, 0.875, 1.0, 1.125, 1.25], abs=0.02)


def test_batches_are_made_by_the_tempo_of_the_epoch(data: TrainingData) -> None:
    corpus = make_corpus(data, PerturbConfig(tempo=0.5))
    of_epochs = [corpus.at_epoch(epoch).lengths() for epoch in (1, 2)]
    assert of_epochs[0] != of_epochs[1]
    for epoch, lengths in enumerate(of_epochs, start=1):
        assert corpus.at_epoch(epoch).batch(list(range(len(corpus)))).feat_lens.tolist() == lengths


def test_faster_speech_keeps_its_spectrum_where_faster_sound_moves_it(data: TrainingData) -> None:
    plain, other = (make_corpus(data, perturb).batch([3]).feats[0] for perturb in (None, PerturbConfig(tempo=0.5)))
    assert len(other) != len(plain)
    stretched = torch.nn.functional.interpolate(plain.T[None], size=len(other), mode="linear", align_corners=True)[0].T
    assert torch.allclose(other, stretched, atol=1e-4)


def test_views_of_an_utterance_have_one_tempo_so_that_frames_correspond(data: TrainingData) -> None:
    corpus = make_corpus(data, PerturbConfig(tempo=0.5))
    corpus.views = 2
    first, second = corpus.batch([3, 5]).feats.chunk(2)
    assert torch.equal(first, second)


# ------------------------------------------------------------------------------------------------ vocal tract length


def test_another_vocal_tract_shows_a_formant_at_its_frequency_divided_by_alpha() -> None:
    fine = FbankConfig(num_mel_bins=400)
    mel = np.linspace(1127 * np.log1p(20 / 700), 1127 * np.log1p(8000 / 700), 402)[1:-1]
    hertz = 700 * np.expm1(mel / 1127)
    for formant in (500.0, 1500.0, 2500.0):
        bump = -(((hertz - formant) / 100.0) ** 2)[None].astype(np.float32)
        for alpha in (0.9, 1.0, 1.15):
            seen = hertz[warp_frequency(bump, alpha, fine)[0].argmax()]
            assert seen == pytest.approx(formant / alpha, rel=0.02)


@given(alpha=st.floats(0.5, 1.5), nyquist=st.sampled_from([4000.0, 8000.0, 22050.0]))
def test_the_warp_of_frequencies_is_continuous_and_keeps_order_zero_and_nyquist(alpha: float, nyquist: float) -> None:
    frequencies = np.linspace(0.0, nyquist, 2001)
    moved = warped(frequencies, alpha, nyquist)
    assert moved[0] == 0.0
    assert moved[-1] == pytest.approx(nyquist)
    steps = np.diff(moved)
    assert (steps > 0).all()
    assert steps.max() < 6 * nyquist / 2000  # no jump
    below = frequencies < 0.6 * nyquist * min(alpha, 1.0) / alpha
    np.testing.assert_allclose(moved[below], alpha * frequencies[below])


def test_alpha_one_changes_nothing_and_the_input_stays_untouched() -> None:
    feats = np.random.default_rng(0).normal(size=(30, 80)).astype(np.float32)
    before = feats.copy()
    np.testing.assert_allclose(warp_frequency(feats, 1.0, FBANK), feats, atol=1e-4)
    warp_frequency(feats, 1.1, FBANK)
    assert np.array_equal(feats, before)


def test_features_of_stretched_spectra_are_those_of_stretched_sound() -> None:
    """Sound played 1.1 times as fast has its spectrum stretched by 1.1, and so, in shape, have its features warped by 1 / 1.1."""
    from speechtx.frontend.perturb import change_speed

    formants = np.cos(np.linspace(0, 12 * np.pi, 32001)) * 3.0
    spectrum = np.fft.rfft(np.random.default_rng(0).normal(size=64000)) * np.exp(formants)
    sound = (0.01 * np.fft.irfft(spectrum, 64000)).astype(np.float32)
    plain, fast = (Fbank(config=FBANK)(s).mean(axis=0)[None] for s in (sound, change_speed(sound, 1.1)))
    useful = slice(5, 60)  # above the pitch, below the boundary
    errors = {}
    for alpha in (1 / 1.1, 1.0, 1.1):
        difference = (warp_frequency(plain, alpha, FBANK) - fast)[0, useful]
        errors[alpha] = difference.std()
    assert errors[1 / 1.1] < 0.5 * errors[1.0] < errors[1.1]


# ------------------------------------------------------------------------------------------------ noise and level


@given(snr_db=st.floats(-20, 40), level=st.floats(-30, 30), seed=st.integers(0, 100))
def test_noise_is_added_at_the_ratio_asked_for_whatever_its_own_level(snr_db: float, level: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    speech, noise = rng.normal(5.0, 3.0, (50, 8)).astype(np.float32), rng.normal(level, 3.0, (50, 8)).astype(np.float32)
    mixed = np.exp(add_noise(speech, noise, snr_db=snr_db).astype(np.float64)).mean()
    assert mixed / np.exp(speech.astype(np.float64)).mean() == pytest.approx(1.0 + 10 ** (-snr_db / 10), rel=1e-3)


def test_adding_energies_is_what_adding_samples_does_on_average() -> None:
    audio = noise_of(256000, 1, 0.1), noise_of(256000, 2, 3.0)
    speech, noise, real = (Fbank(config=FBANK)(samples) for samples in (*audio, sum(audio)))
    snr = 10 * np.log10(np.exp(speech).mean() / np.exp(noise).mean())

    def energies(feats: np.ndarray) -> np.ndarray:
        return np.log(np.exp(feats.astype(np.float64)).mean(axis=0))  # of each bin, over 16 seconds

    np.testing.assert_allclose(energies(add_noise(speech, noise, snr_db=snr)), energies(real), atol=0.2)
    assert np.abs(energies(speech) - energies(real)).max() > 1.0


def test_noise_of_pauses_holds_quiet_frames_only_and_noise_of_speech_goes_on_around_the_end() -> None:
    other = np.repeat(np.arange(100.0, dtype=np.float32)[::-1, None], 4, axis=1)  # frame 99 is the quietest
    pauses = make_noise(other, 35, NoiseConfig(source="pauses"), np.random.default_rng(0))
    assert pauses.shape == (35, 4)
    assert set(pauses[:, 0]) == set(range(10))
    speech = make_noise(other, 250, NoiseConfig(source="speech"), np.random.default_rng(0))[:, 0]
    assert set(np.diff(speech)) == {-1.0, 99.0}
    assert len(make_noise(other[:1], 3, NoiseConfig(source="pauses"), np.random.default_rng(0))) == 3


def test_volume_shifts_features_as_louder_audio_does() -> None:
    audio = noise_of(16000, 3, 0.5)
    config = PerturbConfig(volume_db=10.0)
    shifted = FeaturePerturbation(config=config, fbank=FBANK)(Fbank(config=FBANK)(audio), np.random.default_rng(7), pytest.fail)
    gain_db = np.random.default_rng(7).uniform(-10.0, 10.0)
    np.testing.assert_allclose(shifted, Fbank(config=FBANK)((audio * 10 ** (gain_db / 20)).astype(np.float32)), atol=2e-3)


def test_probability_decides_how_often_noise_is_added() -> None:
    perturb = FeaturePerturbation(config=PerturbConfig(noise=NoiseConfig(probability=0.3)), fbank=FBANK)
    feats, rng = np.zeros((5, 80), np.float32), np.random.default_rng(0)
    noisy = [bool(perturb(feats, rng, lambda: feats).any()) for _ in range(1000)]
    assert np.mean(noisy) == pytest.approx(0.3, abs=0.05)


# ------------------------------------------------------------------------------------------------ in training


def test_draws_belong_to_the_utterance_and_the_epoch_not_to_the_batch(data: TrainingData) -> None:
    corpus = make_corpus(data, EVERYTHING)
    alone = corpus.batch([3]).feats[0]
    assert torch.equal(alone, corpus.batch([0, 3, 7]).feats[1, : len(alone)])
    assert not torch.equal(alone, make_corpus(data, EVERYTHING, epoch=2).batch([3]).feats[0])
    assert not torch.equal(alone, make_corpus(data, None).batch([3]).feats[0])


def test_views_of_an_utterance_get_perturbations_of_their_own_the_first_view_that_of_a_single_one(data: TrainingData) -> None:
    single, double = make_corpus(data, EVERYTHING), make_corpus(data, EVERYTHING)
    double.views = 2
    first, second = double.batch([3, 5]).feats.chunk(2)
    assert torch.equal(first, single.batch([3, 5]).feats)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("cmvn", "cancels"), [("utterance", True), ("speaker", False)])
def test_volume_cancels_where_each_utterance_is_normalised_by_itself_and_nowhere_else(
    data: TrainingData, cmvn: str, cancels: bool
) -> None:
    plain, louder = (make_corpus(data, perturb, cmvn=cmvn).batch([3]).feats for perturb in (None, PerturbConfig(volume_db=20.0)))
    assert torch.allclose(plain, louder, atol=1e-4) == cancels


def test_dev_is_never_perturbed_and_sections_of_zeros_are_no_perturbation(data: TrainingData, tmp_path: Path) -> None:
    config = tiny_config("training.perturb.vtlp=0.1", "training.epochs=1")
    train(config, data, tmp_path)
    for_training, for_dev, _ = build_corpora(tmp_path, data, Experiment.open(tmp_path).config)
    assert for_training.perturb is not None
    assert for_dev.perturb is None
    assert build_corpora(tmp_path, data, tiny_config("training.perturb.vtlp=0.0"))[0].perturb is None


def test_the_list_of_regularisers_in_the_tests_of_resuming_has_all_of_these() -> None:
    assert tiny_config(*REGULARISERS).training.perturb.model_dump(exclude_defaults=True).keys() == EVERYTHING.model_dump().keys()


@pytest.mark.parametrize(
    "override", ["vtlp=0.6", "tempo=0.6", "vtlp=-0.1", "volume_db=-1", "noise.snr_db=[20, 5]", "noise.source=street"]
)
def test_values_that_make_no_sense_are_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=r"training\.perturb\." + override.split("=")[0].split(".")[0]):
        tiny_config(f"training.perturb.{override}")
