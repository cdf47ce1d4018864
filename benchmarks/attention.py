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
import contextlib
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from speechtx.attention.blocks import BlockBias
from speechtx.attention.kernels import Bias, attend, attend_eager
from speechtx.attention.site import AttentionPenalty, build_bias, dense_self_bias
from speechtx.config.atomic import replacing, write_text
from speechtx.config.penalty import AttentionPenaltyConfig, CrossPenaltyConfig, PenaltyConfig
from speechtx.config.schema import DecodeConfig, DecoderConfig, EncoderConfig, ModelConfig, SubsamplingConfig
from speechtx.model.recognizer import Recognizer
from speechtx.search.beam import beam_search

HEADS, HEAD_DIM, WINDOW = 4, 64, 64
PARTS = ("alone", "window", "model", "decoding", "loop", "memory", "gpu")
LOG = PenaltyConfig(shape="log")
_EXPLICIT_BYTES = 2**30  # the explicit softmax keeps about four matrices of this size

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
    model_repeats: int = 11
    frames: int = 400


QUICK = Size(1, 2, (32, 64), (16,), (256,), (32,), 32, 2, 60)


@dataclass
class Report:
    """Tables as they come, and the points of the plot."""

    header: list[str]
    sections: list[str] = field(default_factory=list)
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)  # name -> (T, ms)
    memory: dict[str, list[tuple[int, float]]] = field(default_factory=dict)  # name -> (T, MiB)

    def add(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], note: str = "") -> None:
        lines = [f"## {title}", "", "| " + " | ".join(columns) + " |", "|" + "---:|" * len(columns)]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        self.sections.append("\n".join(lines + (["", note] if note else [])))
        print(self.sections[-1] + "\n", flush=True)

    def text(self) -> str:
        return "\n\n".join(["# What the attention penalty costs", *self.header, *self.sections]) + "\n"


# ------------------------------------------------------------------------------------------------------------- timing


def alternate(candidates: Candidates, *, repeats: int, device: str = "cpu") -> dict[str, list[float]]:
    """Milliseconds of every candidate in every round, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(repeats + 1):
        for name, run in candidates.items():
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            if turn:
                times[name].append(1000 * (time.perf_counter() - start))
    return times


def ratio(times: dict[str, list[float]], name: str, base: str) -> float:
    """The median over rounds of name / base."""
    return statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def forward_backward(
    attention: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor
) -> Callable[[], object]:
    """One pass forward and backward as a training step has it."""
    grad = torch.randn_like(q)
    return lambda: torch.autograd.grad(attention(q, k, v), (q, k, v), grad)


def qkv(
    batch: int, length: int, *, head_dim: int = HEAD_DIM, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Leaves (B, H, T, d) in the layout of a model, where T comes before the heads."""
    shape = (batch, length, HEADS, head_dim)
    return [torch.randn(shape, device=device, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3)]


# --------------------------------------------------------------------------------------------------- what is compared


def band_loop(shape: tuple[int, ...], *, step: int = 1) -> Tensor:
    """The widespread slow way to build a linear penalty: one band matrix more for every `step` of distance.

    Each turn adds -1 outside a band one step wider than the last, so that it ends as -ceil(|i - j| / step).
    """
    board = torch.zeros(shape)
    for width in range(0, shape[-1] - 1, step):
        band = torch.ones(shape).tril(width).triu(-width)
        board = board + (band - 1.0)
    return board


def after_softmax(weights: Tensor, board: Tensor) -> Tensor:
    """And how it is then applied: added to the weights, lifted above zero, renormalised."""
    weights = weights + board
    weights = weights - weights.min()
    return weights / weights.sum(dim=-1, keepdim=True)


def loop_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention with the loop inside, on matrices of the weights' own shape."""
    weights = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1)
    return after_softmax(weights, band_loop(tuple(weights.shape))) @ v


