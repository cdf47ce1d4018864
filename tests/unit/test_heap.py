"""A process that trains keeps its memory, and is none the larger for it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from speechtx.training import heap

STEPS = """
import resource, sys, torch
from speechtx.training.heap import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def step():
    torch.ones(10_000_000)  # 40 MB: more than malloc ever learns to keep by itself
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF)
for _ in range(10):
    step()
after = resource.getrusage(resource.RUSAGE_SELF)
print(after.ru_minflt - before.ru_minflt, after.ru_maxrss - before.ru_maxrss)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc is Linux's")
def test_steps_cause_no_page_faults_and_memory_does_not_grow() -> None:
    found = {}
    for what in ("keep", "default"):
        answer = subprocess.run([sys.executable, "-c", STEPS, what], capture_output=True, text=True, check=True)
        found[what] = [int(word) for word in answer.stdout.split()]
    assert found["keep"][0] < 50 < found["default"][0], "of 400 MB that the steps write"
    assert found["keep"][1] < 1024, "KiB"


def test_where_malloc_is_another_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda _: object())
    assert heap.keep_freed_memory() is False
