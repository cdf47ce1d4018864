"""How local a trained encoder's attention is, layer by layer, and what a window would cost.

`logit_bound` is what `window: auto` asks for. It is measured on the utterances given: others may exceed it, so take data like
those to come, and more than a few.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from speechtx.attention.bound import effective_window
from speechtx.attention.site import AttentionPenalty, ramp_factor
from speechtx.config.atomic import write_text
from speechtx.model.encoder import Encoder
from speechtx.report.attention_probe import LayerMaps, diagonality, encoder_maps, mean_distance, shares

WINDOWS = (16, 32, 64, 128)  # frames to each side
EPSILON = 1e-3


@dataclass(frozen=True)
class Outside:
    """The share of attention weight farther away than a window, over queries and heads."""

    mean: float
    max: float


@dataclass(frozen=True)
class LayerLocality:
    """One layer's attention over some utterances.

    Attributes:
        layer: counted from 0.
        logit_bound: the greatest |q.k| / sqrt(d_k).
        diagonality: see `attention_probe.diagonality`, the mean over heads and all queries.
        diagonality_without: the same for the same queries and keys with this layer's penalty removed; None if it pays none.
        mean_distance: in encoder frames, the mean over heads and all queries.
        outside: by window, in encoder frames.
        certified: frames of the window that provably cuts off at most EPSILON if logits stay within logit_bound; None: none does.
        why: none does.
    """

    layer: int
    logit_bound: float
    diagonality: float
    diagonality_without: float | None
    mean_distance: float
    outside: dict[int, Outside]
    certified: int | None
    why: str


@dataclass
class _Sums:
    """What one layer adds up, over queries (means of heads)."""

    queries: int = 0
    logit_bound: float = 0.0
    diagonality: float = 0.0
    diagonality_without: float = 0.0
    distance: float = 0.0
    outside: dict[int, float] = field(default_factory=lambda: dict.fromkeys(WINDOWS, 0.0))
    most: dict[int, float] = field(default_factory=lambda: dict.fromkeys(WINDOWS, 0.0))

    def add(self, maps: LayerMaps) -> None:
        weights = shares(maps.trained)
        length = weights.shape[-1]
        self.queries += length
        self.logit_bound = max(self.logit_bound, maps.max_logit)
        self.diagonality += float(diagonality(weights).mean()) * length
        if maps.without is not None:
            self.diagonality_without += float(diagonality(shares(maps.without)).mean()) * length
        self.distance += float(mean_distance(weights).mean()) * length
        for window in WINDOWS:
            beyond = mass_outside(weights, window)
            self.outside[window] += float(beyond.mean()) * length
            self.most[window] = max(self.most[window], float(beyond.max()))


def mass_outside(weights: Tensor, window: int) -> Tensor:
    """Of each query, the weight of keys farther than `window`: weights (H, S, S) -> (H, S)."""
    position = torch.arange(weights.shape[-1])
    far = (position[:, None] - position[None, :]).abs() > window
    return weights.masked_fill(~far, 0.0).sum(dim=-1)


def measure(encoder: Encoder, utterances: Iterable[Tensor], layers: Sequence[int] | None = None) -> list[LayerLocality]:
    """Measures the layers over utterances.

    Args:
        encoder: in eval mode.
        utterances: normalised features (T, F), at least one.
        layers: which, counted from 0; None for all.

    Raises:
        ExperimentError: a layer the encoder does not have.
    """
    sums: dict[int, _Sums] = {}
    for feats in utterances:
        for maps in encoder_maps(encoder, feats, layers):
            sums.setdefault(maps.layer, _Sums()).add(maps)
    return [_locality(encoder, layer, total) for layer, total in sums.items()]


def _locality(encoder: Encoder, layer: int, total: _Sums) -> LayerLocality:
    site = encoder.attention_penalty
    if encoder.config.attention_weights == "softmax":
        certified, why = certified_window(site, layer, total.logit_bound)
    else:
        certified, why = None, "attention_weights: relu share nothing out, the bound is softmax's"
    return LayerLocality(
        layer=layer,
        logit_bound=total.logit_bound,
        diagonality=total.diagonality / total.queries,
        diagonality_without=total.diagonality_without / total.queries if layer in site.layers else None,
        mean_distance=total.distance / total.queries,
        outside={window: Outside(total.outside[window] / total.queries, total.most[window]) for window in WINDOWS},
        certified=certified,
        why=why,
    )


@torch.no_grad()
def certified_window(site: AttentionPenalty, layer: int, logit_bound: float) -> tuple[int | None, str]:
    """The window, in frames, that a layer's penalty proves to cut off at most EPSILON; or None and why there is none."""
    if layer not in site.layers:
        return None, "this layer pays no penalty"
    if len(site.config.selected_heads(site.num_heads)) < site.num_heads:
        return None, f"only heads {list(site.config.selected_heads(site.num_heads))} pay"
    strength = site.strength(layer)
    if site.config.ramp is not None:
        strength = strength * ramp_factor(site.config.ramp, site.get_buffer("steps"))
    try:
        window = effective_window(site.config, strength, logit_bound=logit_bound, epsilon=EPSILON, spacing=site.spacing)
    except ValueError as err:
        return None, str(err).removeprefix("no window bounds what attention loses: ")
    return round(window / site.spacing), ""


def format_table(layers: Sequence[LayerLocality], *, frame_seconds: float) -> str:
    """The table that is printed: Markdown, a row a layer, shares of the weight in percent as mean / maximum."""
    heads = ["layer", "logit_bound", "diagonality", "penalty removed", "mean distance"]
    heads += [f"beyond {window} frames ({window * frame_seconds:.2g} s)" for window in WINDOWS] + [f"certified, {EPSILON:g}"]
    rows = [
        [
            str(row.layer),
            f"{row.logit_bound:.1f}",
            f"{row.diagonality:.3f}",
            "" if row.diagonality_without is None else f"{row.diagonality_without:.3f}",
            f"{row.mean_distance:.1f} ({row.mean_distance * frame_seconds:.2f} s)",
            *(f"{100 * share.mean:.2f} / {100 * share.max:.1f} %" for share in row.outside.values()),
            "none" if row.certified is None else f"{row.certified} frames",
        ]
        for row in layers
    ]
    widths = [max(len(line[column]) for line in (heads, *rows)) for column in range(len(heads))]
    lines = [
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in (heads, *rows)
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|")
    reasons: dict[str, list[int]] = {}
    for row in layers:
        if row.why:
            reasons.setdefault(row.why, []).append(row.layer)
    return "\n".join(lines + [f"no certified window in layers {', '.join(map(str, of))}: {why}" for why, of in reasons.items()])


def write_json(layers: Sequence[LayerLocality], *, utterances: int, frame_seconds: float, out: Path) -> None:
    """Everything measured, for other programs; shares as numbers from 0 to 1."""
    content = {
        "utterances": utterances,
        "frame_seconds": frame_seconds,
        "epsilon": EPSILON,
        "layers": [asdict(layer) for layer in layers],
    }
    write_text(out, json.dumps(content, indent=2) + "\n")
