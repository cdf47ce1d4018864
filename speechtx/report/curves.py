"""Training curves as a picture, from metrics.jsonl (one object an epoch)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from speechtx.config.atomic import replacing
from speechtx.config.errors import ExperimentError

TRAIN: dict[str, Any] = {"color": "#7a7a7a", "linestyle": "--"}
DEV: dict[str, Any] = {"color": "#0b5fa5", "linestyle": "-"}


def plot_curves(metrics: Path, out: Path) -> None:
    """Draws train and dev loss, their parts, token accuracy and learning rate against the epoch.

    Args:
        metrics: metrics.jsonl of an experiment: one JSON object a line with epoch, lr, train and dev, the last two with loss,
            ctc, att (nats per token) and acc (0 to 1).
        out: the PNG, replaced whole.

    Raises:
        ExperimentError: there is no such file, it holds no epoch, or a line is not what the trainer writes.
    """
    epochs = read_metrics(metrics)
    attention = any(epoch["dev"]["att"] for epoch in epochs)
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    _losses(axes[0, 0], epochs)
    _parts(axes[0, 1], epochs, ("ctc", "att") if attention else ("ctc",))
    _accuracy(axes[1, 0], epochs, attention)
    _rate(axes[1, 1], epochs)
    for axis in axes.flat:
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(f"{metrics.resolve().parent.name}: {len(epochs)} epochs, {epochs[-1]['step']:,} steps")
    with replacing(out, "wb") as stream:
        figure.savefig(stream, format="png", dpi=120)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The epochs of metrics.jsonl, in order; errors as in `plot_curves`."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise ExperimentError(f"{path}: missing; the first epoch of stage train writes it") from None
    epochs = []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            numbers = [entry["epoch"], entry["step"], entry["lr"]]
            numbers += [entry[part][name] for part in ("train", "dev") for name in ("loss", "ctc", "att", "acc")]
        except (ValueError, KeyError, TypeError) as err:
            raise ExperimentError(f"{path}:{number}: not an epoch as stage train writes it: {err!r}") from None
        if not all(isinstance(value, int | float) for value in numbers):
            raise ExperimentError(f"{path}:{number}: not an epoch as stage train writes it: expected numbers, found {numbers}")
        epochs.append(entry)
    if not epochs:
        raise ExperimentError(f"{path}: holds no epoch yet")
    return epochs


def _series(axis: Axes, epochs: Sequence[dict[str, Any]], part: str, name: str, label: str, **style: Any) -> None:
    style.setdefault("marker", "." if len(epochs) < 40 else None)
    axis.plot([e["epoch"] for e in epochs], [e[part][name] for e in epochs], label=label, **style)


def _log_scale(axis: Axes) -> None:
    """Ticks at 1, 2 and 5 of each decade: few enough not to overlap over several decades."""
    axis.set(ylabel="nats per token", yscale="log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter("{x:g}")


def _losses(axis: Axes, epochs: Sequence[dict[str, Any]]) -> None:
    _series(axis, epochs, "train", "loss", "train (with dropout, SpecAugment)", **TRAIN)
    _series(axis, epochs, "dev", "loss", "dev", **DEV)
    axis.set_title("joint loss")
    _log_scale(axis)
    axis.legend()


def _parts(axis: Axes, epochs: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    titles = {"ctc": "CTC", "att": "attention"}
    colors = {"ctc": "#b3541e", "att": "#3a7d44"}
    for name in names:
        _series(axis, epochs, "train", name, f"{titles[name]}, train", color=colors[name], linestyle="--")
        _series(axis, epochs, "dev", name, f"{titles[name]}, dev", color=colors[name])
    axis.set_title("parts of the loss")
    _log_scale(axis)
    axis.legend()


def _accuracy(axis: Axes, epochs: Sequence[dict[str, Any]], attention: bool) -> None:
    axis.set(title="token accuracy, right prefix given", ylabel="%")
    if not attention:
        axis.text(0.5, 0.5, "no decoder", ha="center", va="center", transform=axis.transAxes)
        return
    for part, style in (("train", TRAIN), ("dev", DEV)):
        axis.plot([e["epoch"] for e in epochs], [100 * e[part]["acc"] for e in epochs], label=part, **style)
    best = max(epochs, key=lambda e: e["dev"]["acc"])
    axis.plot(best["epoch"], 100 * best["dev"]["acc"], "o", color=DEV["color"])
    axis.set_ylim(top=101)
    axis.legend(title=f"best dev: {100 * best['dev']['acc']:.2f} % in epoch {best['epoch']}", loc="lower right")


def _rate(axis: Axes, epochs: Sequence[dict[str, Any]]) -> None:
    axis.plot([e["epoch"] for e in epochs], [e["lr"] for e in epochs], color="#5b3a8c")
    axis.set(title="learning rate at the epoch's end", ylabel="learning rate")
    axis.set_ylim(bottom=0)
