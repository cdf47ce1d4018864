"""Processes that take training steps in turns; see `benchmarks.train_worker`."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.train_worker import Spec

ROOT = Path(__file__).resolve().parent.parent


class Worker:
    """A process of `benchmarks.train_worker`."""

    def __init__(self, spec: Spec, python: str = sys.executable) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(spec.threads)}
        self.process = subprocess.Popen(
            [python, str(ROOT / "benchmarks" / "train_worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.tell(spec.to_json())

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died: `hear` says of what
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None and self.process.stderr is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(self.process.stderr.read().strip().splitlines()[-1])
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None and self.process.stderr is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.process.stderr.close()


class Team:
    """Data-parallel processes that do each step together; mostly one alone."""

    def __init__(self, specs: Sequence[Spec], python: str = sys.executable) -> None:
        self.workers = [Worker(spec, python) for spec in specs]

    def ready(self) -> int:
        """Waits until all are built; the number of parameters."""
        answers = [worker.hear() for worker in self.workers]
        return answers[0]["parameters"]

    def step(self, number: int, command: str = "step") -> dict[str, float]:
        """The slowest process's seconds."""
        for worker in self.workers:
            worker.tell(f"{command} {number}")
        return max((worker.hear() for worker in self.workers), key=lambda answer: answer.get("wall", 0.0))

    def close(self) -> None:
        for worker in self.workers:
            worker.close()


@contextlib.contextmanager
def teams(specs: dict[str, list[Spec]], espnet: str | None) -> Iterator[dict[str, Team]]:
    """Starts every candidate's processes, and ends them."""
    started: dict[str, Team] = {}
    try:
        for name, members in specs.items():
            started[name] = Team(members, espnet or sys.executable if members[0].toolkit == "espnet" else sys.executable)
        yield started
    finally:
        for team in started.values():
            team.close()
