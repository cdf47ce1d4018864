"""Utterances of a data directory, read, encoded once and searched, batch by batch; one that cannot be decoded stops no other."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from speechtx.config.decode import DecodeConfig
from speechtx.config.errors import DataError
from speechtx.data.batching import make_batches
from speechtx.data.loader import FeatureReader, collate
from speechtx.data.manifest import Utterance
from speechtx.experiment.experiment import Experiment
from speechtx.model.memory import is_out_of_memory
from speechtx.model.recognizer import Recognizer
from speechtx.model.subsampling import subsampled_length
from speechtx.search.decode import decode_encoded, why_nothing
from speechtx.search.memory import bounded_memory, what_was_asked
from speechtx.search.parts import Decoded
from speechtx.search.scorers import Scorers

_MAX_UTTS = 64  # utterances a batch; more gains nothing and costs memory in beam * vocabulary

log = logging.getLogger(__name__)


def decoding_batches(num_frames: Sequence[int], config: DecodeConfig) -> list[list[int]]:
    """The places of utterances of these lengths that are decoded together: those longer than `frames_per_batch` alone, first."""
    budget = config.frames_per_batch
    alone = [[place] for place, frames in enumerate(num_frames) if frames > budget]
    others = [place for place, frames in enumerate(num_frames) if frames <= budget]
    batches = make_batches([num_frames[place] for place in others], frames_per_batch=budget, max_utts=_MAX_UTTS)
    return alone + [[others[i] for i in batch] for batch in batches]


@dataclass(frozen=True)
class _Read:
    """An utterance, its normalised features (T, F), and the seconds that reading them took."""

    utterance: Utterance
    feats: np.ndarray
    seconds: float


@dataclass(frozen=True)
class _Encoded:
    """What the encoder says of a batch, see `decode_encoded`, and the seconds that it took."""

    enc_out: Tensor
    enc_lens: Tensor
    phones: list[Tensor]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class BatchDecoder:
    """Decodes with one configuration or several; the encoder runs once for all of them.

    Attributes:
        model: in evaluation mode, on `device`.
        exp: whose features and tokenizer they are.
        reader: reads and normalises features.
        configs: one or several.
        scorers: of each configuration.
    """

    model: Recognizer
    exp: Experiment
    reader: FeatureReader
    configs: Sequence[DecodeConfig]
    scorers: Sequence[Scorers]
    device: str

    def only(self, indices: Sequence[int]) -> BatchDecoder:
        """The same with some of the configurations."""
        return replace(self, configs=[self.configs[i] for i in indices], scorers=[self.scorers[i] for i in indices])

    def batches(self, utterances: Sequence[Utterance]) -> Iterator[tuple[int, list[Decoded]]]:
        """Decodes utterances of similar length together; those longer than `frames_per_batch` alone.

        Yields what one configuration made of one batch as soon as it is known: the place of the configuration in `configs` and
        the results. An utterance that cannot be decoded is logged and gets an empty n-best list with the cause. If memory runs
        out, the utterances of the batch are decoded one by one, and only those that still do not fit fail.
        """
        for places in decoding_batches([u.num_frames for u in utterances], self.configs[0]):
            yield from self._batch([utterances[place] for place in places])

    def _batch(self, utterances: Sequence[Utterance]) -> Iterator[tuple[int, list[Decoded]]]:
        readable: list[_Read] = []
        failed: list[Decoded] = []
        for utterance in utterances:
            start = time.perf_counter()
            try:
                feats = self._features(utterance)
                readable.append(_Read(utterance, feats, time.perf_counter() - start))
            except (DataError, MemoryError) as err:
                error = str(err) or f"its {utterance.num_frames} frames do not fit into memory"
                failed.append(self._failed(utterance, error, time.perf_counter() - start))
        indices = range(len(self.configs))
        if readable:
            yield from self._search_or_split(readable, indices)
        if failed:
            yield from ((index, failed) for index in indices)

    def _search_or_split(self, batch: Sequence[_Read], indices: Sequence[int]) -> Iterator[tuple[int, list[Decoded]]]:
        """Encodes a batch and searches it with each of the configurations; without memory for it, utterance by utterance."""
        done = 0
        try:
            for found in self._encode_and_search(batch, indices):
                yield found
                done += 1
            return
        except (MemoryError, RuntimeError) as err:
            if not is_out_of_memory(err):
                raise
            asked = what_was_asked(err)
        gc.collect()  # outside of `except`, so that nothing holds the failed attempt's tensors any more
        if self.device != "cpu":
            torch.cuda.empty_cache()
        if len(batch) > 1:
            log.warning("memory ran out on %d utterances%s; they are decoded one by one", len(batch), asked)
            for one in batch:
                yield from self._search_or_split([one], indices[done:])
            return
        utterance = batch[0].utterance
        length = f"{utterance.num_frames} frames ({self._seconds(utterance):.0f} s)"
        error = f"{length} do not fit into memory{asked}: cut it into segments, or use fewer jobs"
        result = self._failed(utterance, error, batch[0].seconds)
        yield from ((index, [result]) for index in indices[done:])

    def _encode_and_search(self, batch: Sequence[_Read], indices: Sequence[int]) -> Iterator[tuple[int, list[Decoded]]]:
        encoded = self._encode(batch)
        for index in indices:
            yield index, self._search(batch, encoded, index)

    def _encode(self, batch: Sequence[_Read]) -> _Encoded:
        start = time.perf_counter()
        phones: list[Tensor] | None = [] if any(config.phone_weight for config in self.configs) else None
        with bounded_memory(self.device), torch.inference_mode():
            padded = collate([read.utterance.id for read in batch], [read.feats for read in batch], [[] for _ in batch])
            enc_out, enc_lens = self.model.encode(padded.feats.to(self.device), padded.feat_lens.to(self.device), phones=phones)
        return _Encoded(enc_out, enc_lens, phones or [], time.perf_counter() - start)

    def _search(self, batch: Sequence[_Read], encoded: _Encoded, index: int) -> list[Decoded]:
        """What one configuration finds; its share of the encoder's seconds is all of them, as if it were the only one."""
        start = time.perf_counter()
        with bounded_memory(self.device):
            config, scorers = self.configs[index], self.scorers[index]
            nbests = decode_encoded(self.model, encoded.enc_out, encoded.enc_lens, config, scorers, phones=encoded.phones)
        texts = [[hypothesis.with_text(self.exp.tokenizer.decode) for hypothesis in nbest] for nbest in nbests]
        seconds = (encoded.seconds + time.perf_counter() - start) / sum(read.utterance.num_frames for read in batch)
        results = []
        for read, nbest in zip(batch, texts, strict=True):
            utterance, took = read.utterance, read.seconds + seconds * read.utterance.num_frames
            if nbest:
                results.append(Decoded(utterance.id, nbest, self._seconds(utterance), took))
            else:
                results.append(self._failed(utterance, why_nothing(self.configs[index]), took))
        return results

    def _failed(self, utterance: Utterance, error: str, seconds: float) -> Decoded:
        log.warning("%s: not decoded, its hypothesis is empty: %s", utterance.id, error)
        return Decoded(utterance.id, [], self._seconds(utterance), seconds, error)

    def _seconds(self, utterance: Utterance) -> float:
        return utterance.num_frames * self.exp.fbank.frame_shift_ms / 1000

    def _features(self, utterance: Utterance) -> np.ndarray:
        if subsampled_length(utterance.num_frames, self.exp.config.model.encoder.subsampling.factor) < 1:
            raise DataError(f"utterance {utterance.id}: {utterance.num_frames} frames are too short for the model's subsampling")
        return self.reader(utterance)
