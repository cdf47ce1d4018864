"""Timing side by side, and what becomes of it: tables, a plot, and the machine it ran on."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from speechtx.config.atomic import replacing

Candidates = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Size:
    """How much to measure; `quick` only shows that everything runs."""

    batch: int = 8
    repeats: int = 5
    lengths: tuple[int, ...] = (250, 500, 1000, 2000, 4000)
    loop_lengths: tuple[int, ...] = (250, 500)
    memory_lengths: tuple[int, ...] = (1000, 2000, 4000, 8000, 16000)
    gpu_lengths: tuple[int, ...] = (375, 750, 1500, 3000)
    model_dim: int = 256
    model_repeats: int = 7
    frames: int = 400


QUICK = Size(1, 2, (32, 64), (16,), (256,), (32,), 32, 2, 60)


@dataclass
class Report:
    """Tables as they come, and the points of the plot."""

    header: list[str]
    title: str = "What the attention penalty costs"
    sections: list[str] = field(default_factory=list)
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)  # name -> (T, ms)
    memory: dict[str, list[tuple[int, float]]] = field(default_factory=dict)  # name -> (T, MiB)

    def add(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], note: str = "") -> None:
        lines = [f"## {title}", "", "| " + " | ".join(columns) + " |", "|" + "---:|" * len(columns)]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        self.sections.append("\n".join(lines + (["", note] if note else [])))
        print(self.sections[-1] + "\n", flush=True)

    def text(self) -> str:
        return "\n\n".join([f"# {self.title}", *self.header, *self.sections]) + "\n"


def alternate(candidates: Candidates, *, repeats: int, device: str = "cpu") -> dict[str, list[float]]:
    """Milliseconds of every candidate in every round, after one round that does not count.

    With one thread on the CPU it is processor time, which does not see who else uses the machine; with more threads, or on a
    GPU, it is the clock on the wall.
    """
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(repeats + 1):
        for name, run in candidates.items():
            _wait(device)
            start = clock()
            run()
            _wait(device)
            if turn:
                times[name].append(1000 * (clock() - start))
    return times


def ratio(times: dict[str, list[float]], name: str, base: str) -> float:
    """The median over rounds of name / base."""
    return statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def spread(times: dict[str, list[float]]) -> str:
    pairs = {name: [a / b for a, b in zip(times[name], times["none"], strict=True)] for name in times if name != "none"}
    return "; ".join(f"{name} {min(values):.2f} to {max(values):.2f}" for name, values in pairs.items())


def draw(report: Report, path: Path) -> None:
    """Milliseconds and memory against T, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    panels = [(curves, label) for curves, label in ((report.curves, "ms, forward + backward"), (report.memory, "MiB")) if curves]
    if not panels:
        return
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5.2 * len(panels), 4.2), squeeze=False)
    for axis, (curves, label) in zip(axes[0], panels, strict=True):
        for name, points in curves.items():
            axis.plot(*zip(*points, strict=True), marker="o", label=name)
        axis.set(xscale="log", yscale="log", xlabel="T, positions", ylabel=label)
        axis.set_xticks(sorted({length for points in curves.values() for length, _ in points}))
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0][0].set_title("one layer's attention" if report.curves else "one window", fontsize=10)
    if len(panels) == 2:
        axes[0][1].set_title("peak memory, the same window", fontsize=10)
    figure.tight_layout()
    with replacing(path, "wb") as stream:
        figure.savefig(stream, dpi=120, format="png")
    pyplot.close(figure)


def machine(threads: int) -> str:
    """Where this runs and how busy that is."""
    models = (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name"))
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    cpu = (
        f"{next(models, 'unknown CPU')}, {os.cpu_count()} cores, {threads} thread{'s' * (threads > 1)}, torch {torch.__version__}"
    )
    clock = "processor time" if threads == 1 else "wall time"
    return f"Machine: {cpu}, load average {load} at the start; {clock}."


def _cpuinfo() -> Iterator[str]:
    with contextlib.suppress(OSError):
        yield from Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
