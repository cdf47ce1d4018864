#!/usr/bin/env python3
"""What the attention penalty costs: alone, inside a whole model, in memory, and on a GPU if there is one.

Everything that is compared runs in one process, one candidate after the other, again and again (A B A B ...). A ratio is the
median of the ratios within a round, so a machine that becomes slower half-way does not change it. Milliseconds are medians too,
but mean something only on an idle machine.

Example:
    OMP_NUM_THREADS=2 python -m benchmarks.attention --threads 2 --out benchmarks
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels import (
    HEAD_DIM,
    HEADS,
    LOG,
    WINDOW,
    after_softmax,
    alone_candidates,
    band_loop,
    block_bias,
    forward_backward,
    loop_attention,
    qkv,
    window_bias,
)
from benchmarks.memory import measure_memory
from benchmarks.side_by_side import QUICK, Candidates, Report, Size, alternate, draw, machine, ratio
from benchmarks.whole_model import measure_decoding, measure_model
from speechtx.attention.kernels import attend
from speechtx.attention.site import AttentionPenalty, dense_self_bias
from speechtx.config.atomic import write_text
from speechtx.config.penalty import PenaltyConfig


def measure_alone(report: Report, size: Size) -> None:
    """SDPA, SDPA + bias, the explicit softmax, blocks."""
    names = ("SDPA", "SDPA + bias", "explicit + bias", "BlockBias")
    rows = []
    for length in size.lengths:
        times = alternate(alone_candidates(size.batch, length), repeats=size.repeats)
        for name, values in times.items():
            report.curves.setdefault(name, []).append((length, statistics.median(values)))
        cells = [f"{statistics.median(times[name]):.1f}" if name in times else "too large" for name in names]
        ratios = [f"{ratio(times, name, 'SDPA'):.2f}" if name in times else "-" for name in names[1:]]
        rows.append([str(length), *cells, *ratios])
    report.add(
        f"One layer's attention, forward + backward, ms (B {size.batch}, H {HEADS}, d {HEAD_DIM}, float32, window +-{WINDOW})",
        ["T", *names, *(f"{name} / SDPA" for name in names[1:])],
        rows,
        "`SDPA + bias` reads T x T numbers for every head that bare SDPA does not have, and adds them: that is what keeps its "
        "ratio above 1. BlockBias computes less: only the keys in the window.",
    )


def measure_loop(report: Report, size: Size) -> None:
    """The loop of band matrices against one gather."""
    rows = []
    for length in size.loop_lengths:
        q, k, v = qkv(size.batch, length)
        logits = torch.randn(size.batch, HEADS, length, length)
        weights = logits.softmax(-1)
        site = AttentionPenalty(PenaltyConfig(shape="linear"), num_layers=1, num_heads=HEADS)

        def build(length: int = length, site: AttentionPenalty = site) -> Tensor:
            return dense_self_bias(site.by_offset(0, length))

        parts: Candidates = {
            "ours, build": build,
            "ours, build + apply": lambda logits=logits, build=build: logits + build(),
            "ours, layer": forward_backward(lambda q, k, v, build=build: attend(q, k, v, bias=build()), q, k, v),
            "loop T x T, build": lambda length=length: band_loop((length, length)),
            "loop T x T, build + apply": lambda w=weights, length=length: after_softmax(w, band_loop((length, length))),
            "loop, build + apply": lambda w=weights: after_softmax(w, band_loop(tuple(w.shape))),
            "loop, layer": forward_backward(loop_attention, q, k, v),
        }
        times = alternate(parts, repeats=size.repeats)
        report.curves.setdefault("band loop", []).append((length, statistics.median(times["loop, layer"])))
        for ours, theirs in (
            ("ours, build", "loop T x T, build"),
            ("ours, build + apply", "loop T x T, build + apply"),
            ("ours, build + apply", "loop, build + apply"),
            ("ours, layer", "loop, layer"),
        ):
            cells = [f"{statistics.median(times[name]):.2f}" for name in (ours, theirs)]
            rows.append([str(length), theirs, *cells, f"{ratio(times, theirs, ours):.0f}"])
    report.add(
        f"A loop of band matrices against a table by offset, ms (B {size.batch}, H {HEADS}; building at every call)",
        ["T", "what", "ours", "loop", "loop / ours"],
        rows,
        "`loop T x T` makes one matrix for all heads and utterances, `loop` makes it in the shape of the weights (B, H, T, T). "
        "Apply: adding to the logits for us; adding to the weights, lifting and renormalising for the loop. "
        "Layer: the whole attention, forward + backward.",
    )


def measure_window(report: Report, size: Size) -> None:
    """Blocks against the fused kernel with the same window as a bias."""
    length = max(size.lengths)
    q, k, v = qkv(size.batch, length)
    dense, blocks = window_bias(length), block_bias()
    times = alternate(
        {
            "SDPA": forward_backward(lambda q, k, v: attend(q, k, v, bias=dense), q, k, v),
            "BlockBias": forward_backward(lambda q, k, v: attend(q, k, v, bias=blocks), q, k, v),
        },
        repeats=size.repeats,
    )
    cells = [f"{statistics.median(times[name]):.0f}" for name in ("SDPA", "BlockBias")]
    report.add(
        f"A window of +-{WINDOW} at T = {length}, forward + backward, ms (B {size.batch})",
        ["SDPA + window bias", "BlockBias", "times faster"],
        [[*cells, f"{ratio(times, 'SDPA', 'BlockBias'):.1f}"]],
    )


GPU_ROWS: dict[str, tuple[PenaltyConfig, int]] = {  # backend and its head size
    "sdpa": (LOG, 64),
    "flex": (LOG, 64),
    "fold": (PenaltyConfig(shape="gaussian", sigma=8.0), 64),
    "fold (d 56)": (PenaltyConfig(shape="gaussian", sigma=8.0), 56),
    "flash_attn": (PenaltyConfig(shape="linear", scale="alibi"), 64),
}


def backend_ratio(row: str, length: int, size: Size, *, device: str, dtype: torch.dtype) -> str:
    """One backend over bare SDPA with heads of the same size, forward + backward; or why it was not measured."""
    config, head_dim = GPU_ROWS[row]
    q, k, v = qkv(size.batch, length, head_dim=head_dim, device=device, dtype=dtype)
    try:
        site = AttentionPenalty(config, num_layers=1, num_heads=HEADS, backend=row.split()[0]).to(device)
        bias = site(length=length, device=device, dtype=dtype, head_dim=head_dim)[0]
        with_bias = forward_backward(lambda q, k, v: attend(q, k, v, bias=bias), q, k, v)
        times = alternate({"flash": _flash_only(q, k, v), "ours": with_bias}, repeats=4 * size.repeats, device=device)
    except ImportError as error:
        return f"needs {error.name}"
    return f"{ratio(times, 'ours', 'flash'):.2f}"


def _flash_only(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], object]:
    """SDPA without bias, in the flash kernel or not at all."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    run = forward_backward(F.scaled_dot_product_attention, q, k, v)

    def step() -> None:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            run()

    return step


