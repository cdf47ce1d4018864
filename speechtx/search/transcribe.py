"""Recognising audio files from Python: `speechtx.load_recognizer(exp).transcribe("a.wav")`."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import soundfile
import torch

from speechtx.config.decode import DecodeConfig
from speechtx.config.errors import AudioError, ConfigError
from speechtx.experiment.experiment import Experiment
from speechtx.frontend.audio import load_audio
from speechtx.frontend.cmvn import CmvnStats, apply_cmvn
from speechtx.frontend.fbank import Fbank
from speechtx.model.memory import is_out_of_memory
from speechtx.model.subsampling import subsampled_length
from speechtx.search.decode import decode_batch, why_nothing
from speechtx.search.hypothesis import Hypothesis
from speechtx.search.memory import bounded_memory
from speechtx.search.system import System, check_search

Audio = str | os.PathLike[str] | tuple[np.ndarray, int]
"""A file, or samples (N,) with their rate in Hz."""

log = logging.getLogger(__name__)


def load_recognizer(
    exp: str | Path | Sequence[str | Path],
    *,
    weights: str | Path | Sequence[str | Path] | None = None,
    device: str = "auto",
    decode: DecodeConfig | None = None,
    lm: str | Path | None = None,
    ngram: str | Path | None = None,
) -> Transcriber:
    """Opens a trained experiment for recognising audio.

    Args:
        exp: the experiment directory; model, features, CMVN and tokenizer come from there. Several are an ensemble.
        weights: another weights file than `exp/model.pt`; several of one experiment are an ensemble.
        device: "cpu", "cuda", "cuda:1" ...; "auto" takes a GPU where there is one.
        decode: how to search; see `default_search` for what is done without it.
        lm: a language model's directory, weighed by `decode.lm_weight`.
        ngram: another, or an ARPA file, weighed by `decode.ngram_weight`.

    Raises:
        ExperimentError: the directory is no experiment, its weights do not fit, or a language model was made for other tokens.
        ConfigError: a search that needs a decoder this model does not have, a weight without its language model, or a device
            that is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as err:  # an unknown name, no such GPU, or a PyTorch without CUDA
        raise ConfigError(f"device {device!r} cannot be used: {str(err).splitlines()[0]}") from None
    system = System.find(_as_list(exp), weights=_as_list(weights), lm=lm, ngram=ngram)
    return Transcriber(system=system, device=device, decode=decode)


def _as_list(paths: str | Path | Sequence[str | Path] | None) -> Sequence[str | Path]:
    if paths is None:
        return []
    return [paths] if isinstance(paths, str | Path) else paths


