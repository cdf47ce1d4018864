#!/usr/bin/env python3
"""How fast decoding is, alone and beside ESPnet2.

Every toolkit decodes in a process of its own, and they take turns (A B A B ...). A ratio is the median over rounds of the ratio
within a round, so a machine that becomes slower half-way does not change it. Times are processor time of one thread, unless a
table says otherwise.

Examples:
    python -m benchmarks.decode --exp EXP --data DATA --espnet-python ESPNET/bin/python --out benchmarks
    python -m benchmarks.decode --quick
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.an4_lengths import AN4_TEST
from benchmarks.decode_bench import Bench
from benchmarks.decode_case import trained_case
from benchmarks.decode_length import measure_length
from benchmarks.decode_start import measure_start
from benchmarks.decode_tables import (
    measure_cores,
    measure_forced,
    measure_fusion,
    measure_growth,
    measure_memory,
    measure_methods,
    measure_whole,
)
from benchmarks.side_by_side import Report, machine
from speechtx.config.atomic import replacing, write_text
from speechtx.experiment.experiment import Experiment

MEASURE: dict[str, Callable[[Bench], None]] = {
    "forced": measure_forced,
    "whole": measure_whole,
    "fusion": measure_fusion,
    "methods": measure_methods,
    "start": measure_start,
    "cores": measure_cores,
    "growth": measure_growth,
    "length": measure_length,
    "memory": measure_memory,
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exp", type=Path, help="a trained experiment, searched freely; needs --data")
    parser.add_argument("--data", type=Path, help="its test set, with features and text")
    parser.add_argument("--lm", metavar="DIR", help="its Transformer language model (default: one of random weights)")
    parser.add_argument("--ngram", metavar="PATH", help="its n-gram, an ARPA file or directory (default: of made-up sentences)")
    here = sys.executable if importlib.util.find_spec("espnet2") else None
    parser.add_argument("--espnet-python", metavar="PYTHON", default=here, help="an interpreter that has espnet (default: this)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write decode.md and decode.png there")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--utts", type=int, default=13, help="utterances a round, where not all are decoded (default: 13)")
    parser.add_argument("--parts", nargs="+", choices=MEASURE, default=list(MEASURE))
    parser.add_argument("--note", metavar="TEXT", help="one more line for the head of the results")
    parser.add_argument("--quick", action="store_true", help="a tiny model: shows that it runs, measures nothing")
    options = parser.parse_args(arguments)
    if (options.exp is None) != (options.data is None):
        parser.error("--exp and --data go together")
    return options


def make_bench(options: argparse.Namespace, report: Report, folder: Path) -> Bench:
    trained = None
    if options.exp is not None:
        trained, _ = trained_case(Experiment.open(options.exp), options.data)
        trained.lm, trained.ngram = options.lm, options.ngram
    quick = options.quick
    return Bench(
        report=report,
        folder=folder,
        rounds=2 if quick else options.rounds,
        utts=2 if quick else options.utts,
        shapes=("tiny",) if quick else ("small", "AN4"),
        lengths=[(30, 2), (60, 4), (45, 3), (90, 5)] if quick else list(AN4_TEST),
        exp=options.exp,
        data=options.data,
        trained=trained,
        espnet=options.espnet_python,
        beams=(1, 2) if quick else (1, 2, 4, 10, 20, 40),
        seconds=(1, 2) if quick else (2, 5, 10, 20, 40, 60),
    )


def draw_growth(report: Report, path: Path) -> None:
    """Cost against beam and against audio, both axes logarithmic, with a straight line of slope 1 to compare with."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    figure, axes = pyplot.subplots(1, 2, figsize=(10.4, 4.2))
    panels = ((report.curves, "beam", "search of 21 steps"), (report.memory, "seconds of audio", "features to text, beam 10"))
    for axis, (curves, label, title) in zip(axes, panels, strict=True):
        for name, points in curves.items():
            axis.plot(*zip(*points, strict=True), marker="o", label=name)
        ours = curves["ours"]
        linear = [(x, ours[-1][1] * x / ours[-1][0]) for x, _ in ours]
        axis.plot(*zip(*linear, strict=True), color="grey", linestyle=":", label="proportional")
        axis.set(xscale="log", yscale="log", xlabel=label, ylabel="ms an utterance, 1 thread")
        axis.set_title(title, fontsize=10)
        axis.set_xticks([x for x, _ in ours])
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    with replacing(path, "wb") as stream:
        figure.savefig(stream, dpi=120, format="png")
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    words = shlex.join(sys.argv[1:] if arguments is None else arguments)
    report = Report(
        header=[f"`python -m benchmarks.decode {words}`".replace(" `", "`"), machine(1)],
        title="How fast decoding is",
    )
    report.header.append(f"Date: {datetime.datetime.now(tz=datetime.UTC):%Y-%m-%d %H:%M} UTC.")
    if options.note:
        report.header.append(options.note)
    print("\n".join(report.header) + "\n", flush=True)
    with tempfile.TemporaryDirectory(prefix="speechtx-decode-") as folder:
        bench = make_bench(options, report, Path(folder))
        head = list(report.header)
        for part in MEASURE:
            if part not in options.parts:
                continue
            MEASURE[part](bench)
            versions = "; ".join(f"{toolkit}: {version}" for toolkit, version in bench.versions.items())
            report.header[:] = [*head, f"Toolkits: {versions or 'none loaded yet'}."]
            if options.out:  # after every part: a long run that is cut off leaves what it found
                options.out.mkdir(parents=True, exist_ok=True)
                write_text(options.out / "decode.md", report.text())
                if part == "growth":
                    draw_growth(report, options.out / "decode.png")


if __name__ == "__main__":
    main()
