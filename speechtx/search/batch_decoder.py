"""Utterances of a data directory, read, encoded once and searched, batch by batch; one that cannot be decoded stops no other."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from speechtx.config.decode import DecodeConfig
from speechtx.config.errors import DataError
from speechtx.data.batching import make_batches
from speechtx.data.loader import FeatureReader, collate
from speechtx.data.manifest import Utterance
from speechtx.experiment.experiment import Experiment
from speechtx.model.recognizer import Recognizer
from speechtx.model.subsampling import subsampled_length
from speechtx.search.decode import decode_encoded
from speechtx.search.hypothesis import Hypothesis
from speechtx.search.memory import bounded_memory, is_out_of_memory, what_was_asked
from speechtx.search.parts import Decoded
from speechtx.search.scorers import Scorers

_MAX_UTTS = 64  # utterances a batch; more gains nothing and costs memory in beam * vocabulary

Found = tuple[list[Hypothesis], float]
"""One utterance's n best, without text, and the seconds it took."""

log = logging.getLogger(__name__)


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

    def batches(self, utterances: Sequence[Utterance]) -> Iterator[list[list[Decoded]]]:
        """Decodes utterances of similar length together; yields, for every batch, a list for each configuration.

        An utterance that cannot be decoded is logged and gets an empty n-best list with the cause. If memory runs out, the
        utterances of the batch are decoded one by one, and only those that still do not fit fail.
        """
        budget = self.configs[0].frames_per_batch
        for utterance in (u for u in utterances if u.num_frames > budget):
            yield self._batch([utterance])
        others = [u for u in utterances if u.num_frames <= budget]
        for indices in make_batches([u.num_frames for u in others], frames_per_batch=budget, max_utts=_MAX_UTTS):
            yield self._batch([others[i] for i in indices])

    def _batch(self, utterances: Sequence[Utterance]) -> list[list[Decoded]]:
        start = time.perf_counter()
        readable: list[Utterance] = []
        feats: list[np.ndarray] = []
        errors: dict[str, str] = {}
        for utterance in utterances:
            try:
                feats.append(self._features(utterance))
                readable.append(utterance)
            except DataError as err:
                errors[utterance.id] = str(err)
        reading = time.perf_counter() - start
        found = self._search_or_split(readable, feats, errors) if readable else {}
        for utt, error in errors.items():
            log.warning("%s: not decoded, its hypothesis is empty: %s", utt, error)
        frames = sum(utterance.num_frames for utterance in utterances) or 1
        return [
            [self._decoded(u, found.get(u.id), index, errors, reading * u.num_frames / frames) for u in utterances]
            for index in range(len(self.configs))
        ]

    def _decoded(
        self, utterance: Utterance, found: list[Found] | None, index: int, errors: dict[str, str], reading: float
    ) -> Decoded:
        """The result of one utterance with one configuration."""
        audio = utterance.num_frames * self.exp.fbank.frame_shift_ms / 1000
        if found is None:
            return Decoded(utterance.id, [], audio, reading, errors[utterance.id])
        nbest = [hypothesis.with_text(self.exp.tokenizer.decode) for hypothesis in found[index][0]]
        error = None if nbest else "the model's output is not finite"
        if error:
            log.warning("%s: not decoded, its hypothesis is empty: %s", utterance.id, error)
        return Decoded(utterance.id, nbest, audio, reading + found[index][1], error)

    def _search_or_split(
        self, utterances: Sequence[Utterance], feats: Sequence[np.ndarray], errors: dict[str, str]
    ) -> dict[str, list[Found]]:
        """What each configuration found for each utterance; those for which there is no memory go to `errors`."""
        try:
            with bounded_memory(self.device):
                return self._search(utterances, feats)
        except (MemoryError, RuntimeError) as err:
            if not is_out_of_memory(err):
                raise
            cause = what_was_asked(err)
        gc.collect()  # outside of `except`, so that nothing holds the failed attempt's tensors any more
        if self.device != "cpu":
            torch.cuda.empty_cache()
        if len(utterances) == 1:
            frames = utterances[0].num_frames
            seconds = frames * self.exp.fbank.frame_shift_ms / 1000
            errors[utterances[0].id] = (
                f"{frames} frames ({seconds:.0f} s) do not fit into memory{cause}: cut it into segments, or use fewer jobs"
            )
            return {}
        log.warning("memory ran out on %d utterances; they are decoded one by one", len(utterances))
        found: dict[str, list[Found]] = {}
        for utterance, matrix in zip(utterances, feats, strict=True):
            found |= self._search_or_split([utterance], [matrix], errors)
        return found

    def _search(self, utterances: Sequence[Utterance], feats: Sequence[np.ndarray]) -> dict[str, list[Found]]:
        ids = [utterance.id for utterance in utterances]
        shares = np.array([utterance.num_frames for utterance in utterances], dtype=np.float64)
        shares /= shares.sum()
        start = time.perf_counter()
        batch = collate(ids, feats, [[] for _ in ids])
        with torch.inference_mode():
            enc_out, enc_lens = self.model.encode(batch.feats.to(self.device), batch.feat_lens.to(self.device))
            encoding = time.perf_counter() - start
            found: dict[str, list[Found]] = {utt: [] for utt in ids}
            for config, scorers in zip(self.configs, self.scorers, strict=True):
                start = time.perf_counter()
                nbests = decode_encoded(self.model, enc_out, enc_lens, config, scorers)
                seconds = encoding + time.perf_counter() - start
                for utt, nbest, share in zip(ids, nbests, shares.tolist(), strict=True):
                    found[utt].append((nbest, seconds * share))
        return found

    def _features(self, utterance: Utterance) -> np.ndarray:
        if subsampled_length(utterance.num_frames, self.exp.config.model.encoder.subsampling.factor) < 1:
            raise DataError(f"utterance {utterance.id}: {utterance.num_frames} frames are too short for the model's subsampling")
        return self.reader(utterance)