class Transcriber:
    """Recognises one recording at a time.

    Recordings at another rate than the model's are resampled, and the log says so (a corpus is not, unless its fbank.yaml asks
    for it). With CMVN "global" the training set's statistics are used; a file has no known speaker, so "speaker" falls back to
    the recording's own statistics, as "utterance" does.
    """

    def __init__(self, *, system: System, device: str = "cpu", decode: DecodeConfig | None = None) -> None:
        """See `load_recognizer`."""
        self.exp = system.exp
        self.device = device
        self.model = system.load_model(device)
        self.decode = decode or default_search(self.exp)
        check_search(self.model, self.decode)
        (self.scorers,) = system.load_scorers([self.decode], device)
        self._fbank = Fbank(config=self.exp.fbank)

    def transcribe(self, audio: Audio) -> str:
        """The text of one recording; see `transcribe_nbest`."""
        return self.transcribe_nbest(audio)[0].text

    def transcribe_nbest(self, audio: Audio) -> list[Hypothesis]:
        """The n best hypotheses of one recording, best first (n as configured; greedy search has one).

        Args:
            audio: a file (wav, flac, NIST sphere and what else libsndfile reads), or (samples, rate): mono, floating point in
                [-1, 1] or 16-bit integers.

        Raises:
            AudioError: the recording cannot be used; the message names it and the cause.
        """
        name = "samples" if isinstance(audio, tuple) else os.fspath(audio)
        feats = self.features(audio)
        if subsampled_length(len(feats), self.exp.config.model.encoder.subsampling.factor) < 1:
            raise AudioError(f"{name}: {len(feats)} feature frames are too short for the model's subsampling")
        batch = torch.from_numpy(feats).unsqueeze(0).to(self.device)
        lengths = torch.tensor([len(feats)], device=self.device)
        try:
            with bounded_memory(self.device):
                (nbest,) = decode_batch(self.model, batch, lengths, self.decode, self.scorers)
        except (MemoryError, RuntimeError) as err:
            if not is_out_of_memory(err):
                raise
            raise AudioError(f"{name}: {len(feats)} feature frames do not fit into memory; cut it into pieces") from None
        if not nbest:
            raise AudioError(f"{name}: {why_nothing(self.decode)}")
        return [hypothesis.with_text(self.exp.tokenizer.decode) for hypothesis in nbest]

    def transcribe_each(self, audios: Iterable[Audio]) -> Iterator[list[Hypothesis] | AudioError]:
        """Recognises recordings one after another; one that cannot be used yields its error and does not stop the others."""
        for audio in audios:
            try:
                yield self.transcribe_nbest(audio)
            except AudioError as err:
                yield err

    def features(self, audio: Audio) -> np.ndarray:
        """The normalised features (T, F) that the model sees.

        Raises:
            AudioError: see `transcribe_nbest`.
        """
        rate = self.exp.fbank.sample_rate
        if isinstance(audio, tuple):
            name, samples = "samples", _checked_samples(*audio, rate)
        else:
            name = os.fspath(audio)
            samples = load_audio(name, sample_rate=rate, resample=True)
            if (found := soundfile.info(name).samplerate) != rate:
                log.info("%s: resampled from %d to %d Hz", name, found, rate)
        try:
            feats = self._fbank(samples)
        except AudioError as err:
            raise AudioError(f"{name}: {err}") from None
        config = self.exp.config.features
        if config.cmvn == "none":
            return feats
        stats = self.exp.global_cmvn if config.cmvn == "global" else CmvnStats.from_feats(feats)
        assert stats is not None  # Experiment raises where global statistics are missing
        return apply_cmvn(feats, stats, norm_vars=config.norm_vars)


def default_search(exp: Experiment) -> DecodeConfig:
    """The defaults, with CTC alone for a model that has no decoder, and `mask_ctc` for one whose decoder was trained for it."""
    decoder = exp.config.model.decoder
    if not decoder.layers:
        return DecodeConfig(ctc_weight=1.0)
    return DecodeConfig(method="mask_ctc") if decoder.type == "mask_ctc" else DecodeConfig()


def _checked_samples(samples: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """Samples as float32 in [-1, 1] at the wanted rate."""
    samples = np.asarray(samples)
    if samples.ndim != 1 or not samples.size:
        raise AudioError(f"samples: expected one channel of samples (N,), found shape {samples.shape}")
    if samples.dtype == np.int16:
        samples = samples.astype(np.float32) / 32768.0
    elif not np.issubdtype(samples.dtype, np.floating):
        raise AudioError(f"samples: expected floating point in [-1, 1] or int16, found {samples.dtype}")
    if rate <= 0:
        raise AudioError(f"samples: {rate} Hz is no sample rate")
    if not np.isfinite(samples).all():
        raise AudioError("samples: hold NaN or infinity")
    if np.abs(samples).max() > 2.0:
        raise AudioError(
            f"samples: floating point must lie in [-1, 1], found {np.abs(samples).max():g}; divide 16-bit values by 32768"
        )
    if rate != wanted:
        import soxr

        samples = soxr.resample(samples, rate, wanted)
    return np.asarray(samples, dtype=np.float32)
