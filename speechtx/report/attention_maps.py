"""Pictures of the encoder's self-attention, with the trained penalty and with it taken away."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from torch import Tensor, nn

from speechtx.attention.multihead import SelfAttention
from speechtx.attention.penalty import build_bias, penalty
from speechtx.config.atomic import replacing
from speechtx.config.errors import ExperimentError
from speechtx.config.schema import PenaltyConfig
from speechtx.model.encoder import Encoder


@dataclass(frozen=True)
class LayerMaps:
    """Attention weights of one layer for one utterance: (H, S, S), rows are queries.

    Attributes:
        layer: counted from 1.
        trained: as the model computes them.
        without: of the same queries and keys, the penalty taken away in this layer only; None if the model has no penalty.
    """

    layer: int
    trained: Tensor
    without: Tensor | None


@torch.no_grad()
def encoder_maps(encoder: Encoder, feats: Tensor, layers: Sequence[int] | None = None) -> list[LayerMaps]:
    """The attention weights of one utterance.

    The fused kernels never hold the weights, so each layer's input is noted by a hook during an ordinary forward pass, and the
    weights are computed from it the plain way; the model itself knows nothing of this.

    Args:
        encoder: in eval mode.
        feats: (T, F) normalised features.
        layers: which, counted from 1; None for all.

    Raises:
        ExperimentError: a layer the encoder does not have.
    """
    count = len(encoder.layers)
    wanted = list(range(1, count + 1)) if layers is None else list(layers)
    if wrong := [layer for layer in wanted if not 1 <= layer <= count]:
        raise ExperimentError(f"layers {wrong} do not exist; this encoder has layers 1 to {count}")
    attentions = {layer: cast(SelfAttention, encoder.layers[layer - 1].attn) for layer in wanted}
    inputs: dict[int, Tensor] = {}
    hooks = [module.register_forward_pre_hook(partial(_note, inputs, layer)) for layer, module in attentions.items()]
    try:
        encoder(feats.unsqueeze(0), torch.tensor([len(feats)], device=feats.device))
    finally:
        for hook in hooks:
            hook.remove()
    maps = []
    for layer, module in attentions.items():
        x = inputs[layer]
        bias = build_bias(encoder.penalty, length=x.shape[1], num_heads=encoder.num_heads, device=x.device)
        without = None if bias is None else module.weights(x)[0].cpu()
        maps.append(LayerMaps(layer, module.weights(x, bias=bias)[0].cpu(), without))
    return maps


def _note(inputs: dict[int, Tensor], layer: int, module: nn.Module, args: tuple[Any, ...]) -> None:
    inputs[layer] = args[0]


def mean_distance(weights: Tensor) -> Tensor:
    """How far each head looks: the mean over queries of sum_j a_ij |i - j|, in frames; weights (H, S, S) -> (H,)."""
    position = torch.arange(weights.shape[-1])
    return (weights * (position[:, None] - position[None, :]).abs()).sum(dim=-1).mean(dim=-1)


def prior(config: PenaltyConfig, length: int, num_heads: int) -> Tensor:
    """Where a query in the middle would look if all keys matched alike: exp(-P(d)), normalised; (1 or H, length)."""
    distance = (torch.arange(length) - length // 2).abs()
    return torch.softmax(-penalty(config, distance, num_heads=num_heads), dim=-1)


def plot_maps(maps: Sequence[LayerMaps], config: PenaltyConfig, *, title: str, frame_seconds: float, out: Path) -> None:
    """Draws one row a layer and, for each head, its map as trained beside the map without penalty; the prior below.

    Args:
        maps: of `encoder_maps`.
        config: the penalty of the model.
        title: what is shown, for example the utterance id and its transcript.
        frame_seconds: seconds from one encoder frame to the next.
        out: the PNG, replaced whole.
    """
    heads, length = maps[0].trained.shape[:2]
    variants = 1 if maps[0].without is None else 2
    columns = heads * variants
    rows = len(maps) + 1
    figure = Figure(figsize=(1.0 + 1.9 * columns, 1.2 + 2.1 * rows), layout="constrained")
    grid = figure.add_gridspec(rows, columns)
    for row, layer in enumerate(maps):
        for head in range(heads):
            shown = [layer.trained[head]] if layer.without is None else [layer.trained[head], layer.without[head]]
            top = float(torch.stack(shown).max())
            for variant, weights in enumerate(shown):
                axis = figure.add_subplot(grid[row, head * variants + variant])
                _draw_map(axis, weights, top, length * frame_seconds)
                name = ("as trained", "penalty removed")[variant] if variants == 2 else ""
                far = float(mean_distance(weights[None])[0]) * frame_seconds
                axis.set_title(f"head {head + 1} {name}\nmean distance {far:.2f} s", fontsize=7)
                if head == 0 and variant == 0:
                    axis.set_ylabel(f"layer {layer.layer}\nquery (s)", fontsize=8)
                if row == len(maps) - 1:
                    axis.set_xlabel("key (s)", fontsize=7)
    _draw_prior(figure.add_subplot(grid[rows - 1, :]), config, length, heads, frame_seconds)
    figure.suptitle(title, fontsize=10, wrap=True)
    with replacing(out, "wb") as stream:
        figure.savefig(stream, format="png", dpi=110)


def _draw_map(axis: Axes, weights: Tensor, top: float, seconds: float) -> None:
    # The square root shows weak weights too; both variants of a head share their scale.
    norm = PowerNorm(0.5, vmin=0.0, vmax=max(top, 1e-6))
    axis.imshow(weights.numpy(), origin="upper", extent=(0.0, seconds, seconds, 0.0), norm=norm, cmap="magma", aspect="equal")
    axis.tick_params(labelsize=6)


def _draw_prior(axis: Axes, config: PenaltyConfig, length: int, heads: int, frame_seconds: float) -> None:
    curves = prior(config, length, heads)
    seconds = (torch.arange(length) - length // 2) * frame_seconds
    for head, curve in enumerate(curves):
        label = f"penalty {config.shape}" + ("" if len(curves) == 1 else f", head {head + 1}")
        axis.plot(seconds.numpy(), curve.numpy(), label=label)
    flat = torch.full((length,), 1.0 / length)
    if config.shape != "none":
        axis.plot(seconds.numpy(), flat.numpy(), color="grey", linestyle="--", label="no penalty")
    axis.set_title("prior of the penalty alone: exp(-P(d)), normalised", fontsize=8)
    axis.set_xlabel("distance from the query (s)", fontsize=7)
    axis.tick_params(labelsize=6)
    axis.set_ylim(bottom=0.0)
    axis.legend(fontsize=7)
