"""Several processes that train one model: who am I, sum over all, wait for all.

Two ways to share the work: each process has batches of its own, so that N processes take steps that are N times as large
(GPUs), or all share the batches of each step, so that steps are the same whatever N is (`speechtx train --procs`).

Gradients are summed by hand after the last batch of a step, not by DistributedDataParallel: each rank may then hold any
number of batches, none included, and N processes compute exactly the step that one process with the same global batch computes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from speechtx.config.errors import TrainingError


@dataclass(frozen=True)
class World:
    """This process among its peers; `size` 1 when it is alone.

    Attributes:
        rank: from 0.
        size: how many there are.
        device: of this one.
        share_batches: the batches of a step are dealt out among all, and those that are left over split, instead of each
            process having batches of its own.
    """

    rank: int
    size: int
    device: torch.device
    share_batches: bool = False

    def batches_of_step(self, accum_steps: int) -> int:
        """How many batches a step has, over all processes."""
        return accum_steps if self.share_batches else accum_steps * self.size

    def share_of(self, batches: list[list[int]]) -> list[list[int]]:
        """This process's batches of a step, and its part, if it is not empty, of each one that is split."""
        if not self.share_batches:
            return batches[self.rank :: self.size]
        whole = len(batches) - len(batches) % self.size
        parts = [batch[self.rank :: self.size] for batch in batches[whole:]]
        return batches[self.rank : whole : self.size] + [part for part in parts if part]

    def parts_of_batch(self, accum_steps: int) -> int:
        """Into how many parts the batches of a step are split at the least: one if each process has some to itself."""
        return self.size if self.share_batches and accum_steps < self.size else 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def suffix(self) -> str:
        """What the names of files end with that each process has: nothing for the first."""
        return "" if self.is_main else f"-{self.rank}"

    def sum(self, values: Tensor) -> Tensor:
        """Sums a tensor over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sums all gradients over all processes in one flat buffer.

        A parameter without a gradient, of a layer that this step left out, gets one of zeros, with one process too: else the
        optimiser would pass it over with one process, and let its moments decay with several.
        """
        with torch.no_grad():
            trained = [p for p in parameters if p.requires_grad]
            for parameter in trained:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            if self.size == 1:
                return
            gradients = [p.grad for p in trained if p.grad is not None]
            flat = torch.cat([g.flatten() for g in gradients])
            dist.all_reduce(flat)
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view(gradient.shape))  # in place: fused optimisers need the parameter's memory layout

    def share(self, values: Iterable[Tensor]) -> None:
        """Gives all processes what the first one has, in place."""
        if self.size > 1:
            for value in values:
                dist.broadcast(value, src=0)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def start(ngpu: int, *, share_batches: bool = False) -> World:
    """Joins the process group when RANK, WORLD_SIZE and LOCAL_RANK are in the environment (`launch`, torchrun).

    Args:
        ngpu: 0 trains on the CPU (gloo between processes), otherwise each process takes one GPU (nccl).
        share_batches: see `World`.

    Raises:
        TrainingError: a GPU was asked for and there is none, or several were asked for in one process.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if ngpu > 1 and size == 1:
        raise TrainingError(
            f"--ngpu {ngpu}, but this is one process, which would use one GPU; start one for each, as `speechtx train` does, or "
            f"on several hosts: torchrun --nproc-per-node {ngpu} -m speechtx.bin.main train ..."
        )
    if ngpu:
        if torch.cuda.device_count() <= local_rank:
            raise TrainingError(
                f"--ngpu {ngpu} asks for GPU {local_rank}, but PyTorch {torch.__version__} sees {torch.cuda.device_count()}; "
                "use --ngpu 0, or install a CUDA build of torch"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if size > 1:
        dist.init_process_group("nccl" if ngpu else "gloo")
    return World(rank=rank, size=size, device=device, share_batches=share_batches)


def stop(world: World) -> None:
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()
