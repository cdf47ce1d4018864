"""The tables of the decoding benchmark that compare searches."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from pathlib import Path

from benchmarks.decode_bench import COMPARED, HOW, JOINT, SPREAD, Bench, compared, milliseconds, milliseconds_a_step
from benchmarks.decode_case import VOCAB, random_case
from benchmarks.decode_workers import OURS, Times, Worker, quartiles, ratios, take_turns

TOKENS_A_SECOND = 7.25  # characters of AN4


def measure_forced(bench: Bench) -> None:
    """Beam search of a length that is given."""
    searches = {
        "beam 10, CTC 0.3": (JOINT, {"small": "ours at most 2.0 (ESPnet2 was 15.0)", "AN4": "ours at most 8 (ESPnet2 was 41.5)"}),
        "beam 10, no CTC": ({"beam": 10, "ctc_weight": 0.0}, {"small": "(ESPnet2 was 10.4)"}),
        "beam 1, CTC 0.3": ({"beam": 1, "ctc_weight": 0.3}, {"small": "(ESPnet2 was 6.9)"}),
    }
    rows = []
    for shape in bench.shapes:
        case, path = bench.case(shape)
        utts = case.some(bench.utts)
        steps = sum(case.tokens[utt] + 1 for utt in utts)
        with ExitStack() as stack:
            workers = bench.workers(stack, path)
            for name, (config, goals) in searches.items():
                request = {"config": config, "encode": False, "forced": True}
                asked = {t: milliseconds(w, steps, utts=utts, **request) for t, w in workers.items()}
                everything = list(range(len(case.feats)))
                asked["batches"] = milliseconds_a_step(workers["ours"], utts=everything, batched=True, **request)
                times = take_turns(asked, rounds=bench.rounds)
                rows.append([shape, name, "one by one", *compared(times, goals.get(shape, "-"))])
                rows.append([shape, name, "batches", *compared(times, goals.get(shape, "-"), ours="batches")])
    bench.report.add(
        f"Search of a given length, ms for one step of one utterance (1 thread; {bench.utts} utterances, in batches all)",
        ["shape", "search", "how", *COMPARED],
        rows,
        "The search alone, on the encoder's output. Both toolkits have the same random weights, with a bias of -10,000 for the "
        "end of the sentence in the decoder's output layer, so that nothing ends before the limit, and the same limit: as many "
        f"steps as the reference has tokens, and one (in batches the utterances have that many together). {HOW} {SPREAD}",
    )


def measure_whole(bench: Bench) -> None:
    """From features to tokens, utterance by utterance."""
    rows = []
    for name in bench.names:
        case, path = bench.case(name)
        forced = name != "trained"
        utts = case.some(bench.utts) if forced else list(range(len(case.feats)))
        searches = {
            "beam 10, CTC 0.3": (JOINT, "8 times (ESPnet2 was 410, shape small)"),
            "CTC greedy": ({"method": "ctc_greedy"}, "2 times (ESPnet2 was 20.4, shape small)"),
        }
        with ExitStack() as stack:
            workers = bench.workers(stack, path)
            for search, (config, goal) in searches.items():
                request = {"config": config, "encode": True, "forced": forced}
                asked = {t: milliseconds(w, len(utts), utts=utts, **request) for t, w in workers.items()}
                together = {"utts": list(range(len(case.feats))), "batched": True, **request}
                asked["batches"] = milliseconds(workers["ours"], len(case.feats), **together)
                times = take_turns(asked, rounds=bench.rounds if forced else min(bench.rounds, 3))
                what = f"{name}, {search}" + (", given length" if forced and search != "CTC greedy" else "")
                agreed = ["-", "-"] if forced else _agreements(workers, utts, request)
                rows.append([what, "one by one", str(len(utts)), *compared(times, goal), agreed[0]])
                rows.append([what, "batches", str(len(case.feats)), *compared(times, goal, ours="batches"), agreed[1]])
    bench.report.add(
        "Whole utterances from features, ms an utterance (1 thread)",
        ["model, search", "how", "utterances", *COMPARED, "equal texts"],
        rows,
        "Encoder included. `trained` is the experiment that was named, its weights in ESPnet2's modules too, searched freely. "
        "The other models have random weights, which know no end, so the length is given as above, and no texts to compare. "
        f"{HOW} {SPREAD}",
    )


def _agreements(workers: dict[str, Worker], utts: list[int], request: dict[str, object]) -> list[str]:
    """How many utterances both toolkits give the same tokens, ours one by one and in batches; for a trained model."""
    if "ESPnet2" not in workers:
        return ["-", "-"]
    theirs = workers["ESPnet2"].ask("search", utts=utts, **request)["tokens"]
    found = [workers["ours"].ask("search", utts=utts, batched=batched, **request)["tokens"] for batched in (False, True)]
    return [f"{sum(a == b for a, b in zip(ours, theirs, strict=True))} of {len(utts)}" for ours in found]


def measure_fusion(bench: Bench) -> None:
    """What language models add to the search."""
    weights = {
        "none": {},
        "Transformer": {"lm_weight": 0.3},
        "3-gram": {"ngram_weight": 0.3},
        "both": {"lm_weight": 0.3, "ngram_weight": 0.3},
    }
    rows = []
    for name in bench.names:
        case, path = bench.case(name)
        forced = name != "trained"
        utts = case.some(bench.utts)
        with ExitStack() as stack:
            worker = bench.workers(stack, path, peer=False)["ours"]
            candidates = {
                lm: milliseconds(worker, len(utts), utts=utts, config=JOINT | extra, encode=True, forced=forced)
                for lm, extra in weights.items()
            }
            times = take_turns(candidates, rounds=bench.rounds)
        for lm in weights:
            over = quartiles(ratios(times[lm], times["none"])) if lm != "none" else "1"
            rows.append([name, lm, str(times[lm]), over, "at most 1.5" if lm == "both" else "-"])
    bench.report.add(
        "Language models fused, ms an utterance from features (beam 10, CTC 0.3, 1 thread)",
        ["model", "language models", "ms", "over none", "goal"],
        rows,
        "A Transformer of 2 layers, 64 wide, 4 heads, and a 3-gram"
        + (" (the user's)" if bench.trained is not None and bench.trained.lm is not None else ", of random weights and sentences")
        + f", each with weight 0.3. `trained` searches freely, and fused models change where it ends. {SPREAD}",
    )


def measure_methods(bench: Bench) -> None:
    """Every way from features to text."""
    methods: dict[str, dict[str, object]] = {
        "ctc_greedy": {"method": "ctc_greedy"},
        "ctc_beam, beam 10": {"method": "ctc_beam", "beam": 10},
        "ctc_beam, beam 10, 3-gram 0.3": {"method": "ctc_beam", "beam": 10, "ngram_weight": 0.3},
        "attention_rescoring, 10 best": {"method": "attention_rescoring", "beam": 10, "ctc_weight": 0.3},
        "beam 1, CTC 0.3": {"beam": 1, "ctc_weight": 0.3},
        "beam 10, CTC 0.3": JOINT,
        "beam 10, CTC alone": {"beam": 10, "ctc_weight": 1.0},
        "beam 10, attention alone": {"beam": 10, "ctc_weight": 0.0},
    }
    name = bench.names[-1]
    case, path = bench.case(name)
    utts = case.some(bench.utts)
    with ExitStack() as stack:
        worker = bench.workers(stack, path, peer=False)["ours"]
        forced = {m: name != "trained" and c.get("method", "beam") == "beam" for m, c in methods.items()}
        candidates = {
            m: milliseconds(worker, len(utts), utts=utts, config=c, encode=True, forced=forced[m]) for m, c in methods.items()
        }
        times = take_turns(candidates, rounds=bench.rounds)
    rows = [[method, str(times[method]), quartiles(ratios(times[method], times["ctc_greedy"]))] for method in methods]
    bench.report.add(
        f"Ways out, ms an utterance from features ({name}, 1 thread, {len(utts)} utterances one by one)",
        ["method", "ms", "over ctc_greedy"],
        rows,
        f"The encoder is in all of them. {SPREAD}",
    )


def measure_cores(bench: Bench) -> None:
    """One thread, two threads, two processes."""
    rows = []
    for name in bench.names:
        case, path = bench.case(name)
        utts = list(range(len(case.feats))) if name == "trained" else case.some(2 * bench.utts)
        request = {"config": JOINT, "encode": True, "forced": name != "trained"}
        with ExitStack() as stack:
            first, second = (stack.enter_context(Worker(module=OURS, case=path)) for _ in range(2))
            wide = stack.enter_context(Worker(module=OURS, case=path, threads=2))

            def together(*workers: Worker, utts: list[int] = utts, request: dict[str, object] = request) -> float:
                start = time.perf_counter()
                for i, worker in enumerate(workers):
                    worker.send("search", utts=utts[i :: len(workers)], **request)
                for worker in workers:
                    worker.receive()
                return 1000 * (time.perf_counter() - start) / len(utts)

            candidates = {
                "1 process, 1 thread": lambda together=together, first=first: together(first),
                "1 process, 2 threads": lambda together=together, wide=wide: together(wide),
                "2 processes": lambda together=together, pair=(first, second): together(*pair),
            }
            times = take_turns(candidates, rounds=bench.rounds)
        base = times["1 process, 1 thread"]
        rows += [[name, how, str(times[how]), quartiles(ratios(base, times[how]))] for how in times]
    bench.report.add(
        "The second core, ms of wall time an utterance from features (beam 10, CTC 0.3)",
        ["model", "how", "ms", "times faster than one"],
        rows,
        "Each process takes every other utterance, as `speechtx decode --num-jobs 2` does. Wall time: means something on an idle "
        f"machine only. {SPREAD}",
    )


def measure_growth(bench: Bench) -> None:
    """Cost against the beam, and against the audio's length."""
    shape = bench.shapes[0]
    lengths = [(272, 20), *((100 * s, max(1, round(TOKENS_A_SECOND * s))) for s in bench.seconds)]
    path = bench.save(f"{shape}-growth", random_case(shape, lengths))
    rounds = min(bench.rounds, 3)
    with ExitStack() as stack:
        workers = bench.workers(stack, path)
        beams: dict[str, dict[int, Times]] = {toolkit: {} for toolkit in workers}
        audio: dict[str, dict[int, Times]] = {toolkit: {} for toolkit in workers}
        jobs = [(beams, beam, 0, beam) for beam in bench.beams] + [(audio, s, 1 + i, 10) for i, s in enumerate(bench.seconds)]
        for table, at, utt, beam in jobs:
            request = {"utts": [utt], "config": {"beam": beam, "ctc_weight": 0.3}, "encode": table is audio, "forced": True}
            # Of long audio the peer would take minutes, and a beam larger than the vocabulary ends it with an error.
            feasible = at < VOCAB if table is beams else at <= 30
            asked = {t: w for t, w in workers.items() if t == "ours" or feasible}
            for toolkit, taken in take_turns({t: milliseconds(w, 1, **request) for t, w in asked.items()}, rounds=rounds).items():
                table[toolkit][at] = taken
    for table, title, unit in (
        (beams, f"Cost of the beam: ms for the search of one utterance of 2.7 s, 21 steps ({shape}, 1 thread)", "beam"),
        (
            audio,
            f"Cost of long audio: ms for one utterance from features, {TOKENS_A_SECOND} tokens a second, beam 10 ({shape})",
            "seconds",
        ),
    ):
        _add_growth(bench, table, title, unit)