def block_bias() -> BlockBias:
    """-log(1 + |o|) within the window."""
    site = AttentionPenalty(LOG, num_layers=1, num_heads=HEADS)
    return BlockBias(site.by_offset(0, WINDOW + 1))


def window_bias(length: int) -> Tensor:
    """The same for every pair of positions: (1, 1, T, T)."""
    bias = build_bias(PenaltyConfig(shape="log", window=WINDOW), length=length, num_heads=HEADS)
    assert bias is not None
    return bias.contiguous()


def alone_candidates(batch: int, length: int) -> Candidates:
    """Forward and backward of one layer's attention; the biases exist already, as in every layer but the first."""
    q, k, v = qkv(batch, length)
    bias, blocks = build_bias(LOG, length=length, num_heads=HEADS), block_bias()
    kernels: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "SDPA": attend,
        "SDPA + bias": lambda q, k, v: attend(q, k, v, bias=bias),
        "explicit + bias": lambda q, k, v: attend_eager(q, k, v, bias=bias),
        "BlockBias": lambda q, k, v: attend(q, k, v, bias=blocks),
    }
    if 4 * batch * HEADS * length**2 > _EXPLICIT_BYTES:
        del kernels["explicit + bias"]
    return {name: forward_backward(kernel, q, k, v) for name, kernel in kernels.items()}


# -------------------------------------------------------------------------------------------------------------- parts


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
    command = [sys.executable, str(Path(__file__).resolve()), "--memory", kernel, str(length), str(batch)]
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


# -------------------------------------------------------------------------------------------------------- whole models


def make_model(size: Size, penalty: AttentionPenaltyConfig) -> Recognizer:
    """ESPnet's AN4 Transformer: 12 + 6 layers of 256, 27 million parameters."""
    wide = size.model_dim >= 256
    config = ModelConfig(
        encoder=EncoderConfig(
            layers=12 if wide else 2,
            dim=size.model_dim,
            heads=HEADS,
            ff_dim=8 * size.model_dim,
            subsampling=SubsamplingConfig(channels=size.model_dim),
        ),
        decoder=DecoderConfig(layers=6 if wide else 1, heads=HEADS, ff_dim=8 * size.model_dim),
        attention_penalty=penalty,
    )
    torch.manual_seed(0)
    return Recognizer(config=config, num_mel_bins=80, vocab_size=30)


def penalties() -> dict[str, AttentionPenaltyConfig]:
    """What a model may pay; the first is the base."""
    return {
        "none": AttentionPenaltyConfig(),
        "log": AttentionPenaltyConfig(encoder_self=LOG, decoder_self=LOG),
        "ctc_count": AttentionPenaltyConfig(cross=CrossPenaltyConfig(shape="gaussian", sigma=3.0, axis="ctc_count")),
    }


