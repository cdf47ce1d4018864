"""`train --profile N`: where the time of a training step goes, and how near it comes to the rate of plain matrix products."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from speechtx.attention.multihead import SelfAttention
from speechtx.config.atomic import write_text
from speechtx.model.convolution import ConvolutionModule
from speechtx.model.encoder import FeedForward
from speechtx.model.recognizer import Recognizer
from speechtx.training.memory import peak_memory, reset_peak
from speechtx.training.optim import learning_rate
from speechtx.training.trainer import Trainer

PHASES = ("data wait", "forward", "backward", "synchronisation", "optimiser")
PRODUCT_SIZE = {"cpu": 1024, "cuda": 8192}  # of the square matrices whose product is the peak


@dataclass(frozen=True)
class Profile:
    """What was measured; times are milliseconds a step."""

    steps: int
    phases: dict[str, float]
    forward: dict[str, float]  # the parts of the phase of that name
    step: float
    frames_per_second: float
    gflop: float  # of a step's matrix products and convolutions in this process, forward and backward
    product_gflop_per_second: float
    padding: float  # share of the epoch's frames
    peak_gib: float
    device: str
    threads: int
    processes: int

    @property
    def share(self) -> float:
        """Of the time of a step, in which nothing but matrix products at their best rate would have done the same work."""
        return self.gflop / self.product_gflop_per_second / (self.step / 1000)

    def markdown(self) -> str:
        """The tables."""
        lines = [
            "# Where a training step's time goes",
            "",
            f"{self.steps} steps on {self.device}, {self.threads} threads in {self.processes} processes: {self.step:.1f} ms a "
            f"step, {self.frames_per_second:,.0f} frames/s, peak memory {self.peak_gib:.2f} GiB.",
            "",
            f"A step has {self.gflop:.2f} GFLOP of matrix products and convolutions{' in each process' * (self.processes > 1)}; "
            f"a plain matrix product runs at {self.product_gflop_per_second:,.0f} GFLOP/s here, so the step reaches "
            f"{100 * self.share:.0f} % of that rate. "
            f"Padding is {100 * self.padding:.1f} % of the epoch's frames.",
            "",
            *_table("phase", self.phases, self.step),
            "",
            *_table("part of forward", self.forward, self.step),
        ]
        return "\n".join(lines) + "\n"


def _table(title: str, rows: dict[str, float], whole: float) -> list[str]:
    lines = [f"| {title} | ms a step | share |", "|---|---:|---:|"]
    return lines + [f"| {name} | {ms:.2f} | {100 * ms / whole:.1f} % |" for name, ms in rows.items()]


class Stopwatch:
    """Adds up seconds by name; on a GPU it waits for it at both ends, which is why profiling is never on by itself."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = self.now()
        yield
        self.seconds[name] += self.now() - start

    @contextlib.contextmanager
    def watching(self, parts: dict[str, list[nn.Module]]) -> Iterator[None]:
        """Times the forward calls of modules inside the block."""
        handles = []
        for name, modules in parts.items():
            for module in modules:
                before, after = self._hooks(name)
                handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hooks(self, name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        started: list[float] = []

        def before(*_: Any) -> None:
            started.append(self.now())

        def after(*_: Any) -> None:
            self.seconds[name] += self.now() - started.pop()

        return before, after


def parts_of(model: Recognizer) -> dict[str, list[nn.Module]]:
    """Modules by what a person calls them; none lies inside another."""
    encoder = model.encoder
    found: dict[str, list[nn.Module]] = {
        "front end": [encoder.subsampling],
        "encoder positions": [encoder.position],
        "encoder penalty and masks": [encoder.attention_penalty],
        "encoder self-attention": [],
        "encoder feed-forward": [],
        "encoder convolution": [],
    }
    kinds = {
        "encoder self-attention": SelfAttention,
        "encoder feed-forward": FeedForward,
        "encoder convolution": ConvolutionModule,
    }
    for layer in encoder.layers:
        for module in layer.children():
            for name, kind in kinds.items():
                if isinstance(module, kind):
                    found[name].append(module)
    if model.decoder is not None:
        found["decoder"] = [model.decoder]
    return {name: modules for name, modules in found.items() if modules}


def flop_counter() -> FlopCounterMode:
    """Counts matrix products and convolutions.

    PyTorch alone leaves out attention by its fused CPU kernel and by ours, and takes grouped convolutions for full ones where it
    counts the gradient of their weights.
    """
    aten, ours = torch.ops.aten, torch.ops.speechtx
    forward, backward = 2, 5  # matrix products; backward computes the weights again and makes four gradients

    def of(products: int, q: Sequence[int], keys: int) -> int:
        return products * 2 * math.prod(q) * keys

    return FlopCounterMode(
        display=False,
        custom_mapping={
            # Each gradient takes as many multiplications as the convolution itself.
            aten.convolution_backward: lambda grad, x, w, *rest, **__: sum(rest[7][:2]) * conv_flop_count(x, w, grad),
            aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, *_, **__: of(forward, q, k[2]),
            aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, *_, **__: of(backward, q, k[2]),
            ours.block_attention: lambda q, k, v, band, *_, **__: of(forward, q, min(band[1], k[2])),
            ours.block_attention_backward: lambda grad, q, k, v, band, *_, **__: of(backward, q, min(band[1], k[2])),
        },
    )


def matrix_product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """GFLOP/s of the fastest of five products of square matrices, with the threads of this process."""
    size = PRODUCT_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    clock = Stopwatch(device)
    seconds = []
    for _ in range(6):
        start = clock.now()
        a @ b
        seconds.append(clock.now() - start)
    return 2 * size**3 / min(seconds[1:]) / 1e9


def padding_share(lengths: list[int], batches: list[list[int]]) -> float:
    """Of the frames that a model computes, how many are padding."""
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    return 1.0 - sum(lengths[i] for batch in batches for i in batch) / padded


def profile(trainer: Trainer, steps: int) -> Profile:
    """Takes the next `steps` steps of the epoch twice: once counting operations, which warms up, and once timing.

    The steps are real ones, but nothing is saved: the experiment stands where it stood. Writes profile.md and profile.json.

    Args:
        trainer: of an experiment that is laid out; it continues from the checkpoint if there is one.
        steps: how many; no more than the epoch has left.
    """
    trainer.resume()
    if trainer.epoch > trainer.train_config.epochs:  # a finished training is profiled on another epoch of its data
        trainer.index = 0
    device, frames = trainer.world.device, trainer.train_corpus.at_epoch(trainer.epoch).lengths()
    all_groups = trainer.groups()
    groups = all_groups[trainer.index :][:steps]
    trainer.model.train()
    with flop_counter() as counter:
        _take(trainer, groups)
    watch = Stopwatch(device)
    rate = matrix_product_rate(device, trainer.precision)
    reset_peak(device)
    trainer.phase = watch.phase
    started = watch.now()
    with watch.watching(parts_of(trainer.model)):
        _take(trainer, groups)
    seconds = watch.now() - started
    trainer.phase = contextlib.nullcontext
    rate = max(rate, matrix_product_rate(device, trainer.precision))
    scale = 1000 / len(groups)
    phases = {name: scale * watch.seconds[name] for name in PHASES}
    forward = {name: scale * watch.seconds[name] for name in watch.seconds if name not in PHASES}
    found = Profile(
        steps=len(groups),
        phases={**phases, "the rest": scale * seconds - sum(phases.values())},
        forward={**forward, "norms, residuals, CTC output, losses": phases["forward"] - sum(forward.values())},
        step=scale * seconds,
        frames_per_second=sum(frames[i] for group in groups for batch in group for i in batch) / seconds,
        gflop=counter.get_total_flops() / len(groups) / 1e9,
        product_gflop_per_second=rate,
        padding=padding_share(frames, [batch for group in all_groups for batch in group]),
        peak_gib=peak_memory(device),
        device=str(device),
        threads=torch.get_num_threads(),
        processes=trainer.world.size,
    )
    if trainer.world.is_main:
        write_text(trainer.exp / "profile.md", found.markdown())
        write_text(trainer.exp / "profile.json", json.dumps({**asdict(found), "share_of_product": found.share}, indent=1) + "\n")
    return found


def _take(trainer: Trainer, groups: list[list[list[int]]]) -> None:
    """The steps of the given groups, at the rate that the schedule has here."""
    lr = learning_rate(trainer.train_config.schedule, peak=trainer.train_config.optimizer.lr, step=trainer.step + 1, progress=0.0)
    batches = trainer.load(groups)
    for group in groups:
        trainer.train_step(group, batches, lr)
