"""From rows of the utterance table to padded tensors: read, check, normalise, augment, pad.

All randomness is a function of (seed, epoch, utterance), so that the same position of the same epoch gives the same
batch whatever was loaded before it and however many worker processes load it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from speechtx.config.errors import DataError
from speechtx.config.schema import FeaturesConfig, SpecAugmentConfig
from speechtx.data.ark import read_matrix, read_scp
from speechtx.data.manifest import Utterance
from speechtx.frontend.cmvn import CmvnStats, apply_cmvn
from speechtx.frontend.perturb_features import FeaturePerturbation, at_length
from speechtx.frontend.specaugment import spec_augment

# Numbers of random streams of an utterance: of the first view, the next view has the next one; of TEMPO, which all views share.
# 0 would be the stream without a number.
MASKS, PERTURBATION, TEMPO = 1, 3, 5


@dataclass(frozen=True)
class Batch:
    """Padded features and, in training, padded tokens and phones (padding is 0 in all; lengths tell what is real)."""

    ids: list[str]
    feats: Tensor  # (B, T, F) float32
    feat_lens: Tensor  # (B,) int64
    tokens: Tensor  # (B, U) int64
    token_lens: Tensor  # (B,) int64
    phones: Tensor  # (B, P) int64; P is 0 where nothing needs them
    phone_lens: Tensor  # (B,) int64

    def pin_memory(self) -> Self:
        """Called by torch's DataLoader so that copies to the GPU can be asynchronous."""
        return self.map_tensors(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device) -> Batch:
        return self.map_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> Self:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: function(value) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **moved)


class FeatureReader:
    """Reads one utterance's features and normalises them as the model expects.

    Args:
        config: which CMVN.
        num_mel_bins: F; features of another width are an error.
        global_cmvn: needed when `config.cmvn` is "global".
        data_dir: where cmvn.scp lies; needed when `config.cmvn` is "speaker".
    """

    def __init__(
        self, *, config: FeaturesConfig, num_mel_bins: int, global_cmvn: CmvnStats | None = None, data_dir: Path | None = None
    ) -> None:
        self.config = config
        self.num_mel_bins = num_mel_bins
        self.global_cmvn = global_cmvn
        self.speaker_cmvn: dict[str, CmvnStats] = {}
        if config.cmvn == "global" and global_cmvn is None:
            raise DataError("features.cmvn is global, but there are no global statistics; run stage fbank on the training set")
        if config.cmvn == "speaker":
            if data_dir is None:
                raise DataError("features.cmvn is speaker, but no data directory with cmvn.scp was given")
            for speaker, location in read_scp(data_dir / "cmvn.scp").items():
                self.speaker_cmvn[speaker] = CmvnStats.from_matrix(read_matrix(location, dtype=np.float64, key=speaker))

    def __call__(self, utterance: Utterance) -> np.ndarray:
        """Returns normalised features (T, F), float32; raises what `read` does."""
        return self.normalise(utterance, self.read(utterance))

    def read(self, utterance: Utterance) -> np.ndarray:
        """Returns features (T, F) as they are stored.

        Raises:
            DataError: unreadable or non-finite features, another width, or a length other than utt2num_frames says.
        """
        where = f"utterance {utterance.id} ({utterance.feats})"
        feats = read_matrix(utterance.feats, key=utterance.id)
        if feats.ndim != 2 or feats.shape[1] != self.num_mel_bins:
            raise DataError(f"{where}: features have shape {feats.shape}, the model expects (frames, {self.num_mel_bins})")
        if feats.shape[0] != utterance.num_frames:
            raise DataError(
                f"{where}: {feats.shape[0]} frames, but utt2num_frames says {utterance.num_frames}; run stage fbank again"
            )
        return feats

    def normalise(self, utterance: Utterance, feats: np.ndarray) -> np.ndarray:
        """The utterance's features, or what perturbation made of them, after CMVN."""
        stats = CmvnStats.from_feats(feats) if self.config.cmvn == "utterance" else self.stored_stats(utterance)
        return feats if stats is None else apply_cmvn(feats, stats, norm_vars=self.config.norm_vars)

    def stored_stats(self, utterance: Utterance) -> CmvnStats | None:
        """Of the training set or of the speaker; None without CMVN, and where statistics are the utterance's own."""
        if self.config.cmvn in ("none", "utterance"):
            return None
        if self.config.cmvn == "global":
            return self.global_cmvn
        if utterance.speaker not in self.speaker_cmvn:
            raise DataError(
                f"utterance {utterance.id}: no CMVN statistics for speaker {utterance.speaker}; run stage fbank again"
            )
        return self.speaker_cmvn[utterance.speaker]


