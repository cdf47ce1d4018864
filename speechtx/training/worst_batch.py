"""Before the first step: does the batch that needs most memory fit?

The batches that could be it take one forward and backward pass each, and leave no trace: random draws are seeded anew at every
batch, gradients are dropped, and running statistics put back. Batches are never made smaller silently, since that is another
training: what does not fit is refused, with the size that would.
"""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from speechtx.config.errors import TrainingError
from speechtx.data.loader import Batch
from speechtx.model.memory import is_out_of_memory
from speechtx.training.memory import ADVICE, peak_memory, reset_peak, shape_of, total_memory

if TYPE_CHECKING:
    from speechtx.training.trainer import Trainer


def worst_batches(trainer: Trainer) -> list[dict[int, int]]:
    """The batches with the most padded frames, the most padded tokens and the longest utterance, without duplicates.

    A batch is the frames of its utterances by their index. Where the tempo changes, it is made of others in every epoch: the
    longest of all if everybody speaks as slowly as can be drawn, the one with most tokens if as fast. Joined utterances are
    those of the coming epoch.
    """
    corpus = trainer.train_corpus.at_epoch(trainer.epoch)
    slow, fast = [most for _, most in corpus.spans], [fewest for fewest, _ in corpus.spans]
    slow_batches, fast_batches = _batches_at(trainer, slow), _batches_at(trainer, fast)
    if not slow_batches or not fast_batches:  # more processes than batches
        return []
    tokens = [len(ids) for ids in corpus.tokens]
    worst = (
        max(slow_batches, key=lambda batch: (len(batch) * max(batch.values()), max(batch.values()))),
        max(fast_batches, key=lambda batch: len(batch) * max(tokens[i] for i in batch)),
        max(slow_batches, key=lambda batch: max(batch.values())),
    )
    return [batch for number, batch in enumerate(worst) if batch not in worst[:number]]


def _batches_at(trainer: Trainer, lengths: list[int]) -> list[dict[int, int]]:
    """This process's batches of the epoch if its utterances had these lengths."""
    shares = [batch for group in trainer.groups(lengths) for batch in trainer.world.share_of(group)]
    return [{index: lengths[index] for index in batch} for batch in shares]


def scan(trainer: Trainer) -> None:
    """Reports the peak memory of the worst batches that can come, with the joined utterances of the coming epoch.

    Raises:
        TrainingError: one does not fit; the message names how many of its utterances would.
    """
    device = trainer.world.device
    buffers = {name: buffer.clone() for name, buffer in trainer.model.named_buffers()}
    # Adam keeps two numbers for each parameter from the first step on.
    ballast = [torch.ones_like(parameter) for parameter in trainer.parameters for _ in range(2)]
    trainer.model.train()
    trainer.model.at_step(trainer.step)
    encoder = trainer.model.encoder
    rates, encoder.depth_rates = encoder.depth_rates, [0.0] * len(encoder.depth_rates)  # a draw may leave all layers in
    try:
        for frames in worst_batches(trainer):
            batch = load(trainer, frames)
            reset_peak(device)
            if not fits(trainer, batch):
                raise _too_large(trainer, frames, batch)
            trainer.monitor.say(
                f"memory: {shape_of(batch)} need {peak_memory(device):.2f} of {total_memory(device):.1f} GiB at their peak"
            )
    finally:
        del ballast
        encoder.depth_rates = rates
        with torch.no_grad():
            for name, buffer in trainer.model.named_buffers():
                buffer.copy_(buffers[name])


def load(trainer: Trainer, frames: dict[int, int]) -> Batch:
    """The batch, padded or cut to these frames; what it is filled up with needs as much memory."""
    batch = trainer.train_corpus.at_epoch(trainer.epoch).batch(list(frames))
    lengths = torch.tensor(list(frames.values()) * trainer.train_corpus.views)
    if torch.equal(lengths, batch.feat_lens):
        return batch
    feats = F.pad(batch.feats, (0, 0, 0, int(lengths.max()) - batch.feats.shape[1]))
    return replace(batch, feats=feats, feat_lens=lengths)


def fits(trainer: Trainer, batch: Batch) -> bool:
    """Whether a forward and a backward pass of the batch find enough memory; gradients are dropped."""
    try:
        trainer.backward(batch.to(trainer.world.device), position=0, tokens=1)
        enough = True
    except (RuntimeError, MemoryError) as err:
        if not is_out_of_memory(err):
            raise
        enough = False
    trainer.optimizer.zero_grad(set_to_none=True)
    if not enough:
        gc.collect()
        if trainer.world.device.type == "cuda":
            torch.cuda.empty_cache()
    return enough


def _too_large(trainer: Trainer, frames: dict[int, int], batch: Batch) -> TrainingError:
    """Finds by bisection how many utterances of a batch fit, its longest ones, since others may be as long in another batch."""
    by_length = sorted(frames.items(), key=lambda item: item[1], reverse=True)
    most, too_many = 0, len(by_length)
    while too_many - most > 1:
        middle = (most + too_many) // 2
        if fits(trainer, load(trainer, dict(by_length[:middle]))):
            most = middle
        else:
            too_many = middle
    device = trainer.world.device
    index, longest = by_length[0]
    begin = f"not enough memory on {device} ({total_memory(device):.1f} GiB): a batch of {shape_of(batch)} does not fit"
    if most == 0:
        return TrainingError(
            f"{begin}, nor does its longest utterance alone ({trainer.train_corpus.utterances[index].id}, {longest} frames): "
            "lower training.max_frames, set training.gradient_checkpointing: true, or look at what else uses the memory"
        )
    shares = trainer.world.parts_of_batch(trainer.train_config.accum_steps)  # this batch may be a part of a larger one
    enough = (shares * (most - 1) + 1) * longest  # no share then has more than `most`
    return TrainingError(
        f"{begin}, but {most} of them do: set training.frames_per_batch to {enough} or less, now "
        f"{trainer.train_config.frames_per_batch}. Otherwise {ADVICE}"
    )
