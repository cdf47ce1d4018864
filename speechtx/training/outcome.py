"""What a step found (gradient norm, losses), read when it has arrived from the device instead of waiting for it.

A GPU computes long after it was told to. Asking it for a number after every step would make the host wait for the step to end
before it could prepare the next; so its numbers are copied into pinned memory behind the step and read one step later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Group = list[list[int]]


@dataclass(frozen=True)
class Outcome:
    """Of one optimiser step, over all processes."""

    step: int
    group: Group  # its batches, as indices of utterances
    norm: float  # of the gradient, before clipping; not finite if the step was skipped
    sums: Tensor  # float64, on the CPU


class Outcomes:
    """A queue of outcomes on their way.

    Args:
        device: where steps are computed.
        late: how many steps later an outcome is read: by default 1 from a GPU and 0 from a CPU, which has it at once.
    """

    def __init__(self, device: torch.device, *, late: int | None = None) -> None:
        self.device = device
        self.late = late if late is not None else int(device.type == "cuda")
        self._queue: deque[tuple[int, Group, Tensor, torch.cuda.Event | None]] = deque()

    def send(self, step: int, group: Group, norm: Tensor, sums: Tensor) -> Iterator[Outcome]:
        """Sends one off, and yields those that are due."""
        values = torch.cat((norm.detach().double().reshape(1), sums))
        arrived = None
        if self.device.type == "cuda":
            values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self._queue.append((step, group, values, arrived))
        return self._receive(self.late)

    def flush(self) -> Iterator[Outcome]:
        """Waits for all that are on their way."""
        return self._receive(0)

    def _receive(self, remaining: int) -> Iterator[Outcome]:
        while len(self._queue) > remaining:
            step, group, values, arrived = self._queue.popleft()
            if arrived is not None:
                arrived.synchronize()
            yield Outcome(step=step, group=group, norm=float(values[0]), sums=values[1:])
