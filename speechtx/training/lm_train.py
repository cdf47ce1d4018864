"""`lm train`: the Transformer language model's training loop, resumable bit for bit as the recogniser's is."""

from __future__ import annotations

import hashlib
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from speechtx.config.atomic import write_text
from speechtx.config.errors import TrainingError
from speechtx.config.lm import TransformerLmConfig
from speechtx.config.load import dump_config, load_config
from speechtx.data.batching import make_batches
from speechtx.experiment.language_model import WEIGHTS_FILE
from speechtx.model.language_model import TransformerLM
from speechtx.model.losses import IGNORE, decoder_targets
from speechtx.text.tokenizer import Tokenizer
from speechtx.training import distributed, prepare
from speechtx.training.checkpoint import load_checkpoint, save_checkpoint, save_weights
from speechtx.training.lm_text import LmText, read_text
from speechtx.training.monitor import Monitor
from speechtx.training.optim import build_optimizer, learning_rate
from speechtx.training.perplexity import Perplexity, measure
from speechtx.training.trainer import seed_step

# What may change between two calls that continue the same training.
MAY_CHANGE = ("epochs", "patience", "checkpoint_minutes", "max_nonfinite_steps")


def train_language_model(
    config: TransformerLmConfig, *, train: Path, dev: Path, tokenizer: Path, out: Path, ngpu: int = 0
) -> Perplexity:
    """Trains, or continues to train, one model; `model.pt` holds the weights of the epoch that predicts dev best.

    Args:
        config: the section `transformer` of `conf/lm.yaml`.
        train: data directory whose transcripts are taken where the configuration names no text.
        dev: data directory.
        tokenizer: of stage 3.
        out: the model's directory, made if it is not there.
        ngpu: 0 for the CPU, 1 for a GPU.

    Raises:
        SpeechtxError: the texts are wrong, the directory holds another model, or training cannot go on.
    """
    if ngpu > 1:
        raise TrainingError(f"--ngpu {ngpu}: a language model is trained on one GPU; give --ngpu 1")
    world = distributed.start(ngpu)
    opened = Tokenizer.load(tokenizer)
    with prepare.only_one_training(out):
        _lay_out(out, config, opened)
        texts = [_fit(read_text(config.text or (train,), opened), config.max_tokens), read_text((dev,), opened)]
        monitor = Monitor(exp=out, epochs=config.epochs, unit="tokens")
        try:
            for text in texts:
                monitor.say(str(text))
            torch.manual_seed(config.seed)
            model = TransformerLM(config=config, vocab_size=opened.vocab_size)
            number, device = sum(p.numel() for p in model.parameters()), prepare.device_name(world.device)
            monitor.say(f"language model: {number:,} parameters on {device}")
            prepare.describe_run(out, device=device, num_parameters=number, seed=config.seed, processes=1)
            trainer = LmTrainer(
                config=config, model=model, train=texts[0], dev=texts[1], out=out, device=world.device, monitor=monitor
            )
            trainer.run()
            prepare.finish_run(out, trainer.seconds)
            result = measure(out, texts[1], tokens=opened.pieces, say=monitor.say, device=world.device)
        finally:
            monitor.close()
    return result


