#!/usr/bin/env python3
"""How fast training is: this toolkit and ESPnet2 in turns on the same batches, front ends, and processes against threads.

Every toolkit does its steps in a process of its own, one after the other, batch by batch (A B A B ...); all others wait
meanwhile. A ratio is the median of the ratios batch by batch, so a machine that becomes slower half-way does not change it. The
rate of a plain matrix product is measured in every round too, and what a step does is stated as a share of it.

Example:
    python -m benchmarks.train --threads 2 1 --espnet-python ~/espnet/bin/python --out benchmarks
"""

from __future__ import annotations

import argparse
import importlib.util
import socket
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.side_by_side import Report, alternate, machine, ratio
from benchmarks.train_teams import teams
from benchmarks.train_worker import MEL_BINS, Lengths, Shape, Spec
from speechtx.config.atomic import write_text
from speechtx.config.schema import SubsamplingConfig
from speechtx.data.kaldi_table import read_table
from speechtx.model.subsampling import make_subsampling

SHAPES = {"AN4": Shape(), "small": Shape(dim=144, ff_dim=576, encoder_layers=6, decoder_layers=3, channels=144)}
CONFORMER = Shape(dim=512, heads=8, type="conformer", channels=512)
RECIPE = Shape(dim=144, ff_dim=576, encoder_layers=6, decoder_layers=1, vocab=100, type="conformer", channels=32)  # egs/an4's
TINY = Shape(dim=16, ff_dim=32, encoder_layers=1, decoder_layers=1, channels=16)
# Frames of AN4's 848 training utterances at every tenth of their order, and characters of text in a frame.
AN4_FRAMES = (68, 108, 168, 198, 228, 248, 288, 318, 368, 428, 628)
AN4_TOKENS_PER_FRAME = 0.072


@dataclass(frozen=True)
class Plan:
    """What to measure: `sizes` are (shape, batch size, batches of it)."""

    sizes: tuple[tuple[str, int, int], ...] = (
        ("AN4", 16, 4),
        ("AN4", 64, 2),
        ("small", 8, 8),
        ("small", 16, 4),
        ("small", 64, 2),
    )
    rounds: int = 3
    threads: tuple[int, ...] = (2, 1)
    frames: int = 400
    product: int = 2048  # size of the square matrices whose product is the peak
    espnet: str | None = None
    data: Path | None = None
    shapes: dict[str, Shape] | None = None


