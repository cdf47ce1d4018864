"""Peak memory of windowed attention, measured in a new process for every number: allocators keep what they once had.

`python -m benchmarks.memory KERNEL T B` prints one of them.
"""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.kernels import WINDOW, block_bias, qkv, window_bias
from benchmarks.side_by_side import Report, Size
from speechtx.attention.kernels import Bias, attend


def measure_memory(report: Report, size: Size, batch: int = 2) -> None:
    """Peak memory of one forward and backward pass, each in a process of its own."""
    rows = []
    for length in size.memory_lengths:
        blocks = memory_in_new_process("blocks", length, batch)
        full = memory_in_new_process("sdpa", length, batch) if length < 16000 else math.nan  # 1 GiB of bias: nothing new
        report.memory.setdefault("BlockBias", []).append((length, blocks))
        report.memory.setdefault("SDPA + window bias", []).append((length, full))
        full_cell = "-" if math.isnan(full) else f"{full:.1f}"
        rows.append([str(length), f"{blocks:.1f}", f"{1000 * blocks / length:.2f}", full_cell])
    report.add(
        f"Peak memory beyond q, k and v of a window of +-{WINDOW}, MiB (B {batch}, one thread, a new process each)",
        ["T", "BlockBias", "per 1000 frames", "SDPA + window bias"],
        rows,
        "Linear in T where the second column levels out. SDPA holds the bias of T x T numbers.",
    )


def memory_in_new_process(kernel: str, length: int, batch: int) -> float:
    """MiB; a new process, because allocators keep what they once had."""
    command = [sys.executable, "-m", "benchmarks.memory", kernel, str(length), str(batch)]
    root = str(Path(__file__).resolve().parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    answer = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return float(answer.stdout)


def peak_memory(kernel: str, length: int, batch: int) -> float:
    """MiB by which one forward and backward pass raises this process' peak; Linux only."""
    torch.set_num_threads(1)
    run_length = {"warm-up": 2 * WINDOW, "measured": length}
    for name, frames in run_length.items():
        q, k, v = qkv(batch, frames)
        grad = torch.randn_like(q)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _status("VmRSS")
        bias: Bias = block_bias() if kernel == "blocks" else window_bias(frames)
        torch.autograd.grad(attend(q, k, v, bias=bias), (q, k, v), grad)
        if name == "measured":
            return (_status("VmHWM") - before) / 1024
    raise AssertionError("unreachable")


def _status(key: str) -> int:
    """A line of /proc/self/status, KiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    print(peak_memory(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