class Corpus(Dataset[Batch | DataError]):
    """Utterances with their tokens, loaded batch by batch.

    Args:
        utterances: rows of the table.
        tokens: token ids of each row; empty lists when decoding.
        phones: phones of each row, if the model predicts them.
        reader: reads and normalises features.
        specaugment: masks to draw, None for none.
        perturb: changes the features before they are normalised, None for none.
        spans: the fewest and the most frames of each row at another tempo (`tempo_span`); without it, those it has.
        seed: of the masks and changes.
        views: how many times each utterance is in a batch, perturbed and masked anew each time, but with the same tempo and time
            warp, so that frames correspond. A batch of N utterances has views * N rows: all in their first view, then all in
            their second.
    """

    def __init__(
        self,
        *,
        utterances: Sequence[Utterance],
        tokens: Sequence[Sequence[int]],
        phones: Sequence[Sequence[int]] = (),
        reader: FeatureReader,
        specaugment: SpecAugmentConfig | None = None,
        perturb: FeaturePerturbation | None = None,
        spans: Sequence[tuple[int, int]] = (),
        seed: int = 0,
        views: int = 1,
    ) -> None:
        self.utterances = utterances
        self.tokens = tokens
        self.phones = phones
        self.reader = reader
        self.specaugment = specaugment
        self.perturb = perturb
        self.spans = spans or [(u.num_frames, u.num_frames) for u in utterances]
        self.seed = seed
        self.views = views
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.utterances)

    @property
    def num_recorded(self) -> int:
        """How many utterances, the first ones, were said as they are."""
        return len(self.utterances)

    def rows(self) -> list[tuple]:
        """What tells this corpus from others, the same in every epoch: ids, lengths, tokens and, where there are some, phones."""
        return rows_of(self.utterances, self.tokens, self.phones)

    def read(self, index: int) -> np.ndarray:
        """The features of an utterance (T, F), as they are stored."""
        return self.reader.read(self.utterances[index])

    def length(self, index: int) -> int:
        """Frames that an utterance has in this epoch: those of the data, or at the tempo that is drawn for it."""
        fewest, most = self.spans[index]
        if self.perturb is None or fewest == most:
            return most
        tempo = self.perturb.config.tempo
        rate = self._generator(index, TEMPO).uniform(1.0 - tempo, 1.0 + tempo)
        return min(max(round(self.utterances[index].num_frames / rate), fewest), most)

    def lengths(self) -> list[int]:
        """Of all utterances, in this epoch: batches are made by them, so that slow speech fills none with padding."""
        return [self.length(index) for index in range(len(self))]

    def __getitem__(self, indices: list[int]) -> Batch | DataError:
        """A batch, or the error that one of its utterances raised: thrown in a worker, torch would wrap it in its traceback."""
        try:
            return self.batch(indices)
        except DataError as err:
            return err

    def batch(self, indices: list[int]) -> Batch:
        """Loads one batch in this process.

        Raises:
            DataError: see `FeatureReader`.
        """
        loaded = [self._features(i) for i in indices]
        return collate(
            [self.utterances[i].id for i in indices] * self.views,
            [views[number] for number in range(self.views) for views in loaded],
            *self.labels(indices),
        )

    def labels(self, indices: list[int]) -> tuple[list[Sequence[int]], list[Sequence[int]]]:
        """Tokens and phones of a batch's rows."""
        rows = indices * self.views
        return [self.tokens[i] for i in rows], [self.phones[i] for i in rows] if self.phones else []

    def _features(self, index: int) -> list[np.ndarray]:
        """The views of one utterance."""
        views = self._normalised(index)
        if self.specaugment is None:
            return views
        pairs = zip(views, self.view_generators(index), strict=True)
        return [spec_augment(view, self.specaugment, *generators) for view, generators in pairs]

    def view_generators(self, index: int) -> list[tuple[np.random.Generator, np.random.Generator | None]]:
        """For SpecAugment of each view of an utterance: of its time warp, and of its masks if it is another."""
        if self.views == 1:
            return [(self._generator(index), None)]
        return [(self._generator(index), self._generator(index, MASKS + number)) for number in range(self.views)]

    def _normalised(self, index: int) -> list[np.ndarray]:
        utterance = self.utterances[index]
        feats = self.read(index)
        if self.perturb is None:
            return [self.reader.normalise(utterance, feats)] * self.views
        feats = at_length(feats, self.length(index))
        views = []
        for number in range(self.views):
            rng = self._generator(index, PERTURBATION + number)
            other = int(rng.integers(self.num_recorded))
            views.append(self.reader.normalise(utterance, self.perturb(feats, rng, partial(self.read, other))))
        return views

    def _generator(self, *where: int) -> np.random.Generator:
        """Of the utterance `where[0]` in this epoch; a further number above 0 gives another stream (0 would give the same)."""
        return np.random.default_rng([self.seed, self.epoch, *where])

    def at_epoch(self, epoch: int) -> Corpus:
        """This corpus with the masks of the given epoch."""
        self.epoch = epoch
        return self

    def batches(self, indices: list[list[int]], *, workers: int = 0, pin: bool = False) -> Iterator[Batch]:
        """Loads the given batches in order, `workers` processes ahead of the consumer (0: in this process).

        Raises:
            DataError: when the batch that cannot be loaded is reached; see `FeatureReader`.
        """
        loader = DataLoader(
            self,
            batch_size=None,
            sampler=indices,  # each "sample" is a whole batch
            num_workers=min(workers, len(indices)),
            pin_memory=pin,
            prefetch_factor=4 if workers and indices else None,
        )
        for loaded in loader:
            if isinstance(loaded, DataError):
                raise loaded
            yield loaded