class LmTrainer:
    """The loop; every random draw is a function of (seed, epoch, step), so that nothing but `state` must survive a kill."""

    def __init__(
        self,
        *,
        config: TransformerLmConfig,
        model: TransformerLM,
        train: LmText,
        dev: LmText,
        out: Path,
        device: torch.device,
        monitor: Monitor,
    ) -> None:
        self.config = config
        self.model = model.to(device)
        self.train_text, self.dev_text = train, dev
        self.out = out
        self.device = device
        self.monitor = monitor
        self.optimizer = build_optimizer(self.model, config.optimizer, device)
        self.text_hash, self.dev_hash = (hashlib.sha256(json.dumps(t.sentences).encode()).hexdigest() for t in (train, dev))
        self.epoch = 1  # the epoch being trained
        self.index = 0  # steps done in it
        self.step = 0  # steps done in all
        self.nonfinite = 0
        self.seconds = 0.0
        self.sums = torch.zeros(3, dtype=torch.float64)  # of the epoch: loss, targets, right ones
        self.history: list[dict[str, Any]] = []
        if device.type == "cpu":
            torch.set_flush_denormal(True)  # Adam's moments otherwise run into slow denormal arithmetic

    def run(self) -> None:
        """Trains until the epochs are done or dev has not improved for `patience` of them."""
        (self.out / "checkpoints").mkdir(exist_ok=True)
        for leftover in (self.out / "checkpoints").glob(".*.tmp"):  # a kill in the middle of a write left it
            leftover.unlink()
        self.resume()
        while self.epoch <= self.config.epochs and not self.exhausted():
            self.train_epoch()
            self.finish_epoch()

    def exhausted(self) -> bool:
        behind = len(self.history) - self.best()["epoch"] if self.history else 0
        return 0 < self.config.patience <= behind

    def best(self) -> dict[str, Any]:
        """The epoch with the lowest dev loss, the first of equals."""
        return min(self.history, key=lambda entry: entry["dev"]["loss"])

    def train_epoch(self) -> None:
        """The rest of the current epoch, from `self.index` on."""
        batches = make_batches(
            [len(ids) + 1 for ids in self.train_text.sentences],
            frames_per_batch=self.config.tokens_per_batch,
            max_utts=self.config.tokens_per_batch,
            seed=self.config.seed,
            epoch=self.epoch,
        )
        self.model.train()
        self.monitor.start_epoch(self.index)
        started = saved = time.monotonic()
        for batch in batches[self.index :]:
            lr = learning_rate(
                self.config.schedule,
                peak=self.config.optimizer.lr,
                step=self.step + 1,
                progress=(self.epoch - 1 + self.index / len(batches)) / self.config.epochs,
            )
            self.train_step(batch, lr)
            self.index += 1
            self.monitor.step(
                epoch=self.epoch,
                index=self.index,
                count=len(batches),
                amount=sum(len(self.train_text.sentences[i]) + 1 for i in batch),
                step=self.step,
                lr=lr,
                averages=averages_of(self.sums),
            )
            now = time.monotonic()
            self.seconds += now - started
            started = now
            if now - saved > 60 * self.config.checkpoint_minutes and self.index < len(batches):
                self.save()
                saved = now

    def train_step(self, batch: list[int], lr: float) -> None:
        """One optimiser step over some sentences of the training text; skipped if its gradient is not finite."""
        seed_step(self.config.seed, self.step, 0)
        loss, sums = self.forward(self.train_text, batch)
        (loss / sums[1]).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.step += 1
        if bool(torch.isfinite(norm)):
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            self.sums += sums
        else:
            self.nonfinite += 1
            self.monitor.say(f"warning: step {self.step}: gradient is not finite, step skipped ({self.nonfinite} so far)")
            if self.nonfinite > self.config.max_nonfinite_steps:
                raise TrainingError(
                    f"step {self.step}: {self.nonfinite} steps had a non-finite gradient, more than max_nonfinite_steps "
                    f"{self.config.max_nonfinite_steps}; lower transformer.optimizer.lr"
                )
        self.optimizer.zero_grad(set_to_none=True)

    def forward(self, text: LmText, batch: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The summed loss, and (loss, targets, right ones) float64 on the CPU."""
        rows = [torch.tensor(text.sentences[i]) for i in batch]
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.device)
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        tokens_in, targets = decoder_targets(tokens, lengths, sos_eos_id=self.model.vocab_size - 1)
        log_probs = self.model(tokens_in)
        loss = F.nll_loss(log_probs.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
        right = (log_probs.argmax(dim=-1) == targets).sum()
        return loss, torch.stack([loss.detach().double(), (targets != IGNORE).sum().double(), right.double()]).cpu()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss, perplexity and accuracy on dev."""
        self.model.eval()
        lengths = [len(ids) + 1 for ids in self.dev_text.sentences]
        budget = max(self.config.tokens_per_batch, *lengths)
        sums = torch.zeros_like(self.sums)
        for batch in make_batches(lengths, frames_per_batch=budget, max_utts=budget):
            sums += self.forward(self.dev_text, batch)[1]
        return averages_of(sums)

    def finish_epoch(self) -> None:
        """Books the epoch, keeps its weights if they are the best, and saves a checkpoint behind it."""
        seconds = self.seconds - sum(entry["seconds"] for entry in self.history)
        amount = self.train_text.tokens + len(self.train_text.sentences)
        entry = {
            "epoch": self.epoch,
            "step": self.step,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train": averages_of(self.sums),
            "dev": self.evaluate(),
            "seconds": seconds,
            "tokens_per_second": amount / max(seconds, 1e-9),
            "nonfinite_steps": self.nonfinite,
        }
        self.history.append(entry)
        if not math.isfinite(entry["dev"]["loss"]):
            raise TrainingError(f"epoch {self.epoch}: the loss on dev is not finite; lower transformer.optimizer.lr")
        if self.best() is entry:
            save_weights(self.out / WEIGHTS_FILE, self.model.state_dict())
        self.epoch, self.index = self.epoch + 1, 0
        self.sums.zero_()
        self.save()
        self.monitor.epoch(entry, self.history)
        if self.exhausted():
            self.monitor.say(f"dev has not improved for {self.config.patience} epochs: epoch {self.best()['epoch']} is the model")

    # ------------------------------------------------------------------------------------------------ checkpoints

    def save(self) -> None:
        state = {name: getattr(self, name) for name in _KEPT}
        save_checkpoint(
            self.out / "checkpoints", {**state, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        )

    def resume(self) -> None:
        state = load_checkpoint(self.out / "checkpoints")
        if state is None:
            return
        for name, what in (("text_hash", "trained"), ("dev_hash", "measured")):  # dev chose the best epoch so far
            if state.get(name, getattr(self, name)) != getattr(self, name):  # older checkpoints lack that of dev
                raise TrainingError(
                    f"{self.out}/checkpoints: {what} on another text; start anew (utils/steps/lm.sh --restart), or elsewhere"
                )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name in _KEPT:
            setattr(self, name, state.get(name, getattr(self, name)))
        self.monitor.write_metrics(self.history)
        self.monitor.say(f"continuing from the checkpoint at epoch {self.epoch}, step {self.index} of the epoch")


_KEPT = ("epoch", "index", "step", "nonfinite", "seconds", "sums", "history", "text_hash", "dev_hash")


def averages_of(sums: torch.Tensor) -> dict[str, float]:
    """Per token: loss in nats, perplexity, accuracy; from summed values."""
    loss, targets, right = sums.tolist()
    count = max(targets, 1.0)
    return {"loss": loss / count, "ppl": math.exp(min(loss / count, 700.0)), "acc": right / count}


def _lay_out(out: Path, config: TransformerLmConfig, tokenizer: Tokenizer) -> None:
    """Makes the directory, or checks that it holds the same training.

    Raises:
        TrainingError: another configuration or tokenizer; what differs is named.
    """
    stored = out / "config.yaml"
    if stored.is_file():
        old, new = (prepare.flatten(c.model_dump(mode="json")) for c in (load_config(stored, TransformerLmConfig), config))
        free = set(MAY_CHANGE) - ({"epochs"} if config.schedule.name == "cosine" else set())
        different = [name for name in sorted({*old, *new} - free) if old.get(name) != new.get(name)]
        if (out / "tokenizer").is_dir() and Tokenizer.load(out / "tokenizer").model_proto != tokenizer.model_proto:
            different.append("the tokenizer")
        if different:
            raise TrainingError(
                f"{out} holds a language model of another configuration ({', '.join(different)}); start anew "
                "(utils/steps/lm.sh --restart), or give another directory"
            )
    tokenizer.save(out / "tokenizer")
    write_text(stored, dump_config(config))


def _fit(text: LmText, longest: int) -> LmText:
    """Leaves out sentences that are too long to train on, and says so in the text's name."""
    keep = [len(ids) <= longest for ids in text.sentences]
    left_out = keep.count(False)
    if not left_out:
        return text
    if not any(keep):
        raise TrainingError(f"{text.name}: every sentence is longer than transformer.max_tokens {longest}")
    return text.only(keep, name=f"{text.name} (without {left_out} sentences of more than {longest} tokens)")
