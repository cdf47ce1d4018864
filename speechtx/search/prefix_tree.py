"""Which label sequences the beam of a frame-synchronous search holds, and which of them begins which.

In such a search a prefix may leave the beam and come back while longer prefixes that begin with it stayed, and what meets in a
prefix has to be added up. So it must be known exactly when two prefixes are the same. Prefixes are nodes of a tree that grows as
the search goes on; for every two of the beam, `toward` holds the node by which the longer one leaves the shorter one. That is
enough to find the node of a prefix that comes back, without hashes and without comparing labels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Survivors:
    """The K prefixes that survive a frame, (B, K) each.

    Attributes:
        source: the slot that it was in, or that it was grown from.
        label: what it was grown by.
        grown: whether it is the source and one more label, or else the source itself.
        alive: False where there is no prefix.
    """

    source: Tensor
    label: Tensor
    grown: Tensor
    alive: Tensor


class PrefixTree:
    """K slots for each of B utterances, the first holding the empty prefix, the others none.

    Args:
        batch: B.
        beam: K.
        frames: how often `advance` will be called at most.
        blank_id: what `last` shows for the empty prefix.
        device: of all tensors.

    Attributes:
        last: (B, K) the last label.
        length: (B, K) labels.
        parent: (B, K) the slot of the prefix without its last label, -1 if that is not in the beam.
    """

    def __init__(self, *, batch: int, beam: int, frames: int, blank_id: int, device: torch.device) -> None:
        self.batch, self.beam = batch, beam
        self.length = torch.zeros((batch, beam), dtype=torch.int64, device=device)
        self.last = self.length + blank_id
        self.parent = self.length - 1
        self._node = self.length
        self._toward = torch.full((batch, beam, beam), -1, dtype=torch.int64, device=device)  # [j, k] is -1 unless k continues j
        # Node 0 is the empty prefix, and slot k of the frame t that is next may make node 1 + t * beam + k.
        self._next = 1 + torch.arange(beam, device=device)
        self._above = torch.zeros((batch, 1 + frames * beam), dtype=torch.int64, device=device)
        self._label = torch.full_like(self._above, blank_id)

    def advance(self, new: Survivors) -> None:
        """Puts the survivors into the slots. No two of them may be the same prefix."""
        length = self.length.gather(1, new.source)
        above = self._node.gather(1, new.source)
        node = torch.where(new.grown, self._next, above)
        self._above[:, self._next], self._label[:, self._next] = above, new.label
        self._next = self._next + self.beam

        # [j, k] for the new slots j and k: the node below j's source on the way to k's.
        toward = self._toward.gather(1, _rows(new.source)).gather(2, _columns(new.source))
        grown = new.grown.unsqueeze(2)
        label = self._label.gather(1, toward.clamp(min=0).flatten(1)).view_as(toward)
        back = grown & (toward >= 0) & (label == new.label.unsqueeze(2))  # j is a prefix that came back, and k begins with it
        if back.any():
            node = torch.where(back.any(dim=2), toward.masked_fill(~back, -1).amax(dim=2), node)
            steps = (length.unsqueeze(1) - length.unsqueeze(2) - 2).masked_fill(~back, 0)
            below = self._climb(above.unsqueeze(1).expand_as(toward), steps)
            toward = torch.where(grown, torch.where(back, below, -1), toward)
        else:
            toward = toward.masked_fill(grown, -1)
        # What was grown from a prefix that stays is one label behind it.
        continues = ~grown & new.grown.unsqueeze(1) & (new.source.unsqueeze(2) == new.source.unsqueeze(1))
        toward = torch.where(continues, node.unsqueeze(1), toward)
        self._toward = toward.masked_fill(~(new.alive.unsqueeze(2) & new.alive.unsqueeze(1)), -1)

        self._node = node
        self.length = length + new.grown
        self.last = torch.where(new.grown, new.label, self.last.gather(1, new.source))
        found, parent = (self._toward == node.unsqueeze(1)).max(dim=1)
        self.parent = torch.where(found, parent, -1)

    def _climb(self, nodes: Tensor, steps: Tensor) -> Tensor:
        """The nodes (B, K, K) so many steps closer to the root."""
        for step in range(int(steps.max())):
            higher = self._above.gather(1, nodes.flatten(1)).view_as(nodes)
            nodes = torch.where(steps > step, higher, nodes)
        return nodes

    def labels(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """The prefixes in slots (B, n): labels (B, n, U), and their lengths (B, n)."""
        length, node = self.length.gather(1, slots), self._node.gather(1, slots)
        out = torch.zeros((*slots.shape, int(length.max())), dtype=torch.int64, device=slots.device)
        for position in reversed(range(out.shape[2])):
            inside = length > position
            out[:, :, position] = self._label.gather(1, node)
            node = torch.where(inside, self._above.gather(1, node), node)
        return out, length


def _rows(slots: Tensor) -> Tensor:
    return slots.unsqueeze(2).expand(-1, -1, slots.shape[1])


def _columns(slots: Tensor) -> Tensor:
    return slots.unsqueeze(1).expand(-1, slots.shape[1], -1)
