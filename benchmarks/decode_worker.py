"""Our side of the decoding benchmark: answers `load`, `search` and `memory`, see `decode_workers`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.decode_case import Case
from benchmarks.decode_workers import peak_mib, serve
from speechtx.config.decode import DecodeConfig
from speechtx.config.lm import TransformerLmConfig
from speechtx.experiment.language_model import load_language_model
from speechtx.model.language_model import LanguageModel, TransformerLM
from speechtx.model.recognizer import Recognizer
from speechtx.search.batch_decoder import decoding_batches
from speechtx.search.decode import decode_encoded
from speechtx.search.scorers import Scorers

LM_SHAPE = TransformerLmConfig(layers=2, dim=64, heads=4, ff_dim=256)  # the AN4 recipe's


class _Decoding:
    """What `load` opened."""

    def __init__(self, path: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.case = Case.load(path)
        self.model: Recognizer = self.case.recognizer()
        self.clock = time.process_time if threads == 1 else time.perf_counter
        self.kept: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    @cached_property
    def lm(self) -> LanguageModel:
        if self.case.lm is not None:
            return load_language_model(self.case.lm, tokens=self.case.pieces)
        torch.manual_seed(2)
        return TransformerLM(config=LM_SHAPE, vocab_size=len(self.case.pieces)).eval()

    @cached_property
    def ngram(self) -> LanguageModel:
        assert self.case.ngram is not None
        return load_language_model(self.case.ngram, tokens=self.case.pieces)

    def scorers(self, config: DecodeConfig) -> Scorers:
        """What has a weight, opened when it is first needed."""
        return Scorers(lm=self.lm if config.lm_weight else None, ngram=self.ngram if config.ngram_weight else None)

    def encode(self, utts: Sequence[int]) -> tuple[Tensor, Tensor]:
        feats = [self.case.feats[utt] for utt in utts]
        return self.model.encode(pad_sequence(feats, batch_first=True), torch.tensor([len(one) for one in feats]))

    def encoded(self, utts: Sequence[int]) -> tuple[Tensor, Tensor]:
        if tuple(utts) not in self.kept:
            self.kept[tuple(utts)] = self.encode(utts)
        return self.kept[tuple(utts)]

    def limited(self, config: DecodeConfig, utts: Sequence[int]) -> DecodeConfig:
        """As many tokens as the references have: with weights that never end a sentence it is exactly that many.

        Utterances of one batch share a limit for each frame, so there it is as many as they have together, nearly.
        """
        tokens = sum(self.case.tokens[utt] + 0.5 for utt in utts)
        return config.model_copy(update={"max_len_ratio": tokens / int(self.encoded(utts)[1].sum())})


_decoding: list[_Decoding] = []


def load(case: str, threads: int) -> dict[str, Any]:
    _decoding[:] = [_Decoding(case, threads)]
    return {"versions": f"torch {torch.__version__}"}


@torch.inference_mode()
def search(utts: Sequence[int], config: dict[str, Any], encode: bool, forced: bool, batched: bool = False) -> dict[str, Any]:
    """Decodes utterances.

    Args:
        utts: which.
        config: fields of `DecodeConfig`.
        encode: whether the encoder counts; otherwise its output is kept from a first call that does not count.
        forced: to the length of the reference.
        batched: in the batches of `speechtx decode`, instead of one by one.
    """
    decoding = _decoding[0]
    parsed = DecodeConfig.model_validate(config)
    scorers = decoding.scorers(parsed)
    batches = [[place] for place in range(len(utts))]
    if batched:
        batches = decoding_batches([len(decoding.case.feats[utt]) for utt in utts], parsed)
    groups = [[utts[place] for place in places] for places in batches]
    configs = [decoding.limited(parsed, group) if forced else parsed for group in groups]
    if not encode:
        for group in groups:
            decoding.encoded(group)
    found = []
    start = decoding.clock()
    for group, one in zip(groups, configs, strict=True):
        encoded = decoding.encode(group) if encode else decoding.encoded(group)
        found.append(decode_encoded(decoding.model, *encoded, one, scorers))
    seconds = decoding.clock() - start
    tokens: list[Sequence[int]] = [()] * len(utts)
    for places, nbests in zip(batches, found, strict=True):
        for place, nbest in zip(places, nbests, strict=True):
            tokens[place] = nbest[0].tokens if nbest else ()
    return {"seconds": seconds, "tokens": tokens}


def memory() -> dict[str, Any]:
    return {"mib": peak_mib()}


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        serve({"load": load, "search": search, "memory": memory})
