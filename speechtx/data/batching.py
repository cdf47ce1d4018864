"""Which utterances go into which batch: a pure function of lengths, seed and epoch, so that any position can be resumed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def make_batches(
    lengths: Sequence[int], *, frames_per_batch: int, max_utts: int, seed: int | None = None, epoch: int = 0, together: int = 1
) -> list[list[int]]:
    """Groups utterances of similar length so that padded frames stay within a budget.

    Args:
        lengths: frames of each utterance.
        frames_per_batch: upper limit of (utterances in the batch) * (its longest utterance), padding included.
        max_utts: upper limit of utterances in a batch.
        seed: None keeps the order by length (longest first: memory trouble shows at once); a number draws new
            neighbours and a new order of the batches for each (seed, epoch).
        epoch: which epoch's shuffle.
        together: so many batches of similar lengths follow each other, which are the batches of one step: processes that
            compute one each then wait little for the slowest. What is left over stands at the end.

    Returns:
        Lists of indices into `lengths`; each index occurs exactly once.

    Raises:
        ValueError: an utterance alone exceeds `frames_per_batch`.
    """
    size = np.asarray(lengths, dtype=np.int64)
    if size.size and int(size.max()) > frames_per_batch:
        worst = int(size.argmax())
        raise ValueError(f"utterance {worst} has {lengths[worst]} frames, more than frames_per_batch {frames_per_batch}")
    if seed is None:
        order = np.argsort(-size, kind="stable")
        return _cut(order, size, frames_per_batch, max_utts)
    rng = np.random.default_rng([seed, epoch])
    # Lengths jittered by up to 10 % give each epoch different neighbours at little cost in padding.
    order = np.argsort(size * rng.uniform(0.9, 1.1, size.size), kind="stable")
    batches = _cut(order, size, frames_per_batch, max_utts)
    whole = len(batches) // together
    shuffled = [batches[place * together + i] for place in rng.permutation(whole) for i in range(together)]
    return shuffled + batches[whole * together :]


def _cut(order: np.ndarray, size: np.ndarray, frames_per_batch: int, max_utts: int) -> list[list[int]]:
    batches: list[list[int]] = []
    current: list[int] = []
    longest = 0
    for index in order.tolist():
        grown = max(longest, int(size[index]))
        if current and (len(current) == max_utts or grown * (len(current) + 1) > frames_per_batch):
            batches.append(current)
            current, grown = [], int(size[index])
        current.append(index)
        longest = grown
    if current:
        batches.append(current)
    return batches