def measure_gpu(report: Report, size: Size) -> None:
    """Each backend against flash SDPA without bias, bfloat16."""
    cuda = torch.cuda.is_available()
    rows = []
    for row in GPU_ROWS:
        cells = [
            backend_ratio(row, length, size, device="cuda", dtype=torch.bfloat16) if cuda else "not measured"
            for length in size.gpu_lengths
        ]
        rows.append([row, GPU_ROWS[row][0].shape, *cells])
    name = torch.cuda.get_device_name() if cuda else "no CUDA device"
    report.add(
        f"Each backend over flash SDPA without bias, bfloat16, forward + backward ({name}; B {size.batch}, H {HEADS})",
        ["backend", "shape", *(f"T = {length}" for length in size.gpu_lengths)],
        rows,
    )


MEASURE: dict[str, Callable[[Report, Size], None]] = {
    "alone": measure_alone,
    "window": measure_window,
    "model": measure_model,
    "decoding": measure_decoding,
    "loop": measure_loop,
    "memory": measure_memory,
    "gpu": measure_gpu,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, measures nothing")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write attention.md and attention.png there")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, help="utterances in parts alone, loop, window and gpu (default: 8)")
    parser.add_argument("--parts", nargs="+", choices=MEASURE, default=list(MEASURE))
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    size = QUICK if options.quick else Size(batch=options.batch or Size.batch)
    words = " ".join(sys.argv[1:] if arguments is None else arguments)
    report = Report(header=[f"`python -m benchmarks.attention {words}`".replace(" `", "`"), machine(options.threads)])
    print("\n".join(report.header) + "\n", flush=True)
    for part in MEASURE:
        if part not in options.parts:
            continue
        MEASURE[part](report, size)
        if options.out:  # after every part: a long run that is cut off leaves what it found
            options.out.mkdir(parents=True, exist_ok=True)
            write_text(options.out / "attention.md", report.text())
            draw(report, options.out / "attention.png")


if __name__ == "__main__":
    main()
