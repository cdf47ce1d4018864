"""Stage 5: the mean of the weights of the best (or last) epochs, as Kaldi's nnet combination and ESPnet's model averaging do."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from speechtx.config.atomic import write_text
from speechtx.config.errors import ExperimentError
from speechtx.config.schema import AverageConfig
from speechtx.training.checkpoint import save_weights


def choose_epochs(history: list[dict[str, Any]], config: AverageConfig) -> list[int]:
    """The epochs to average, best first; `history` has one entry an epoch with "epoch" and "dev" {"acc", "loss"}."""
    keys = {
        "dev_acc": lambda entry: (-entry["dev"]["acc"], -entry["epoch"]),
        "dev_loss": lambda entry: (math.isnan(entry["dev"]["loss"]), entry["dev"]["loss"], -entry["epoch"]),
        "last": lambda entry: -entry["epoch"],
    }
    return [entry["epoch"] for entry in sorted(history, key=keys[config.by])[: config.num]]


def epoch_path(exp: Path, epoch: int) -> Path:
    return exp / "checkpoints" / f"epoch-{epoch:04d}.pt"


def average_checkpoints(exp: Path, config: AverageConfig) -> list[int]:
    """Writes `model.pt` and `average.json`; returns the epochs averaged, in order.

    Raises:
        ExperimentError: no finished epoch, a chosen epoch's weights are missing, or shapes disagree.
    """
    metrics = exp / "metrics.jsonl"
    if not metrics.is_file():
        raise ExperimentError(f"{metrics}: missing; no epoch has been trained yet (stage train)")
    history = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    epochs = sorted(choose_epochs(history, config))
    total: dict[str, torch.Tensor] = {}
    kinds: dict[str, torch.dtype] = {}
    for epoch in epochs:
        path = epoch_path(exp, epoch)
        if not path.is_file():
            raise ExperimentError(
                f"{path}: missing, though epoch {epoch} is among the best {len(epochs)} by {config.by}; training keeps only the "
                "epochs that its own training.average may choose, so train again with the new one"
            )
        state = torch.load(path, map_location="cpu", weights_only=True)
        if total and {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in total.items()}:
            raise ExperimentError(f"{path}: weights of another shape than epoch {epochs[0]}'s")
        for name, tensor in state.items():
            kinds[name] = tensor.dtype
            total[name] = total.get(name, torch.zeros_like(tensor, dtype=torch.float64)) + tensor.double()
    save_weights(exp / "model.pt", {name: (sum_ / len(epochs)).to(kinds[name]) for name, sum_ in total.items()})
    chosen = {entry["epoch"]: entry["dev"] for entry in history if entry["epoch"] in epochs}
    report = {"by": config.by, "num": config.num, "epochs": epochs, "dev": {str(e): chosen[e] for e in epochs}}
    write_text(exp / "average.json", json.dumps(report, indent=1) + "\n")
    return epochs