def an4_batches(size: int, count: int, data: Path | None = None, vocab: int = 30) -> list[Lengths]:
    """`count` batches of `size` utterances, neighbours by length, evenly spread from the shortest to the longest."""
    if data is not None:
        transcripts = read_table(data / "text")
        rows = sorted((int(frames), len(transcripts[key])) for key, frames in read_table(data / "utt2num_frames").items())
    else:
        frames = np.interp(np.linspace(0, 1, 848), np.linspace(0, 1, len(AN4_FRAMES)), AN4_FRAMES).round().astype(int)
        rows = [(int(n), max(1, round(n * AN4_TOKENS_PER_FRAME))) for n in frames]
    starts = np.linspace(0, len(rows) - size, count + 2)[1:-1].astype(int)
    return [([n for n, _ in rows[s : s + size]], [min(t, n // 9) for n, t in rows[s : s + size]]) for s in starts]


def matrix_product(size: int, threads: int) -> float:
    """FLOP/s of one product of square float32 matrices, in this process while the others wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    a, b = torch.randn(size, size), torch.randn(size, size)
    a @ b
    seconds = []
    for _ in range(3):
        start = _clock(threads)
        a @ b
        seconds.append(_clock(threads) - start)
    torch.set_num_threads(before)
    return 2 * size**3 / min(seconds)


def _clock(threads: int) -> float:
    """Processor time on one thread, which other people's programs do not change; else the clock on the wall."""
    return time.process_time() if threads == 1 else time.perf_counter()


@dataclass
class Measured:
    """Of one candidate: an entry a step."""

    parameters: int
    steps: list[dict[str, float]]
    flops: list[float]
    frames: list[int]

    def seconds(self, kind: str) -> list[float]:
        return [step[kind] for step in self.steps]


def measure_in_turns(specs: dict[str, list[Spec]], plan: Plan, kind: str) -> tuple[dict[str, Measured], float]:
    """Steps of all candidates in turns; also the FLOP/s of a matrix product in the same rounds."""
    threads = next(iter(specs.values()))[0].threads
    with teams(specs, plan.espnet) as running:
        found = {name: Measured(team.ready(), [], [], []) for name, team in running.items()}
        batches = next(iter(specs.values()))[0].batches
        for name, team in running.items():  # one round that does not count, but counts the operations
            count = specs[name][0].toolkit == "speechtx" and len(specs[name]) == 1
            for number in range(len(batches)):
                answer = team.step(number, "flops" if count else "step")
                if count:
                    found[name].flops.append(answer["flops"])
        peaks = []
        for _ in range(plan.rounds):
            peaks.append(matrix_product(plan.product, threads))
            for number in range(len(batches)):
                for name, team in running.items():
                    found[name].steps.append(team.step(number))
                    found[name].frames.append(sum(sum(spec.batches[number][0]) for spec in specs[name]))
    for name in found:
        found[name].flops *= plan.rounds
    return found, statistics.median(peaks)


def describe(name: str, found: Measured, base: Measured | None, flops: Sequence[float], peak: float, kind: str) -> list[str]:
    """A row of a table of steps; `flops` of every step, `base` what the ratio is to."""
    seconds = found.seconds(kind)
    wall = sum(found.seconds("wall"))
    split = " / ".join(
        f"{100 * sum(found.seconds(part)) / wall:.0f}" for part in ("forward", "backward", "gradients", "optimizer")
    )
    rates = [frames / second for frames, second in zip(found.frames, seconds, strict=True)]
    against = "-"
    if base is not None:
        pairs = zip(rates, (f / s for f, s in zip(base.frames, base.seconds(kind), strict=True)), strict=True)
        against = f"{statistics.median(ours / theirs for ours, theirs in pairs):.2f}"
    share = f"{100 * sum(flops) / sum(seconds) / peak:.0f} %" if flops else "-"
    rate = sum(found.frames) / sum(seconds)
    return [
        name,
        f"{found.parameters:,}",
        f"{rate:,.0f}",
        against,
        split,
        f"{1000 * statistics.median(seconds):,.0f}",
        f"{max(step['peak'] for step in found.steps):,.0f}",
        share,
    ]


COLUMNS = [
    "",
    "parameters",
    "frames/s",
    "over ESPnet2",
    "forward / backward / sum / optimiser, %",
    "ms a step",
    "peak MiB",
    "of the matrix product",
]


def measure_steps(report: Report, plan: Plan) -> None:
    """Whole steps of each shape at each batch size, ours, ESPnet2's and ours with a cheap front end."""
    for threads in plan.threads:
        for label, size, count in plan.sizes:
            shape = (plan.shapes or SHAPES)[label]
            batches = an4_batches(size, count, plan.data)
            specs = {"speechtx": [Spec("speechtx", shape, batches, threads)]}
            if plan.espnet:
                specs["ESPnet2"] = [Spec("espnet", shape, batches, threads)]
            specs["speechtx, conv1d"] = [Spec("speechtx", replace(shape, front_end="conv1d"), batches, threads)]
            kind = "processor" if threads == 1 else "wall"
            found, peak = measure_in_turns(specs, plan, kind)
            base = found.get("ESPnet2")
            rows = []
            for name, entry in found.items():
                flops = entry.flops or found["speechtx"].flops  # ESPnet2's model of this shape does the same products
                rows.append(describe(name, entry, None if name == "ESPnet2" else base, flops, peak, kind))
            if base is None:
                rows.append(["ESPnet2", *["not measured"] * (len(COLUMNS) - 1)])
            report.add(
                f"Training step, shape {label}, batches of {size}, {threads} thread{'s' * (threads > 1)}, float32",
                COLUMNS,
                rows,
                f"Matrix product of {plan.product} x {plan.product} in the same rounds: {peak / 1e9:.0f} GFLOP/s. "
                f"{_about(found['speechtx'], len(batches), plan.rounds)}",
            )


def measure_recipe(report: Report, plan: Plan) -> None:
    """Steps of the Conformer that egs/an4 trains, of as many utterances as its batches hold."""
    shape, size, count = (replace(TINY, type="conformer"), 2, 1) if plan.shapes else (RECIPE, 7, 8)
    batches = an4_batches(size, count, plan.data)
    rows, note = [], ""
    for threads in plan.threads:
        kind = "processor" if threads == 1 else "wall"
        found, peak = measure_in_turns({"speechtx": [Spec("speechtx", shape, batches, threads)]}, plan, kind)
        entry = found["speechtx"]
        row = describe(f"{threads} thread{'s' * (threads > 1)}", entry, None, entry.flops, peak, kind)
        rows.append([cell for column, cell in zip(COLUMNS, row, strict=True) if column != "over ESPnet2"])
        note = f"{_about(entry, len(batches), plan.rounds)} Matrix product: {peak / 1e9:.0f} GFLOP/s."
    columns = [column for column in COLUMNS if column != "over ESPnet2"]
    report.add(f"Training step of egs/an4's Conformer, batches of {size}, float32", columns, rows, note)


def _about(found: Measured, batches: int, rounds: int) -> str:
    mean = sum(found.flops) / len(found.flops) / 1e9
    return f"A step has {mean:.1f} GFLOP on average ({batches} batches, {rounds} rounds)."


def measure_processes(report: Report, plan: Plan) -> None:
    """Two processes of one thread, each with a batch of its own, against one process of two threads."""
    rows = []
    for label, size, count in plan.sizes:
        if size == 64:
            continue
        shape = (plan.shapes or SHAPES)[label]
        batches = an4_batches(size, 2 * count, plan.data)
        port = _free_port()
        pair = [Spec("speechtx", shape, batches[rank::2], 1, rank=rank, size=2, port=port) for rank in (0, 1)]
        specs = {"1 x 2": [Spec("speechtx", shape, batches[::2], 2)], "2 x 1": pair}
        found, _ = measure_in_turns(specs, plan, "wall")
        rates = {name: [f / s for f, s in zip(m.frames, m.seconds("wall"), strict=True)] for name, m in found.items()}
        gain = statistics.median(b / a for a, b in zip(rates["1 x 2"], rates["2 x 1"], strict=True))
        shown = [f"{sum(m.frames) / sum(m.seconds('wall')):,.0f}" for m in found.values()]
        waiting = sum(found["2 x 1"].seconds("gradients")) / sum(found["2 x 1"].seconds("wall"))
        rows.append([label, str(size), *shown, f"{gain:.2f}", f"{100 * waiting:.0f} %"])
    report.add(
        "Two processes of one thread against one process of two threads",
        ["shape", "batch of a process", "1 process x 2 threads, frames/s", "2 x 1, frames/s", "gain", "summing gradients"],
        rows,
        "Wall time; a step of two processes has a batch in each, that of one process one batch. On an idle machine only: two "
        "threads that wait for each other lose far more to other programs than two processes do.",
    )


def measure_front_ends(report: Report, plan: Plan) -> None:
    """Forward and backward of each front end alone, on one thread."""
    batch, rows = 16 if plan.frames >= 400 else 2, []
    feats = torch.randn(batch, plan.frames, MEL_BINS)
    torch.set_num_threads(1)
    for dim in (144, 256) if plan.frames >= 400 else (16,):
        models = {}
        for kind in ("conv2d", "separable", "conv1d"):
            for factor in (4, 6, 8):
                for channels in (32, dim) if kind == "conv2d" else (dim,):
                    config = SubsamplingConfig.model_validate({"type": kind, "factor": factor, "channels": channels})
                    models[f"{kind}, {channels} channels, factor {factor}"] = make_subsampling(
                        config, num_mel_bins=MEL_BINS, dim=dim
                    )
        runs = {name: lambda model=model: model(feats).sum().backward() for name, model in models.items()}
        times = alternate(runs, repeats=plan.rounds)
        base = f"conv2d, {dim} channels, factor 4"
        for name in times:
            parameters = sum(p.numel() for p in models[name].parameters())
            middle = statistics.median(times[name])
            rows.append([str(dim), name, f"{parameters:,}", f"{middle:.1f}", f"{ratio(times, name, base):.3f}"])
    report.add(
        f"Front ends alone, forward + backward, ms ({batch} x {plan.frames} frames, one thread, processor time)",
        ["D", "front end", "parameters", "ms", "over conv2d with D channels, factor 4"],
        rows,
        "What a factor of 6 or 8 saves in the layers behind the front end is not in this table.",
    )


def measure_gpu(report: Report, plan: Plan) -> None:
    """Both precisions on a GPU: the AN4 shape, and a Conformer on long utterances."""
    rows = []
    for label, shape, batches in (
        ("AN4, batch 64", SHAPES["AN4"], an4_batches(64, 2, plan.data)),
        ("Conformer 12+6, D 512, 16 x 1500 frames", CONFORMER, [([1500] * 16, [100] * 16)]),
    ):
        for dtype in ("float32", "bfloat16"):
            cells = ["not measured"] * (len(COLUMNS) - 2)
            if torch.cuda.is_available():
                spec = Spec("speechtx", shape, batches, 1, device="cuda", dtype=dtype)
                found, _ = measure_in_turns({"speechtx": [spec]}, replace(plan, rounds=10), "wall")
                peak = gpu_product(dtype)
                cells = describe("", found["speechtx"], None, found["speechtx"].flops, peak, "wall")[1:]
                del cells[2]
            rows.append([label, dtype, *cells])
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    columns = [COLUMNS[0], "precision", *(column for column in COLUMNS[1:] if column != "over ESPnet2")]
    report.add(f"On a GPU ({name})", columns, rows)


def gpu_product(dtype: str, size: int = 8192) -> float:
    """FLOP/s of a product of square matrices on the GPU."""
    a, b = (torch.randn(size, size, device="cuda", dtype=getattr(torch, dtype)) for _ in range(2))
    times = alternate({"product": lambda: a @ b}, repeats=10, device="cuda")["product"]
    return 2 * size**3 / (min(times) / 1000)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


MEASURE = {
    "steps": measure_steps,
    "recipe": measure_recipe,
    "front_ends": measure_front_ends,
    "processes": measure_processes,
    "gpu": measure_gpu,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, measures nothing")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write train.md there")
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--rounds", type=int, default=Plan.rounds)
    parser.add_argument("--sizes", nargs="+", metavar="SHAPE:BATCH", help="only these, for example AN4:16 small:8")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="take lengths from this data directory instead of AN4's quantiles"
    )
    parser.add_argument("--espnet-python", metavar="FILE", help="a Python that has ESPnet (default: this one, if it has)")
    parser.add_argument("--parts", nargs="+", choices=MEASURE, default=list(MEASURE))
    options = parser.parse_args(arguments)
    here = sys.executable if importlib.util.find_spec("espnet2") else None
    plan = Plan(rounds=options.rounds, threads=tuple(options.threads), espnet=options.espnet_python or here, data=options.data)
    if options.sizes:
        wanted = {tuple(size.split(":")) for size in options.sizes}
        plan = replace(plan, sizes=tuple(entry for entry in plan.sizes if (entry[0], str(entry[1])) in wanted))
    if options.quick:
        plan = Plan((("tiny", 2, 1),), rounds=1, threads=(1,), frames=40, product=64, shapes={"tiny": TINY})
    words = " ".join(sys.argv[1:] if arguments is None else arguments)
    report = Report(
        header=[f"`python -m benchmarks.train {words}`".replace(" `", "`"), machine(max(plan.threads))],
        title="How fast training is",
    )
    print("\n".join(report.header) + "\n", flush=True)
    for part in MEASURE:
        if part in options.parts:
            MEASURE[part](report, plan)
            if options.out:  # after every part: a long run that is cut off leaves what it found
                options.out.mkdir(parents=True, exist_ok=True)
                write_text(options.out / "train.md", report.text())


if __name__ == "__main__":
    main()
