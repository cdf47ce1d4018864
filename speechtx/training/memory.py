"""How much memory a step takes, and what to do when there is not enough."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from speechtx.config.atomic import replacing
from speechtx.config.errors import TrainingError
from speechtx.data.loader import Batch
from speechtx.model.memory import is_out_of_memory

ADVICE = (
    "lower training.frames_per_batch (training.accum_steps keeps the size of a step), or training.max_frames if one utterance is "
    "too long by itself, or set training.gradient_checkpointing: true"
)


def reset_peak(device: torch.device) -> None:
    """Starts the measurement of `peak_memory` anew (Linux and CUDA; elsewhere the process's peak so far stays)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> float:
    """GiB: the most that PyTorch had allocated on the GPU, or that this process had resident, since `reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def total_memory(device: torch.device) -> float:
    """GiB that the GPU or the machine has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 2**30
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def shape_of(batch: Batch) -> str:
    """A batch in a few words."""
    utterances, frames, _ = batch.feats.shape
    return f"{utterances} utterances padded to {frames} frames and {batch.tokens.shape[1]} tokens"


@contextlib.contextmanager
def naming_the_batch(batch: Batch, *, save_to: Path, step: int) -> Iterator[None]:
    """Turns an out-of-memory error of the block into one that names the batch, which is saved to be looked at.

    Raises:
        TrainingError: memory ran out; everything else passes.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as err:
        if not is_out_of_memory(err):
            raise
        reason = str(err).splitlines()[0] if str(err) else type(err).__name__
    else:
        return
    # Out of the except block: the traceback would keep the tensors of the step alive.
    device = batch.feats.device
    with contextlib.suppress(OSError), replacing(save_to, "wb") as stream:
        names = ("feats", "feat_lens", "tokens", "token_lens", "phones", "phone_lens")
        torch.save({"ids": batch.ids, **{name: getattr(batch, name).cpu() for name in names}}, stream)
    named = ", ".join(batch.ids[:5]) + (f" and {len(batch.ids) - 5} more" if len(batch.ids) > 5 else "")
    raise TrainingError(
        f"step {step}: out of memory on {device} ({total_memory(device):.1f} GiB) with a batch of {shape_of(batch)}: {named}; it "
        f"was saved as {save_to}. What to do: {ADVICE}. PyTorch said: {reason}"
    )