def training_step(model: Recognizer, batch: Sequence[Tensor]) -> Callable[[], object]:
    """Forward, backward and optimiser."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        losses = model(*batch)
        (losses.total / losses.num_tokens).backward()
        optimizer.step()

    return step


def measure_model(report: Report, size: Size) -> None:
    """A training step with penalties over one without."""
    count, tokens = 4, max(2, size.frames // 20)
    batch = (
        torch.randn(count, size.frames, 80),
        torch.full((count,), size.frames),
        torch.randint(1, 29, (count, tokens)),
        torch.full((count,), tokens),
    )
    steps = {name: training_step(make_model(size, penalty).train(), batch) for name, penalty in penalties().items()}
    times = alternate(steps, repeats=size.model_repeats)
    report.add(
        f"Training step of the AN4 Transformer, ms ({count} x {size.frames} frames, d {size.model_dim}, with dropout and AdamW)",
        ["penalty", "step", "over none"],
        [[name, f"{statistics.median(times[name]):.0f}", f"{ratio(times, name, 'none'):.3f}"] for name in times],
        f"Ratios of the rounds, smallest to largest: {_spread(times)}. `log` is on encoder and decoder self-attention, "
        "`ctc_count` (gaussian, one head) on cross-attention.",
    )


def measure_decoding(report: Report, size: Size) -> None:
    """Beam search of a given number of steps, with the penalty inside and without."""
    torch.manual_seed(1)
    feats, lens = torch.randn(1, size.frames, 80), torch.tensor([size.frames])
    # A bonus that no ending can beat forces the greatest length, the same for all.
    config = DecodeConfig(beam=10, ctc_weight=0.3, length_bonus=50.0, max_len_ratio=0.2)
    searches: Candidates = {}
    for name, penalty in penalties().items():
        model = make_model(size, penalty).eval()
        with torch.inference_mode():
            encoded = model.encode(feats, lens)
        searches[name] = lambda model=model, encoded=encoded: beam_search(model, *encoded, config)
    lengths = {name: len(search()[0][0].tokens) for name, search in searches.items()}  # type: ignore[index]
    assert len(set(lengths.values())) == 1, f"searches of different lengths cannot be compared: {lengths}"
    times = alternate(searches, repeats=size.model_repeats)
    steps = lengths["none"] + 1
    report.add(
        f"Joint CTC/attention beam search, beam 10, ms a step (one utterance of {size.frames} frames, {steps} steps)",
        ["penalty", "a step", "over none"],
        [[name, f"{statistics.median(times[name]) / steps:.2f}", f"{ratio(times, name, 'none'):.3f}"] for name in times],
        f"Ratios of the rounds, smallest to largest: {_spread(times)}.",
    )


def _spread(times: dict[str, list[float]]) -> str:
    pairs = {name: [a / b for a, b in zip(times[name], times["none"], strict=True)] for name in times if name != "none"}
    return "; ".join(f"{name} {min(values):.2f} to {max(values):.2f}" for name, values in pairs.items())


# ---------------------------------------------------------------------------------------------------------------- GPU

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


# --------------------------------------------------------------------------------------------------------------- output


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
    axes[0][0].set_title("one layer's attention" if report.curves else f"window of +-{WINDOW}", fontsize=10)
    if len(panels) == 2:
        axes[0][1].set_title(f"peak memory, window of +-{WINDOW}", fontsize=10)
    figure.tight_layout()
    with replacing(path, "wb") as stream:
        figure.savefig(stream, dpi=120, format="png")
    pyplot.close(figure)


def machine(threads: int) -> str:
    """Where this runs and how busy that is."""
    models = (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name"))
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    cpu = f"{next(models, 'unknown CPU')}, {os.cpu_count()} cores, {threads} threads, torch {torch.__version__}"
    return f"Machine: {cpu}, load average {load} at the start."


def _cpuinfo() -> Iterator[str]:
    with contextlib.suppress(OSError):
        yield from Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, measures nothing")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write attention.md and attention.png there")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, help="utterances in parts alone, loop, window and gpu (default: 8)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--memory", nargs=3, metavar=("KERNEL", "T", "B"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.memory:
        print(peak_memory(options.memory[0], int(options.memory[1]), int(options.memory[2])))
        return
    torch.set_num_threads(options.threads)
    size = QUICK if options.quick else Size(batch=options.batch or Size.batch)
    words = " ".join(sys.argv[1:] if arguments is None else arguments)
    report = Report(header=[f"`python -m benchmarks.attention {words}`".replace(" `", "`"), machine(options.threads)])
    print("\n".join(report.header) + "\n", flush=True)
    for part in PARTS:
        if part not in options.parts:
            continue
        globals()[f"measure_{part}"](report, size)
        if options.out:  # after every part: a long run that is cut off leaves what it found
            options.out.mkdir(parents=True, exist_ok=True)
            write_text(options.out / "attention.md", report.text())
            draw(report, options.out / "attention.png")


if __name__ == "__main__":
    main()
