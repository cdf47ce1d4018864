"""Training from waveforms: loader processes read samples; features, CMVN and SpecAugment follow on the model's device.

What is drawn and what is looked up stays where it was, in the loader, so that the draws are those of training from features
that were computed before; a batch carries them to the device as small tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from speechtx.config.errors import AudioError, ConfigError, DataError
from speechtx.config.schema import FbankConfig, FeaturesConfig
from speechtx.data.features import Source, read_sources
from speechtx.data.kaldi_table import is_pipe
from speechtx.data.loader import Batch, Corpus, collate
from speechtx.data.manifest import Utterance
from speechtx.frontend.cmvn import VARIANCE_FLOOR
from speechtx.frontend.fbank import Framing, require_one_frame
from speechtx.frontend.fbank_torch import batch_fbank, unsupported
from speechtx.frontend.specaugment import Augmentation, draw


@dataclass(frozen=True)
class WaveformBatch(Batch):
    """Samples of B utterances, of which `to` makes a `Batch` with R rows: B, or 2 B if each utterance has two views.

    Until then `feats` is (R, T, 0): it has the shape of a batch, but no bins.
    """

    samples: Tensor  # (B, N) float32
    sample_lens: Tensor  # (B,) int64
    mean: Tensor | None  # (B, F) float32 of CMVN statistics that are stored; None: of the utterance itself, or no CMVN
    scale: Tensor | None  # (B, F) float32, one over the standard deviation
    position: Tensor | None  # (R, T) float64, of the time warp; None if there is none
    keep_frames: Tensor  # (R, T) bool, False where masked or padding
    keep_bins: Tensor  # (R, F) bool
    fbank: FbankConfig
    features: FeaturesConfig

    def to(self, device: torch.device) -> Batch:
        """Moves the samples to the device and computes the features there."""
        here = self.map_tensors(lambda tensor: tensor.to(device, non_blocking=True))
        feats = batch_fbank(self.fbank, device)(here.samples, here.sample_lens)
        feats = here._augmented(here._normalised(feats).repeat(len(self.ids) // len(feats), 1, 1))
        return Batch(self.ids, feats, here.feat_lens, here.tokens, here.token_lens, here.phones, here.phone_lens)

    def _normalised(self, feats: Tensor) -> Tensor:
        """(B, T, F) after CMVN (`speechtx.frontend.cmvn`)."""
        if self.features.cmvn == "none":
            return feats
        if self.mean is None or self.scale is None:
            mean, scale = self._own_statistics(feats)
        else:
            mean, scale = self.mean, self.scale
        feats = feats - mean.unsqueeze(1)
        return feats.mul_(scale.unsqueeze(1)) if self.features.norm_vars else feats

    def _own_statistics(self, feats: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and one over the standard deviation of each utterance's frames, both (B, F)."""
        lengths = self.feat_lens[: len(feats), None, None]
        valid = torch.arange(feats.shape[1], device=feats.device).view(1, -1, 1) < lengths
        mean = feats.masked_fill(~valid, 0.0).sum(dim=1, keepdim=True) / lengths
        variance = (feats - mean).masked_fill_(~valid, 0.0).square_().sum(dim=1) / lengths.squeeze(1)
        return mean.squeeze(1), variance.clamp_(min=VARIANCE_FLOOR).rsqrt_()

    def _augmented(self, feats: Tensor) -> Tensor:
        """(R, T, F) after SpecAugment (`speechtx.frontend.specaugment`), 0 in the padding."""
        if self.position is not None:
            left = self.position.long()
            weight = (self.position - left).float().unsqueeze(-1)
            ends = (left, (left + 1).clamp_(max=feats.shape[1] - 1))
            before, after = (feats.gather(1, end.unsqueeze(-1).expand_as(feats)) for end in ends)
            feats = before.add_(weight * (after - before))
        return feats.masked_fill_(~(self.keep_frames.unsqueeze(2) & self.keep_bins.unsqueeze(1)), 0.0)


