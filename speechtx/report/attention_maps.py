"""Pictures of attention: the encoder's self-attention and the decoder's cross-attention, with the penalty and without it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from torch import Tensor

from speechtx.config.atomic import replacing
from speechtx.report.attention_probe import LayerMaps, diagonality, mean_distance, shares


def prior(penalty: Tensor) -> Tensor:
    """Where a query in the middle would look if all keys matched alike: exp(-P), normalised; (H, 2S - 1) -> (H, S).

    Args:
        penalty: P at the offsets -(S - 1) .. S - 1.
    """
    length = (penalty.shape[-1] + 1) // 2
    start = length - 1 - length // 2  # offset -(S // 2), the first key as the query in the middle sees it
    return torch.softmax(-penalty[:, start : start + length], dim=-1)


def plot_maps(maps: Sequence[LayerMaps], *, title: str, frame_seconds: float, out: Path) -> None:
    """Draws one row a layer and, for each head, its map as trained beside the map without penalty; the priors below.

    Args:
        maps: of `encoder_maps`.
        title: what is shown, for example the utterance id and its transcript.
        frame_seconds: seconds from one encoder frame to the next.
        out: the PNG, replaced whole.
    """
    columns = max(_columns(layer) for layer in maps)
    seconds = maps[0].trained.shape[-1] * frame_seconds
    figure = Figure(figsize=(1.0 + 1.9 * columns, 2.4 * len(maps) + 2.2), layout="constrained")
    rows = figure.subfigures(len(maps) + 1, 1, height_ratios=[2.4] * len(maps) + [1.7], squeeze=False)[:, 0]
    for row, layer in zip(rows, maps, strict=False):
        row.suptitle(_layer_title(layer), fontsize=9)
        axes = row.subplots(1, columns, squeeze=False)[0]
        for column, axis in enumerate(axes):
            if column >= _columns(layer):
                axis.set_visible(False)
                continue
            weights, name, top = _shown(layer, column)
            _draw_map(axis, weights, top, extent=(0.0, seconds, seconds, 0.0))
            far = float(mean_distance(shares(weights[None]))[0]) * frame_seconds
            axis.set_title(f"{name}\nmean distance {far:.2f} s", fontsize=7)
            if column == 0:
                axis.set_ylabel("query (s)", fontsize=7)
            axis.set_xlabel("key (s)", fontsize=7)
    _draw_priors(rows[-1].subplots(), maps, frame_seconds)
    _save(figure, title, out)


def plot_cross_maps(maps: Sequence[LayerMaps], tokens: Sequence[str], *, title: str, frame_seconds: float, out: Path) -> None:
    """Draws the decoder's attention to the encoder: one row a layer, tokens downwards and time to the right.

    Args:
        maps: of `cross_maps`.
        tokens: (U) what each query predicts, written beside its row.
        title: what is shown.
        frame_seconds: seconds from one encoder frame to the next.
        out: the PNG, replaced whole.
    """
    columns = max(_columns(layer) for layer in maps)
    seconds = maps[0].trained.shape[-1] * frame_seconds
    height = 1.0 + max(1.2, 0.13 * len(tokens))
    figure = Figure(figsize=(1.0 + 2.6 * columns, 0.5 + height * len(maps)), layout="constrained")
    for row, layer in zip(figure.subfigures(len(maps), 1, squeeze=False)[:, 0], maps, strict=True):
        row.suptitle(f"decoder layer {layer.layer}: attention to the encoder", fontsize=9)
        axes = row.subplots(1, columns, squeeze=False)[0]
        for column, axis in enumerate(axes):
            if column >= _columns(layer):
                axis.set_visible(False)
                continue
            weights, name, top = _shown(layer, column)
            _draw_map(axis, weights, top, extent=(0.0, seconds, len(tokens), 0.0), aspect="auto")
            axis.set_title(name, fontsize=7)
            labels = [_no_formula(token) if column == 0 else "" for token in tokens]
            axis.set_yticks([i + 0.5 for i in range(len(tokens))], labels, fontsize=6)
            if column == 0:
                axis.set_ylabel("token predicted", fontsize=7)
            axis.set_xlabel("audio (s)", fontsize=7)
    _save(figure, title, out)


def _columns(layer: LayerMaps) -> int:
    return len(layer.trained) * (1 if layer.without is None else 2)


def _shown(layer: LayerMaps, column: int) -> tuple[Tensor, str, float]:
    """The weights of a column, what they are, and the top of the colour scale, which both variants of a head share."""
    if layer.without is None:
        return layer.trained[column], f"head {column}", float(layer.trained[column].max())
    head, removed = divmod(column, 2)
    weights = (layer.trained[head], layer.without[head])
    return weights[removed], f"head {head} " + ("penalty removed" if removed else "as trained"), float(torch.stack(weights).max())


def _layer_title(layer: LayerMaps) -> str:
    title = f"layer {layer.layer}: diagonality {float(diagonality(shares(layer.trained)).mean()):.2f}"
    if layer.without is not None:
        title += f", {float(diagonality(shares(layer.without)).mean()):.2f} with the penalty removed"
    return title


def _draw_map(
    axis: Axes,
    weights: Tensor,
    top: float,
    *,
    extent: tuple[float, float, float, float],
    aspect: Literal["equal", "auto"] = "equal",
) -> None:
    norm = PowerNorm(0.5, vmin=0.0, vmax=max(top, 1e-6))  # the square root shows weak weights too
    axis.imshow(weights.numpy(), origin="upper", extent=extent, norm=norm, cmap="magma", aspect=aspect, interpolation="nearest")
    axis.tick_params(labelsize=6)


def _draw_priors(axis: Axes, maps: Sequence[LayerMaps], frame_seconds: float) -> None:
    """One curve for each prior there is: layers that pay the same share theirs, and so do heads."""
    length = maps[0].trained.shape[-1]
    seconds = ((torch.arange(length) - length // 2) * frame_seconds).numpy()
    drawn: list[tuple[Tensor, list[int]]] = []
    for layer in maps:
        if layer.penalty is None:
            continue
        curves = prior(layer.penalty)
        same = next((layers for other, layers in drawn if torch.equal(other, curves)), None)
        if same is None:
            drawn.append((curves, [layer.layer]))
        else:
            same.append(layer.layer)
    for curves, layers in drawn:
        for head, curve in enumerate(curves):
            of = [f"layers {', '.join(map(str, layers))}"] if len(drawn) > 1 else []
            of += [f"head {head}"] if len(curves) > 1 else []
            axis.plot(seconds, curve.numpy(), label=", ".join(of) or "with the penalty")
    flat = torch.full((length,), 1.0 / length)
    axis.plot(seconds, flat.numpy(), color="grey", linestyle="--", label="without penalty")
    axis.set_title("prior of the penalty alone: exp(-P), normalised", fontsize=8)
    axis.set_xlabel("key's distance from the query (s)", fontsize=7)
    axis.tick_params(labelsize=6)
    axis.set_ylim(bottom=0.0)
    axis.legend(fontsize=7)


def _save(figure: Figure, title: str, out: Path) -> None:
    figure.suptitle(_no_formula(title), fontsize=10, wrap=True)
    with replacing(out, "wb") as stream:
        figure.savefig(stream, format="png", dpi=110)


def _no_formula(text: str) -> str:
    """The text as matplotlib has to be given it; between two dollars it would read a formula, and fail where there is none."""
    return text.replace("$", r"\$")
