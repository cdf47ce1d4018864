"""The table of the decoding benchmark that says what longer audio costs a trained model, and what a window makes of that."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import replace

import torch

from benchmarks.decode_bench import JOINT, SPREAD, Bench, milliseconds
from benchmarks.decode_case import Case
from benchmarks.decode_tables import exponent
from benchmarks.decode_workers import Times, take_turns
from speechtx.config.schema import ModelConfig

SEARCHES: dict[str, dict[str, object]] = {
    "encoder, CTC greedy": {"method": "ctc_greedy"},
    "beam 10, CTC alone": JOINT | {"ctc_weight": 1.0},
    "beam 10, CTC 0.3": JOINT,
}
WINDOW = 100  # encoder frames to each side, four seconds
WINDOWED = f"encoder with window {WINDOW}, CTC greedy"


def measure_length(bench: Bench) -> None:
    """Utterances joined to audio of growing length; the lengths are searched freely if the model is trained."""
    name = bench.names[-1]
    joined = _joined(bench.case(name)[0], bench.seconds)
    table: dict[str, dict[int, Times]] = {search: {} for search in (*SEARCHES, WINDOWED)}
    tokens: list[int] = []
    with ExitStack() as stack:
        worker = bench.workers(stack, bench.save(f"{name}-length", joined), peer=False)["ours"]
        windowed = bench.workers(stack, bench.save(f"{name}-window", _windowed(joined)), peer=False)["ours"]
        for utt, seconds in enumerate(bench.seconds):
            requests = {
                search: {"utts": [utt], "config": config, "encode": True, "forced": name != "trained" and "beam" in config}
                for search, config in SEARCHES.items()
            }
            turns = {search: milliseconds(worker, 1, **request) for search, request in requests.items()}
            turns[WINDOWED] = milliseconds(windowed, 1, **requests["encoder, CTC greedy"])
            times = take_turns(turns, rounds=bench.rounds)
            for search, taken in times.items():
                table[search][seconds] = taken
            tokens.append(len(worker.ask("search", **requests["beam 10, CTC 0.3"])["tokens"][0]))
    rows = [
        [str(s), str(joined.tokens[i]), str(tokens[i]), *(cell for curve in table.values() for cell in _cells(curve, i))]
        for i, s in enumerate(bench.seconds)
    ]
    fits = "; ".join(f"{search}: {exponent(curve):.2f}" for search, curve in table.items())
    bench.report.add(
        f"Cost of long audio, utterances joined: ms from features ({name}, 1 thread)",
        ["seconds", "tokens", "found", *(head for search in table for head in (f"{search}, ms", "exponent"))],
        rows,
        f"Fitted exponents of cost ~ seconds^e over all rows: {fits}. 1 is linear; the columns say it from the row above. "
        "What the beam adds to the encoder is linear where its text agrees with CTC; the encoder's self-attention is not, unless "
        "its penalty is cut off by a window. A "
        "model that was trained on short utterances skips words in long audio (`found`: tokens of the last search), and a text "
        f"that disagrees with CTC takes wider windows. {SPREAD}",
    )


def _windowed(case: Case) -> Case:
    """The case with a penalty of its encoder's self-attention that is cut off."""
    config = ModelConfig.model_validate_json(case.config)
    penalty = config.attention_penalty
    cut = penalty.encoder_self.model_copy(update={"window": WINDOW})
    if cut.shape == "none":
        cut = cut.model_copy(update={"shape": "window"})
    config = config.model_copy(update={"attention_penalty": penalty.model_copy(update={"encoder_self": cut})})
    return replace(case, config=config.model_dump_json())


def _cells(curve: dict[int, Times], row: int) -> list[str]:
    """Time and exponent of a row."""
    (at, times), before = list(curve.items())[row], list(curve.items())[row - 1]
    local = math.log(times.median / before[1].median) / math.log(at / before[0]) if row else None
    return [str(times), "-" if local is None else f"{local:.2f}"]


def _joined(case: Case, seconds: tuple[int, ...]) -> Case:
    """The case's utterances one after another, again from the first if they do not suffice, cut to each of these lengths."""
    feats, tokens = [], []
    for wanted in (100 * s for s in seconds):
        frames = num = utt = 0
        taken = []
        while frames < wanted:
            taken.append(case.feats[utt % len(case.feats)][: wanted - frames])
            num += round(case.tokens[utt % len(case.tokens)] * len(taken[-1]) / len(case.feats[utt % len(case.feats)]))
            frames, utt = frames + len(taken[-1]), utt + 1
        feats.append(torch.cat(taken))
        tokens.append(num)
    return replace(case, feats=feats, tokens=tokens, encoder_bias=None)