def _add_growth(bench: Bench, table: dict[str, dict[int, Times]], title: str, unit: str) -> None:
    """A table of one kind of growth, and its curves."""
    ours = table["ours"]
    rows, before = [], None
    for at, times in ours.items():
        local = "-" if before is None else f"{math.log(times.median / ours[before].median) / math.log(at / before):.2f}"
        peer = table.get("ESPnet2", {}).get(at)
        rows.append([str(at), str(times), f"{times.median / at:.3g}", local, "not measured" if peer is None else str(peer)])
        before = at
    for toolkit, curve in table.items():
        points = [(at, times.median) for at, times in curve.items()]
        (bench.report.curves if unit == "beam" else bench.report.memory)[toolkit] = points
    fits = "; ".join(f"{toolkit} {exponent(curve):.2f}" for toolkit, curve in table.items() if len(curve) > 1)
    bench.report.add(
        title,
        [unit, "ours, ms", f"per {unit.rstrip('s')}", "exponent from the row above", "ESPnet2, ms"],
        rows,
        f"Fitted exponent of cost ~ {unit}^e over all rows: {fits}. 1 is linear. "
        + ("ESPnet2's search ends with an error where the beam exceeds the vocabulary. " if unit == "beam" else "")
        + SPREAD,
    )


def exponent(curve: dict[int, Times]) -> float:
    """The slope of a straight line through the logarithms (least squares)."""
    points = [(math.log(at), math.log(times.median)) for at, times in curve.items()]
    x0, y0 = (sum(values) / len(points) for values in zip(*points, strict=True))
    return sum((x - x0) * (y - y0) for x, y in points) / sum((x - x0) ** 2 for x, _ in points)


