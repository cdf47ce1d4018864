"""Toolkits side by side: each in a process of its own, told by a JSON line what to decode, answering with one that says how long.

Both workers (`decode_worker` and `espnet_worker`) read the same file with weights and features, and know the same three commands:
`load`, `search` and `memory`. So requests can alternate (A B A B ...) although the toolkits live in different environments.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OURS, PEER = "decode_worker", "espnet_worker"


class Worker:
    """A process that decodes when told to.

    Args:
        module: file name in this folder, without .py.
        case: the file of `decode_case.Case.save`.
        threads: of PyTorch; with one, answers count processor time, which other programs on the machine hardly change.
        python: the interpreter.
    """

    def __init__(self, *, module: str, case: Path, threads: int = 1, python: str = sys.executable) -> None:
        self._module = module
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            [python, str(ROOT / "benchmarks" / f"{module}.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.versions: str = self.ask("load", case=str(case), threads=threads)["versions"]

    def ask(self, command: str, **arguments: object) -> dict[str, Any]:
        """Sends a request and waits for its answer."""
        self.send(command, **arguments)
        return self.receive()

    def send(self, command: str, **arguments: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": command, **arguments}) + "\n")
        self._process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = next((line for line in self._process.stdout if line.startswith("{")), "")  # libraries greet on stdout too
        if not line:
            raise RuntimeError(f"{self._module} ended with status {self._process.wait()}; see its message above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def serve(commands: Mapping[str, Callable[..., dict[str, Any]]]) -> None:
    """A worker's main loop."""
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(commands[request.pop("do")](**request)), flush=True)


def peak_mib() -> float:
    """The most memory this process ever held, MiB; Linux only."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


@dataclass(frozen=True)
class Times:
    """What one candidate took in every round, in any unit."""

    rounds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    def __str__(self) -> str:
        """Median and quartiles."""
        return quartiles(self.rounds)


def quartiles(values: Sequence[float]) -> str:
    """`median (first quartile to third)`, three significant digits."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
    return f"{middle:.3g} ({low:.3g} to {high:.3g})"


def take_turns(candidates: Mapping[str, Callable[[], float]], *, rounds: int) -> dict[str, Times]:
    """Calls each candidate in turn, round after round, after one call each that does not count; what they return is kept."""
    for candidate in candidates.values():
        candidate()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, candidate in candidates.items():
            times[name].append(candidate())
    return {name: Times(values) for name, values in times.items()}


def ratios(above: Times, below: Times) -> list[float]:
    """Round by round, so that a machine that slows down half-way slows both sides."""
    return [a / b for a, b in zip(above.rounds, below.rounds, strict=True)]
