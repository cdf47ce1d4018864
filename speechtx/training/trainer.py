"""The training loop: resume, epochs of steps, evaluation, checkpoints. Readable from top to bottom.

Every random draw is a function of (seed, epoch, position of the batch), never of what ran before. So a run that was killed
and started again computes the same steps as one that was not, bit for bit on a CPU with the same number of threads, and
N processes compute the same global batches as one.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from speechtx.config.errors import TrainingError
from speechtx.config.load import config_hash
from speechtx.config.schema import TrainConfig
from speechtx.data.batching import make_batches
from speechtx.data.loader import Batch, Corpus
from speechtx.model.losses import Losses
from speechtx.model.recognizer import Recognizer
from speechtx.training import worst_batch
from speechtx.training.averaging import choose_epochs, epoch_path
from speechtx.training.checkpoint import load_checkpoint, save_checkpoint, save_weights
from speechtx.training.distributed import World
from speechtx.training.ema import Ema
from speechtx.training.layers import set_up_layers
from speechtx.training.memory import naming_the_batch
from speechtx.training.monitor import Monitor
from speechtx.training.optim import build_optimizer, learning_rate
from speechtx.training.outcome import Outcome, Outcomes

SUMS = ("total", "ctc", "att", "tokens", "correct")  # what is summed over the batches of an epoch


class Trainer:
    """Trains one model on one corpus; the state that must survive a kill is exactly what `state` returns.

    Args:
        config: the whole experiment's configuration.
        model: on the CPU, freshly initialised.
        train: corpus with tokens and SpecAugment.
        dev: corpus with tokens, without SpecAugment.
        exp: the experiment directory; `checkpoints/` is made in it.
        world: this process among its peers.
        monitor: where progress goes.
    """

    def __init__(
        self, *, config: TrainConfig, model: Recognizer, train: Corpus, dev: Corpus, exp: Path, world: World, monitor: Monitor
    ) -> None:
        self.config = config
        self.train_config = config.training
        self.world = world
        self.monitor = monitor
        self.exp = exp
        self.train_corpus = train
        self.dev_corpus = dev
        self.model = model.to(world.device)
        set_up_layers(self.model, config.training)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(self.model, config.training.optimizer, world.device)
        self.ema = Ema(self.model, decay=config.training.ema.decay) if config.training.ema else None
        self.precision = choose_precision(config.training.precision, world.device)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=self.precision == torch.float16)
        self.outcomes = Outcomes(world.device)
        self.epoch = 1  # the epoch being trained
        self.index = 0  # steps done in it
        self.step = 0  # optimiser steps done in all
        self.nonfinite = 0
        self.seconds = 0.0
        self.sums = torch.zeros(len(SUMS), dtype=torch.float64)
        self.history: list[dict[str, Any]] = []
        self.phase: Callable[[str], contextlib.AbstractContextManager] = contextlib.nullcontext  # a profiler puts its clock here
        if world.device.type == "cpu":
            torch.set_flush_denormal(True)  # softmax tails and Adam's moments otherwise run into slow denormal arithmetic

    # ------------------------------------------------------------------------------------------------ the run

    def run(self) -> None:
        """Trains until the configured number of epochs is done, from the newest checkpoint if there is one.

        Raises:
            TrainingError: too many non-finite steps, a full disk, a checkpoint that is unreadable or was made with another model,
                training set or dev set.
        """
        (self.exp / "checkpoints").mkdir(exist_ok=True)
        if self.world.is_main:
            for leftover in (self.exp / "checkpoints").glob(".*.tmp"):  # a kill in the middle of a write left it
                leftover.unlink()
        self.resume()
        if self.step == 0:
            worst_batch.scan(self)
        while self.epoch <= self.train_config.epochs:
            self.train_epoch()
            self.finish_epoch(self.evaluate())
        self.world.barrier()

    def train_epoch(self) -> None:
        """The rest of the current epoch, from `self.index` on."""
        groups = self.groups()
        batches = self.load(groups[self.index :])
        self.model.train()
        self.monitor.start_epoch(self.index)
        started = saved = time.monotonic()
        for group in groups[self.index :]:
            lr = learning_rate(
                self.train_config.schedule,
                peak=self.train_config.optimizer.lr,
                step=self.step + 1,
                progress=(self.epoch - 1 + self.index / len(groups)) / self.train_config.epochs,
            )
            self.train_step(group, batches, lr)
            self.index += 1
            self.monitor.step(
                epoch=self.epoch,
                index=self.index,
                count=len(groups),
                amount=sum(self.train_corpus.utterances[i].num_frames for batch in group for i in batch),
                step=self.step,
                lr=lr,
                averages=self.averages,
            )
            now = time.monotonic()
            self.seconds += now - started
            started = now
            if now - saved > 60 * self.train_config.checkpoint_minutes and self.index < len(groups):
                self.save()
                saved = time.monotonic()

    def train_step(self, group: list[list[int]], batches: Iterator[Batch], lr: float) -> None:
        """One optimiser step over a group of batches, of which this process computes its share."""
        tokens = self.train_corpus.views * sum(len(self.train_corpus.tokens[i]) + 1 for batch in group for i in batch)
        sums = torch.zeros(len(SUMS), dtype=torch.float64, device=self.world.device)
        self.model.at_step(self.step)
        for number in range(len(self.world.share_of(group))):
            with self.phase("data wait"):
                batch = next(batches).to(self.world.device)
            with naming_the_batch(batch, save_to=self.exp / f"oom_batch{self.world.suffix}.pt", step=self.step + 1):
                sums += self.backward(batch, position=number * self.world.size + self.world.rank, tokens=tokens)
        with self.phase("synchronisation"):
            self.world.sum_gradients(self.parameters)
            self.world.sum(sums)
        with self.phase("optimiser"):
            self.scaler.unscale_(self.optimizer)
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.train_config.grad_clip)
            self.step += 1
            for parameters in self.optimizer.param_groups:
                parameters["lr"] = lr
            # The fused kernel skips the step by itself, on the device, where the gradient is not finite.
            self.optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
            if self.ema is not None:
                self.ema.update(self.step)
        for outcome in self.outcomes.send(self.step, group, norm, sums):
            self.book(outcome)

    def book(self, outcome: Outcome) -> None:
        """Adds a step to the epoch's sums.

        One whose gradient was NaN or infinite changed nothing; it is counted, named, and fatal past the limit.
        """
        if math.isfinite(outcome.norm):
            self.sums += outcome.sums
            return
        if self.scaler.is_enabled() and self.scaler.get_scale() >= 1.0:
            return  # float16 overflow: the scaler has lowered its scale
        ids = [self.train_corpus.utterances[i].id for batch in outcome.group for i in batch]
        self.nonfinite += 1
        named = ", ".join(ids[:5]) + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")
        self.monitor.say(
            f"warning: step {outcome.step}: gradient is not finite, step skipped ({self.nonfinite} so far); utterances {named}"
        )
        if self.nonfinite > self.train_config.max_nonfinite_steps:
            raise TrainingError(
                f"step {outcome.step}: {self.nonfinite} steps had a non-finite gradient, more than training.max_nonfinite_steps "
                f"{self.train_config.max_nonfinite_steps}; last utterances: {named}. Lower training.optimizer.lr, or look at them"
            )

    def evaluate(self) -> dict[str, float]:
        """Loss and teacher-forced token accuracy on the dev set, of the averaged weights if there are any."""
        with self.ema.in_place() if self.ema is not None else contextlib.nullcontext():
            return self._evaluate()

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        self.model.eval()
        self.world.share(self.model.buffers())  # BatchNorm's statistics: all judge the model that the first one saves
        lengths = [u.num_frames for u in self.dev_corpus.utterances]
        batches = make_batches(
            lengths,
            frames_per_batch=max(self.train_config.frames_per_batch, *lengths),
            max_utts=self.train_config.max_utts_per_batch,
        )
        sums = torch.zeros(len(SUMS), dtype=torch.float64, device=self.world.device)
        for batch in self.dev_corpus.batches(self.world.share_of(batches)):
            sums += summed(self.forward(batch.to(self.world.device)))
        return averages_of(self.world.sum(sums).cpu())

    def finish_epoch(self, dev: dict[str, float]) -> None:
        """Books the epoch, keeps its weights if stage 5 may want them, and saves a checkpoint behind it."""
        for outcome in self.outcomes.flush():
            self.book(outcome)
        frames = sum(u.num_frames for u in self.train_corpus.utterances)
        seconds = self.seconds - sum(e["seconds"] for e in self.history)
        entry = {
            "epoch": self.epoch,
            "step": self.step,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train": self.averages,
            "dev": dev,
            "seconds": seconds,
            "frames_per_second": frames / max(seconds, 1e-9),
            "nonfinite_steps": self.nonfinite,
        }
        self.history.append(entry)
        kept = set(choose_epochs(self.history, self.train_config.average))
        if self.world.is_main and self.epoch in kept:
            save_weights(epoch_path(self.exp, self.epoch), self.ema.values if self.ema else self.model.state_dict())
        self.epoch, self.index = self.epoch + 1, 0
        self.sums.zero_()
        self.save()
        self.monitor.epoch(entry, self.history)
        if self.world.is_main:
            for old in self.history:
                if old["epoch"] not in kept:
                    epoch_path(self.exp, old["epoch"]).unlink(missing_ok=True)

    # ------------------------------------------------------------------------------------------------ parts

    def load(self, groups: list[list[list[int]]]) -> Iterator[Batch]:
        """This process's batches of the given steps of the epoch, read ahead."""
        mine = [batch for group in groups for batch in self.world.share_of(group)]
        workers = self.train_config.loader_workers
        return self.train_corpus.at_epoch(self.epoch).batches(mine, workers=workers, pin=self.world.device.type == "cuda")

    def backward(self, batch: Batch, *, position: int, tokens: int) -> Tensor:
        """Adds one batch's gradients of the loss per token; returns its sums.

        Args:
            batch: on this process's device.
            position: in the step, which decides what is drawn.
            tokens: of the whole step, over all processes.
        """
        seed_step(self.config.seed, self.step, position)
        with self.phase("forward"):
            losses = self.forward(batch)
        with self.phase("backward"):
            self.scaler.scale(losses.total / tokens).backward()
        return summed(losses)

    def forward(self, batch: Batch) -> Losses:
        autocast: contextlib.AbstractContextManager = contextlib.nullcontext()
        if self.precision != torch.float32:
            autocast = torch.autocast(self.world.device.type, dtype=self.precision)
        with autocast:
            consistency = self.train_config.consistency if self.model.training else None
            return self.model(
                batch.feats,
                batch.feat_lens,
                batch.tokens,
                batch.token_lens,
                phones=batch.phones,
                phone_lens=batch.phone_lens,
                consistency=consistency,
            )

    def groups(self, lengths: Sequence[int] | None = None) -> list[list[list[int]]]:
        """The epoch's batches, grouped into optimiser steps: accum_steps for each process, or for all if they share batches.

        Args:
            lengths: frames of each utterance; None: as they are drawn for this epoch.
        """
        batches = make_batches(
            self.train_corpus.at_epoch(self.epoch).lengths() if lengths is None else lengths,
            frames_per_batch=self.train_config.frames_per_batch,
            max_utts=self.train_config.max_utts_per_batch,
            seed=self.config.seed,
            epoch=self.epoch,
            together=self.group_size,
        )
        return [batches[i : i + self.group_size] for i in range(0, len(batches), self.group_size)]

    @property
    def group_size(self) -> int:
        """Batches of a step, over all processes."""
        return self.world.batches_of_step(self.train_config.accum_steps)

    @property
    def averages(self) -> dict[str, float]:
        return averages_of(self.sums)

    # ------------------------------------------------------------------------------------------------ checkpoints

    @property
    def state(self) -> dict[str, Any]:
        return {
            "config_hash": config_hash(self.config.model),
            "model": self.model.state_dict(),
            "ema": self.ema.values if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "index": self.index,
            "step": self.step,
            "nonfinite": self.nonfinite,
            "seconds": self.seconds,
            "sums": self.sums,
            "history": self.history,
            "group_size": self.group_size,
            **self.hashes,
        }

    @functools.cached_property
    def hashes(self) -> dict[str, str]:
        """Of the training set and the dev set, under their names in a checkpoint."""
        return {"corpus_hash": hash_of(self.train_corpus), "dev_hash": hash_of(self.dev_corpus)}

    def save(self) -> None:
        for outcome in self.outcomes.flush():
            self.book(outcome)
        if self.world.is_main:
            save_checkpoint(self.exp / "checkpoints", self.state)
        self.world.barrier()

    def resume(self) -> None:
        state = load_checkpoint(self.exp / "checkpoints")
        if state is None:
            return
        if state["config_hash"] != config_hash(self.config.model):
            raise TrainingError(f"{self.exp}/checkpoints: made by a model of another configuration; choose another --exp")
        for name, which in (("corpus_hash", "training"), ("dev_hash", "dev")):  # older checkpoints lack one or both
            if state.get(name, self.hashes[name]) != self.hashes[name]:
                raise TrainingError(
                    f"{self.exp}/checkpoints: the {which} set is not the one this experiment began with (utterances, lengths or "
                    "tokens differ); choose another --exp, or train from nothing (utils/steps/train.sh --restart)"
                )
        if state["index"] and state["group_size"] != self.group_size:
            raise TrainingError(
                f"the checkpoint stands in the middle of epoch {state['epoch']}, with {state['group_size']} batches a step "
                f"(accum_steps times processes); continue with as many, not with {self.group_size}"
            )
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as err:
            raise TrainingError(
                f"{self.exp}/checkpoints: the newest belongs to a model of another shape ({str(err).splitlines()[-1].strip()}); "
                "choose another --exp, or train from nothing (utils/steps/train.sh --restart)"
            ) from None
        if self.ema is not None:
            self.ema.load(state["ema"])
        self.scaler.load_state_dict(state["scaler"])
        for name in ("epoch", "index", "step", "nonfinite", "seconds", "sums", "history"):
            setattr(self, name, state[name])
        self.monitor.write_metrics(self.history)
        if self.epoch > self.train_config.epochs:
            self.monitor.say(f"training of {self.train_config.epochs} epochs is complete")
        else:
            self.monitor.say(f"continuing from the checkpoint at epoch {self.epoch}, step {self.index} of the epoch")


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of automatic mixed precision; float32 means none."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def hash_of(corpus: Corpus) -> str:
    """Of what decides the batches and their targets, in every epoch."""
    return hashlib.sha256(json.dumps(corpus.rows()).encode()).hexdigest()


def seed_step(seed: int, step: int, position: int) -> None:
    """Seeds dropout for one batch: a function of where it stands, whichever process computes it."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, position]).generate_state(1, np.uint32)[0]))


def summed(losses: Losses) -> Tensor:
    """The sums of one batch in the order of SUMS, float64, on the batch's device and without waiting for it."""
    parts = (losses.total, losses.ctc, losses.att, losses.num_tokens, losses.num_correct)
    return torch.stack([part.detach().double() for part in parts])


def averages_of(sums: Tensor) -> dict[str, float]:
    """Per-token losses (nats) and token accuracy from summed values; zeros before the first batch."""
    total, ctc, att, tokens, correct = sums.tolist()
    count = max(tokens, 1.0)
    return {"loss": total / count, "ctc": ctc / count, "att": att / count, "acc": correct / count}