def rows_of(utterances: Sequence[Utterance], tokens: Sequence[Sequence[int]], phones: Sequence[Sequence[int]]) -> list[tuple]:
    """See `Corpus.rows`."""
    rows: list[tuple] = [(u.id, u.num_frames, list(ids)) for u, ids in zip(utterances, tokens, strict=True)]
    return rows + [(list(own),) for own in phones]


def collate(
    ids: list[str], feats: Sequence[np.ndarray], tokens: Sequence[Sequence[int]], phones: Sequence[Sequence[int]] = ()
) -> Batch:
    """Pads features (T_i, F), tokens (U_i,) and phones (P_i,) of a few utterances into one batch; no phones are none of each."""
    feat_lens = [len(f) for f in feats]
    padded = np.zeros((len(feats), max(feat_lens), feats[0].shape[1]), dtype=np.float32)
    for row, matrix in enumerate(feats):
        padded[row, : len(matrix)] = matrix
    return Batch(ids, torch.from_numpy(padded), torch.tensor(feat_lens), *_padded(tokens), *_padded(phones or [[]] * len(ids)))


def _padded(labels: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Labels of each utterance as (B, U), 0 in the padding, and their numbers (B,)."""
    lens = [len(row) for row in labels]
    padded = np.zeros((len(labels), max(lens)), dtype=np.int64)
    for row, found in enumerate(labels):
        padded[row, : len(found)] = found
    return torch.from_numpy(padded), torch.tensor(lens)
