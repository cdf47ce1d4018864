"""Checkpoints: complete, written whole or not at all, the previous one kept, and loaded without executing anything.

A checkpoint holds weights, their moving average if there is one, optimiser, gradient scaler, the position in the data (epoch,
step in the epoch), the sums of the running epoch, the history of finished epochs and the hashes of the model's configuration, of
the training set and of the dev set. Random numbers need no state: every draw in training is a function of (seed, step, position
in the step) or (seed, epoch, utterance).
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch

from speechtx.config.atomic import replacing
from speechtx.config.errors import TrainingError

log = logging.getLogger(__name__)

State = dict[str, Any]
FORMAT = 1


def save_checkpoint(directory: Path, state: State) -> None:
    """Writes `last.pt`; the checkpoint that was there before becomes `previous.pt`.

    Raises:
        TrainingError: the disk is full or not writable; the old checkpoint is untouched.
    """
    last = directory / "last.pt"
    fresh = directory / "last.pt.new"
    _save(fresh, {"format": FORMAT, **state})
    if last.exists():
        os.replace(last, directory / "previous.pt")
    os.replace(fresh, last)


def load_checkpoint(directory: Path) -> State | None:
    """The newest complete checkpoint, or None when there is none.

    A kill between the two renames of `save_checkpoint` leaves only `previous.pt` and a complete `last.pt.new`; the first that can
    be read of `last.pt`, `last.pt.new` and `previous.pt` is taken, and what could not be read is said.

    Raises:
        TrainingError: checkpoints exist, but none can be read.
    """
    problems = []
    for name in ("last.pt", "last.pt.new", "previous.pt"):
        path = directory / name
        if not path.is_file():
            continue
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as err:  # torch raises many kinds: pickle, zip, runtime errors
            problems.append(f"{path}: cannot be read: {(str(err) or type(err).__name__).splitlines()[0]}")
            continue
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            problems.append(f"{path}: not a checkpoint of this version of speechtx")
            continue
        for problem in problems:
            log.warning("warning: %s; %s is taken instead", problem, name)
        return state
    if problems:
        raise TrainingError(
            "no checkpoint can be read; remove the directory to train from the start:\n  " + "\n  ".join(problems)
        )
    return None


def save_weights(path: Path, model_state: State) -> None:
    """Writes a state dict alone, whole or not at all."""
    _save(path, {name: tensor.detach().cpu() for name, tensor in model_state.items()})


def _save(path: Path, state: State) -> None:
    try:
        with replacing(path, "wb") as stream:
            torch.save(state, stream)
    except (OSError, RuntimeError) as err:
        # RuntimeError: torch's zip writer reports a full disk this way.
        raise TrainingError(
            f"{path}: could not be written ({err}); the previous checkpoint is untouched, free some disk"
        ) from err
