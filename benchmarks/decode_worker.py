"""Our side of the decoding benchmark: answers `load`, `search` and `memory`, see `decode_workers`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from benchmarks.decode_case import Case
from benchmarks.decode_workers import peak_mib, serve
from speechtx.config.decode import DecodeConfig
from speechtx.config.lm import TransformerLmConfig
from speechtx.experiment.language_model import load_language_model
from speechtx.model.language_model import LanguageModel, TransformerLM
from speechtx.model.recognizer import Recognizer
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
        self.encoded = cache(self.encode)

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

    def encode(self, utt: int) -> tuple[Tensor, Tensor]:
        feats = self.case.feats[utt]
        return self.model.encode(feats.unsqueeze(0), torch.tensor([len(feats)]))

    def limited(self, config: DecodeConfig, utt: int) -> DecodeConfig:
        """As many tokens as the reference has: with weights that never end a sentence it is exactly that many."""
        frames = int(self.encoded(utt)[1])
        return config.model_copy(update={"max_len_ratio": (self.case.tokens[utt] + 0.5) / frames})


_decoding: list[_Decoding] = []


def load(case: str, threads: int) -> dict[str, Any]:
    _decoding[:] = [_Decoding(case, threads)]
    return {"versions": f"torch {torch.__version__}"}


@torch.inference_mode()
def search(utts: Sequence[int], config: dict[str, Any], encode: bool, forced: bool) -> dict[str, Any]:
    """Decodes utterances one by one.

    Args:
        utts: which.
        config: fields of `DecodeConfig`.
        encode: whether the encoder counts; otherwise its output is kept from a first call that does not count.
        forced: to the length of the reference.
    """
    decoding = _decoding[0]
    parsed = DecodeConfig.model_validate(config)
    scorers = decoding.scorers(parsed)
    configs = [decoding.limited(parsed, utt) if forced else parsed for utt in utts]
    if not encode:
        for utt in utts:
            decoding.encoded(utt)
    found = []
    start = decoding.clock()
    for utt, one in zip(utts, configs, strict=True):
        encoded = decoding.encode(utt) if encode else decoding.encoded(utt)
        found.append(decode_encoded(decoding.model, *encoded, one, scorers))
    seconds = decoding.clock() - start
    return {"seconds": seconds, "tokens": [nbest[0].tokens if nbest else [] for ((nbest),) in found]}


def memory() -> dict[str, Any]:
    return {"mib": peak_mib()}


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        serve({"load": load, "search": search, "memory": memory})