class WaveformCorpus(Corpus):
    """A corpus whose batches are loaded as waveforms, and have the same features after `to` but for rounding.

    Args:
        sources: what each utterance is made of.
        fbank: the features to compute.
        corpus: what `Corpus` takes, without `perturb`.

    Raises:
        ConfigError: the features cannot be computed in batches.
    """

    def __init__(self, *, sources: Mapping[str, Source], fbank: FbankConfig, **corpus: Any) -> None:
        super().__init__(**corpus)
        if problem := unsupported(fbank):
            raise ConfigError(f"training.waveforms: {problem}")
        self.sources = sources
        self.fbank = fbank
        self.framing = Framing.of(fbank)

    def batch(self, indices: list[int]) -> WaveformBatch:
        """Loads one batch in this process.

        Raises:
            DataError: audio that cannot be read, or of another length than utt2num_frames says.
        """
        utterances = [self.utterances[i] for i in indices]
        samples = [self._samples(utterance) for utterance in utterances]
        drawn = [augmentation for views in zip(*map(self._draw, indices), strict=True) for augmentation in views]
        rows = collate(
            [utterance.id for utterance in utterances] * self.views,
            [np.empty((len(augmentation.keep_frames), 0), dtype=np.float32) for augmentation in drawn],
            *self.labels(indices),
        )
        stats = [found for utterance in utterances if (found := self.reader.stored_stats(utterance)) is not None]
        warped = any(augmentation.position is not None for augmentation in drawn)
        return WaveformBatch(
            **vars(rows),
            samples=_padded(samples, np.float32),
            sample_lens=torch.tensor([len(wave) for wave in samples]),
            mean=_stacked(found.mean for found in stats) if stats else None,
            scale=_stacked(1.0 / np.sqrt(found.variance) for found in stats) if stats else None,
            position=_padded([_positions(augmentation) for augmentation in drawn], np.float64) if warped else None,
            keep_frames=_padded([augmentation.keep_frames for augmentation in drawn], np.bool_),
            keep_bins=torch.from_numpy(np.stack([augmentation.keep_bins for augmentation in drawn])),
            fbank=self.fbank,
            features=self.reader.config,
        )

    def _draw(self, index: int) -> list[Augmentation]:
        """For the views of one utterance."""
        size = self.utterances[index].num_frames, self.fbank.num_mel_bins
        if self.specaugment is None:
            return [Augmentation(None, np.ones(size[0], dtype=bool), np.ones(size[1], dtype=bool))] * self.views
        return [draw(*size, self.specaugment, *generators) for generators in self.view_generators(index)]

    def _samples(self, utterance: Utterance) -> np.ndarray:
        source = self.sources[utterance.id]
        try:
            samples = source.samples(self.fbank)
            require_one_frame(samples, self.fbank)
        except AudioError as err:
            raise DataError(f"utterance {utterance.id}: {err}") from None
        frames = self.framing.num_frames(len(samples))
        if frames != utterance.num_frames:
            raise DataError(
                f"utterance {utterance.id} ({source.audio}): {frames} frames, but utt2num_frames says {utterance.num_frames}; "
                "run stage fbank again"
            )
        return samples


def training_sources(data_dir: Path, utterances: Iterable[Utterance]) -> dict[str, Source]:
    """What the utterances of a data directory are made of.

    Raises:
        DataError: see `read_sources`; or an utterance's audio is unknown, or a command, which would run in each epoch.
    """
    sources = {source.utterance: source for source in read_sources(data_dir, allow_pipes=True)}
    for utterance in utterances:
        if utterance.id not in sources:
            raise DataError(f"{data_dir}: utterance {utterance.id} of feats.scp has no audio in wav.scp and segments")
        if is_pipe(audio := sources[utterance.id].audio):
            raise DataError(
                f"{data_dir / 'wav.scp'}: utterance {utterance.id}: a command ({audio}), which training.waveforms would run "
                "again in each epoch; write its output to a file, or train from stored features (training.waveforms: false)"
            )
    return sources


def _positions(drawn: Augmentation) -> np.ndarray:
    return np.arange(len(drawn.keep_frames)) if drawn.position is None else drawn.position


def _padded(rows: Sequence[np.ndarray], dtype: type) -> Tensor:
    padded: np.ndarray = np.zeros((len(rows), max(map(len, rows))), dtype=dtype)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return torch.from_numpy(padded)


def _stacked(rows: Iterable[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack([row.astype(np.float32) for row in rows]))
