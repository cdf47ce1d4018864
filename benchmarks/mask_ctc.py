"""What each search costs beyond the encoder: processor seconds per second of audio on one thread, and decoder passes.

Utterances are searched one at a time and in batches of `frames_per_batch`; the least of three runs counts. Processor time, not
time on the clock, so that other programs on the machine matter little. Give the same data to a model with an ordinary decoder and
to one of type mask_ctc (docs/decoding.md).

example: OMP_NUM_THREADS=1 python benchmarks/mask_ctc.py egs/mini/asr1/exp/train egs/mini/asr1/data/test
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speechtx.config.decode import DecodeConfig
from speechtx.data.batching import make_batches
from speechtx.data.loader import Corpus, FeatureReader
from speechtx.data.manifest import load_manifest
from speechtx.experiment.experiment import Experiment
from speechtx.model.decoder import Decoder
from speechtx.search.decode import decode_encoded

RUNS = 3
GREEDY = {"ctc_greedy": DecodeConfig(method="ctc_greedy")}
ORDINARY = {"attention, beam 1": DecodeConfig(beam=1, ctc_weight=0.0), "joint, beam 10": DecodeConfig(beam=10, ctc_weight=0.5)}
FILLING = {f"mask_ctc, {k}": DecodeConfig(method="mask_ctc", mask_iterations=k) for k in (1, 5, 10)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exp", type=Path)
    parser.add_argument("data", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    exp = Experiment.open(args.exp)
    model = exp.load_model()
    rows = load_manifest(args.data, text=False)
    reader = FeatureReader(
        config=exp.config.features, num_mel_bins=exp.fbank.num_mel_bins, global_cmvn=exp.global_cmvn, data_dir=args.data
    )
    corpus = Corpus(utterances=rows, tokens=[[] for _ in rows], reader=reader)
    lengths = [row.num_frames for row in rows]
    audio = sum(lengths) * exp.fbank.frame_shift_ms / 1000
    searches = GREEDY if model.decoder is None else GREEDY | (ORDINARY if model.decoder.causal else FILLING)
    passes = count_passes()
    print(f"{'search':<20}{'utterances':<14}{'encoder':>9}{'search':>9}{'decoder passes':>16}")
    for name, indices in (
        ("one at a time", [[i] for i in range(len(rows))]),
        ("in batches", make_batches(lengths, frames_per_batch=DecodeConfig().frames_per_batch, max_utts=64)),
    ):
        batches = list(corpus.batches(indices))
        with torch.inference_mode():
            encoded, encoding = timed(model.encode, [(batch.feats, batch.feat_lens) for batch in batches])
        for search, config in searches.items():
            passes[0] = 0
            _, seconds = timed(decode_encoded, [(model, *outputs, config) for outputs in encoded])
            mean = passes[0] / RUNS / len(indices)
            print(f"{search:<20}{name:<14}{encoding / audio:>9.5f}{seconds / audio:>9.5f}{mean:>16.2f}")


def timed(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> tuple[list[Any], float]:
    """What a function returns for each of its arguments, and the least processor time of a run through all of them."""
    best = float("inf")
    for _ in range(RUNS):
        start = time.process_time()
        results = [function(*arguments) for arguments in calls]
        best = min(best, time.process_time() - start)
    return results, best


def count_passes() -> list[int]:
    """A counter that every pass of any decoder raises."""
    passes = [0]

    def counted(method: Callable[..., object]) -> Callable[..., object]:
        def wrapper(self: Decoder, tokens: Tensor, *args: object) -> object:
            passes[0] += 1
            return method(self, tokens, *args)

        return wrapper

    Decoder.step = counted(Decoder.step)  # type: ignore[method-assign, assignment]
    Decoder.score = counted(Decoder.score)  # type: ignore[method-assign, assignment]
    return passes


if __name__ == "__main__":
    main()
