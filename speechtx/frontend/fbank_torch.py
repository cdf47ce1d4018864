"""The features of `speechtx.frontend.fbank` for a whole padded batch of samples, on whatever device they are."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from speechtx.config.errors import ConfigError
from speechtx.config.schema import FbankConfig
from speechtx.frontend.fbank import Framing, too_many_bins


class BatchFbank:
    """Kaldi's log mel filterbank (feat/feature-window.cc, feat/mel-computations.cc) in float32.

    Equal to `Fbank` within float32 rounding: 5e-3 at most and 1e-5 on average, but for bins whose energy lies e^20 or more below
    their frame's loudest. An utterance's features do not depend on those beside it, but for rounding.

    Args:
        config: the feature configuration; `resample` is the business of whoever reads the samples.
        device: where the samples will be.

    Raises:
        ConfigError: `dither` is not 0, frames are below one sample, or a bin is narrower than a line of the spectrum.
    """

    def __init__(self, *, config: FbankConfig, device: torch.device) -> None:
        if problem := unsupported(config):
            raise ConfigError(problem)
        self.config = config
        self.framing = Framing.of(config)
        self._fft_size = 1 << (self.framing.window - 1).bit_length()
        self._taper = torch.from_numpy(window(config.window_type, self.framing.window)).to(device)
        self._filters = torch.from_numpy(mel_filters(config, self._fft_size)).to(device)

    @torch.no_grad()
    def __call__(self, samples: Tensor, lengths: Tensor) -> Tensor:
        """Computes the features of a batch.

        Args:
            samples: (B, N) float32 in [-1, 1] at `config.sample_rate`; what lies beyond a length may be any finite number.
            lengths: (B,) int64, samples of each utterance, at least one window.

        Returns:
            (B, T, F) float32, natural logarithms of mel energies, with as many frames as N samples have; those beyond
            `framing.num_frames` of an utterance's length mean nothing.
        """
        framing = self.framing
        if not framing.snip_edges:
            samples = self._mirrored(samples, lengths)
        frames = samples.unfold(1, framing.window, framing.shift)
        # The spectra of one utterance stay in a processor's cache, those of a batch do not: 1.6 times as fast.
        at_once = 1 if samples.device.type == "cpu" else len(samples)
        return torch.cat([self._features(rows) for rows in frames.split(at_once)])

    def _features(self, frames: Tensor) -> Tensor:
        """(B, T, F) of frames (B, T, window)."""
        frames = frames * 32768.0  # Kaldi's samples are 16-bit integers
        if self.config.remove_dc_offset:
            frames -= frames.mean(dim=-1, keepdim=True)
        if self.config.preemphasis:
            before = torch.cat((frames[..., :1], frames[..., :-1]), dim=-1)  # the first sample's predecessor is itself
            frames.sub_(before, alpha=self.config.preemphasis)
        frames *= self._taper
        spectrum = torch.fft.rfft(pad(frames, (0, self._fft_size - self.framing.window)))
        power = spectrum.real.square().addcmul_(spectrum.imag, spectrum.imag)
        return (power @ self._filters).clamp_(min=torch.finfo(torch.float32).eps).log_()

    def _mirrored(self, samples: Tensor, lengths: Tensor) -> Tensor:
        """Samples around which frames are centred: with `snip_edges` false, edges reach half a window into their mirror image."""
        framing = self.framing
        num_frames = framing.num_frames(samples.shape[1])
        first = framing.shift // 2 - framing.window // 2
        index = torch.arange(first, first + (num_frames - 1) * framing.shift + framing.window, device=samples.device)
        index = torch.where(index < 0, -index - 1, index).unsqueeze(0)
        index = torch.where(index < lengths.unsqueeze(1), index, 2 * lengths.unsqueeze(1) - 1 - index)
        return samples.gather(1, index.clamp_(min=0))


@functools.lru_cache(maxsize=8)
def batch_fbank(config: FbankConfig, device: torch.device) -> BatchFbank:
    """The one for this configuration and device, made when it is first asked for."""
    return BatchFbank(config=config, device=device)


def unsupported(config: FbankConfig) -> str:
    """Why features cannot be computed in batches; empty if they can."""
    if config.dither:
        return (
            f"dither {config.dither} is other noise each time: features that are computed in batches could not be those of stage "
            "fbank; set dither: 0"
        )
    return ""


def window(kind: str, size: int) -> np.ndarray:
    """Kaldi's window functions (feat/feature-window.cc), (size,) float32."""
    cosine = np.cos(2 * math.pi / (size - 1) * np.arange(size))
    hanning = 0.5 - 0.5 * cosine
    values = {"povey": hanning**0.85, "hanning": hanning, "hamming": 0.54 - 0.46 * cosine, "rectangular": np.ones(size)}[kind]
    return values.astype(np.float32)


def mel_filters(config: FbankConfig, fft_size: int) -> np.ndarray:
    """Triangles between equidistant points of the mel scale (feat/mel-computations.cc), (fft_size // 2 + 1, F) float32."""
    nyquist = config.sample_rate / 2
    high = config.high_freq if config.high_freq > 0 else nyquist + config.high_freq
    low_mel, high_mel, *line_mels = _mel(np.array([config.low_freq, high, *np.linspace(0.0, nyquist, fft_size // 2 + 1)]))
    edges = np.linspace(low_mel, high_mel, config.num_mel_bins + 2)
    lines = np.array(line_mels)[:, None]
    rising = (lines - edges[:-2]) / np.diff(edges)[:-1]
    falling = (edges[2:] - lines) / np.diff(edges)[1:]
    filters = np.maximum(np.minimum(rising, falling), 0.0)
    filters[-1] = 0.0  # Kaldi leaves out the Nyquist frequency
    if not filters.any(axis=0).all():
        raise too_many_bins(config)
    return filters.astype(np.float32)


def _mel(hertz: np.ndarray) -> np.ndarray:
    return 1127.0 * np.log1p(hertz / 700.0)
