"""What a person sees of training: a live line a step, a line an epoch, train.log, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from speechtx.config.atomic import write_text

LOG_EVERY_STEPS = 50
SHOW_EVERY_SECONDS = 30.0  # where there is no terminal to draw a live line on
LOGGER = logging.getLogger("speechtx")


class Monitor:
    """Progress of one training run; only the main process has one that writes.

    What other rooms log meanwhile, such as which kernel computes a penalty, is said too.

    Args:
        exp: the experiment directory.
        epochs: how many the run will have.
        enabled: False on all ranks but the first: nothing is written or shown.
        unit: what the rate counts.
        stream: where lines go; a live line is drawn only when it is a terminal.
    """

    def __init__(
        self, *, exp: Path, epochs: int, enabled: bool = True, unit: str = "frames", stream: TextIO = sys.stdout
    ) -> None:
        self.exp = exp
        self.epochs = epochs
        self.enabled = enabled
        self.unit = unit
        self.stream = stream
        self.live = enabled and stream.isatty()
        self.log = open(exp / "train.log", "a", encoding="utf-8") if enabled else None  # noqa: SIM115  # closed in close()
        self.board: Any = None  # opened by the first step
        if enabled:
            from torch.utils.tensorboard import SummaryWriter  # half a second of imports that other ranks need not pay

            self._open_board = partial(SummaryWriter, str(exp / "tensorboard"))
            self._listener = _Listener(self)
            LOGGER.addHandler(self._listener)
            LOGGER.setLevel(logging.INFO)
        self._clock = self._shown = time.monotonic()
        self._done = 0
        self._first = 0

    def say(self, message: str) -> None:
        """One line for the log and the terminal, with the time."""
        if not self.enabled or self.log is None:
            return
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}"
        self.log.write(line + "\n")
        self.log.flush()
        self.stream.write(("\r\x1b[K" if self.live else "") + line + "\n")
        self.stream.flush()
        self._shown = time.monotonic()

    def start_epoch(self, index: int) -> None:
        """Restarts the rate, so that evaluation does not count as training time; `index` steps of the epoch are done already."""
        self._clock, self._done, self._first = time.monotonic(), 0, index

    def step(
        self, *, epoch: int, index: int, count: int, amount: int, step: int, lr: float, averages: Mapping[str, float]
    ) -> None:
        """One optimiser step: `index` of `count` in this epoch, over `amount` of what the rate counts."""
        if not self.enabled or self.log is None:
            return
        if self.board is None:  # what a process that was killed wrote of this step and later ones is not to be shown twice
            self.board = self._open_board(purge_step=step)
        self._done += amount
        elapsed = max(time.monotonic() - self._clock, 1e-9)
        rate = self._done / elapsed
        remaining = (self.epochs - epoch + 1 - index / count) * elapsed * count / (index - self._first)
        line = (
            f"epoch {epoch}/{self.epochs} {index:>4}/{count} {described(averages)} lr {lr:.2e} {rate:,.0f} {self.unit}/s "
            f"ETA {clock(remaining)}"
        )
        if self.live:
            width = shutil.get_terminal_size().columns - 1  # a wrapped line could not be erased again
            self.stream.write("\r\x1b[K" + line[:width])
            self.stream.flush()
        elif time.monotonic() - self._shown > SHOW_EVERY_SECONDS:
            self.stream.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
            self.stream.flush()
            self._shown = time.monotonic()
        if step % LOG_EVERY_STEPS == 0:
            self.log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} step {step} {line}\n")
            self.log.flush()
            self.board.add_scalar("step/loss", averages["loss"], step)
            self.board.add_scalar("step/lr", lr, step)
            self.board.add_scalar(f"step/{self.unit}_per_second", rate, step)

    def epoch(self, entry: dict[str, Any], history: list[dict[str, Any]]) -> None:
        """The line of a finished epoch; metrics.jsonl is written whole from the history, so it never holds an epoch twice."""
        if not self.enabled:
            return
        train, dev = entry["train"], entry["dev"]
        left = (self.epochs - entry["epoch"]) * sum(e["seconds"] for e in history[-5:]) / len(history[-5:])
        self.say(
            f"epoch {entry['epoch']}/{self.epochs} train {described(train)} | dev {described(dev)} | lr {entry['lr']:.2e} "
            f"{entry[f'{self.unit}_per_second']:,.0f} {self.unit}/s {entry['seconds']:.0f} s, left {clock(left)}"
        )
        self.write_metrics(history)
        for part in ("train", "dev"):
            for name, value in entry[part].items():
                self.board.add_scalar(f"{part}/{name}", value, entry["epoch"])
        self.board.flush()

    def write_metrics(self, history: list[dict[str, Any]]) -> None:
        """Writes metrics.jsonl as the checkpoint knows it: a kill may have come between the two."""
        if self.enabled:
            write_text(self.exp / "metrics.jsonl", "".join(json.dumps(e) + "\n" for e in history))

    def close(self) -> None:
        if self.log is not None:
            LOGGER.removeHandler(self._listener)
            self.log.close()
        if self.board is not None:
            self.board.close()


class _Listener(logging.Handler):
    """Hands log records to a monitor."""

    def __init__(self, monitor: Monitor) -> None:
        super().__init__(logging.INFO)
        self.monitor = monitor

    def emit(self, record: logging.LogRecord) -> None:
        self.monitor.say(record.getMessage())


def described(averages: Mapping[str, float]) -> str:
    """The averages of a training in a few words: of a recogniser, or of a language model, which has a perplexity."""
    if "ppl" in averages:
        return f"loss {averages['loss']:.3f} ppl {averages['ppl']:.2f} acc {100 * averages['acc']:.2f}%"
    parts = f"(ctc {averages['ctc']:.3f} att {averages['att']:.3f})"
    return f"loss {averages['loss']:.3f} {parts} acc {100 * averages['acc']:.2f}%"


def clock(seconds: float) -> str:
    """h:mm:ss."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