def measure_memory(bench: Bench) -> None:
    """Peak memory of a process that did nothing but load and search."""
    shape = bench.shapes[-1]
    longest = max(bench.seconds)
    seconds = (3, min(30, longest), longest)
    path = bench.save(f"{shape}-memory", random_case(shape, [(100 * s, round(TOKENS_A_SECOND * s)) for s in seconds]))
    rows = []
    for utt, length in enumerate(seconds):
        cells = [str(length)]
        for beam in (1, 10):
            cells += _peaks(bench, path, utt=utt, beam=beam, with_peer=length <= 30)
        rows.append(cells)
    heads = [f"{what}, beam {beam}" for beam in (1, 10) for what in ("ours", "ESPnet2")]
    bench.report.add(
        f"Peak memory of the whole process, MiB, after one utterance from features ({shape})",
        ["seconds", *heads],
        rows,
        "Resident memory with PyTorch and the toolkit loaded, each number from a new process.",
    )


def _peaks(bench: Bench, path: Path, *, utt: int, beam: int, with_peer: bool) -> list[str]:
    with ExitStack() as stack:
        workers = bench.workers(stack, path, peer=with_peer)
        for worker in workers.values():
            worker.ask("search", utts=[utt], config={"beam": beam, "ctc_weight": 0.3}, encode=True, forced=True)
        found = {toolkit: f"{worker.ask('memory')['mib']:.0f}" for toolkit, worker in workers.items()}
    return [found["ours"], found.get("ESPnet2", "not measured")]
