"""The attention weights of one utterance in a trained model, as it computes them and with the penalty taken away.

The fused kernels never hold the weights, so hooks note what each attention module is given during an ordinary forward pass, and
the weights are computed from that the plain way; the model itself knows nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from speechtx.attention.kernels import attention_weights, dense_bias
from speechtx.attention.multihead import CrossAttention, SelfAttention, split_heads
from speechtx.attention.site import AttentionPenalty
from speechtx.config.errors import ExperimentError
from speechtx.model.encoder import Encoder
from speechtx.model.recognizer import Recognizer


@dataclass(frozen=True)
class LayerMaps:
    """Attention weights of one layer for one utterance, on the CPU: (H, U, S), rows are queries.

    Attributes:
        layer: counted from 0.
        trained: as the model computes them. Rows sum to 1, except with `attention_weights: relu`.
        without: of the same queries and keys, the penalty taken away in this layer only; None if the layer pays none.
        max_logit: the greatest |q.k| / sqrt(d_k) of the utterance (with the logits of relative positions), a certificate's B.
        penalty: (1 or H, 2S - 1) P by offset -(S - 1) .. S - 1, of self-attention that pays; else None.
    """

    layer: int
    trained: Tensor
    without: Tensor | None
    max_logit: float
    penalty: Tensor | None = None


@torch.no_grad()
def encoder_maps(encoder: Encoder, feats: Tensor, layers: Sequence[int] | None = None) -> list[LayerMaps]:
    """The encoder's self-attention.

    Args:
        encoder: in eval mode.
        feats: (T, F) normalised features.
        layers: which, counted from 0; None for all.

    Raises:
        ExperimentError: a layer the encoder does not have.
    """
    wanted = _existing(layers, len(encoder.layers), "encoder")
    modules = {layer: cast(SelfAttention, encoder.layers[layer].attn) for layer in wanted}
    with _noted(modules) as calls:
        encoder(feats.unsqueeze(0), torch.tensor([len(feats)], device=feats.device))
    site = encoder.attention_penalty
    maps = []
    for layer, module in modules.items():
        (x,), bias = calls[layer][0], calls[layer][1]["bias"]
        pays = layer in site.layers
        maps.append(
            LayerMaps(
                layer,
                module.weights(x, bias=bias)[0].cpu(),
                module.weights(x)[0].cpu() if pays else None,
                _max_own_logit(module, x),
                penalty_by_offset(site, layer, x.shape[1]) if pays else None,
            )
        )
    return maps


@torch.no_grad()
def cross_maps(model: Recognizer, feats: Tensor, tokens: Sequence[int], layers: Sequence[int] | None = None) -> list[LayerMaps]:
    """The decoder's attention to the encoder, fed with the transcript; row i predicts token i, the last row <eos>.

    A decoder of type mask_ctc has no last row, and predicts all tokens at once, each of them hidden.

    Args:
        model: in eval mode.
        feats: (T, F) normalised features.
        tokens: of the transcript, without <sos/eos>.
        layers: of the decoder, counted from 0; None for all.

    Raises:
        ExperimentError: there is no decoder, or not that layer, or nothing that it predicts.
    """
    if model.decoder is None:
        raise ExperimentError("this model has no decoder (decoder.layers 0), so there is no cross-attention to look at")
    if not tokens and not model.decoder.causal:
        raise ExperimentError("the transcript is empty, so a decoder of type mask_ctc predicts nothing to look at")
    wanted = _existing(layers, len(model.decoder.layers), "decoder")
    modules = {layer: cast(CrossAttention, model.decoder.layers[layer].cross) for layer in wanted}
    device = feats.device
    with _noted(modules) as calls:
        enc_out, enc_lens = model.encode(feats.unsqueeze(0), torch.tensor([len(feats)], device=device))
        fed = [model.sos_eos_id, *tokens] if model.decoder.causal else [model.blank_id] * len(tokens)
        model.decoder(
            torch.tensor([fed], device=device),
            torch.tensor([len(fed)], device=device),
            enc_out,
            enc_lens,
            ctc_log_probs=model.ctc_log_probs(enc_out) if model.decoder.needs_ctc else None,
        )
    config = model.config.attention_penalty.cross
    paying = config.selected_layers(len(model.decoder.layers)) if config.shape != "none" else ()
    maps = []
    for layer, module in modules.items():
        (x, keys, _), bias = calls[layer][0], calls[layer][1].get("bias")
        queries = split_heads(module.q(x), module.num_heads)
        trained = attention_weights(queries, keys, bias=dense_bias(bias))[0].cpu()
        without = attention_weights(queries, keys)[0].cpu() if layer in paying else None
        maps.append(LayerMaps(layer, trained, without, max_logit(queries, keys)))
    return maps


def max_logit(q: Tensor, k: Tensor, extra: Tensor | float = 0.0) -> float:
    """The greatest |q.k / sqrt(d_k) + extra| of q (1, H, U, d) and k (1, H, S, d)."""
    return float((q.float() @ k.float().transpose(-2, -1) * q.shape[-1] ** -0.5 + extra).abs().max())


def _max_own_logit(module: SelfAttention, x: Tensor) -> float:
    """Of self-attention: of all that is no penalty, the logits of relative positions included."""
    q, k, _, positions = module.terms(x, None)
    return max_logit(q, k, 0.0 if positions is None else cast(Tensor, positions))


def penalty_by_offset(site: AttentionPenalty, layer: int, length: int) -> Tensor:
    """P at the offsets -(length - 1) .. length - 1 positions: (1 or H, 2 length - 1) on the CPU."""
    return -site.by_offset(layer, length).cpu()


def shares(weights: Tensor) -> Tensor:
    """Weights (..., S) as float64 shares that sum to 1, which relu weights do not; a row of zeros stays: nothing far."""
    weights = weights.double()
    return weights / weights.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


def mean_distance(weights: Tensor) -> Tensor:
    """How far each head looks: the mean over queries of sum_j a_ij |i - j|, in frames; `shares` (H, S, S) -> (H,)."""
    return (weights * _distance(weights.shape[-1])).sum(dim=-1).mean(dim=-1)


def diagonality(weights: Tensor) -> Tensor:
    """How close to the diagonal each head looks: the mean over queries of 1 - sum_j a_ij |i - j| / max_j |i - j|.

    1 for the identity, 1.25 - ln 2 = 0.557 for flat attention over a long utterance (after Zhang et al., SLT 2021, "On the
    usefulness of self-attention for automatic speech recognition with transformers").

    Args:
        weights: (H, S, S), `shares`.

    Returns:
        (H,)
    """
    distance = _distance(weights.shape[-1])
    farthest = distance.amax(dim=-1).clamp(min=1.0)  # one frame only looks at itself
    return (1.0 - (weights * distance).sum(dim=-1) / farthest).mean(dim=-1)


def _distance(length: int) -> Tensor:
    position = torch.arange(length, dtype=torch.float32)
    return (position[:, None] - position[None, :]).abs()


def _existing(layers: Sequence[int] | None, count: int, where: str) -> list[int]:
    wanted = list(range(count)) if layers is None else list(layers)
    if wrong := [layer for layer in wanted if not 0 <= layer < count]:
        raise ExperimentError(f"layers {wrong} do not exist; this {where} has layers 0 to {count - 1}")
    return wanted


Call = tuple[tuple[Any, ...], dict[str, Any]]


@contextmanager
def _noted(modules: Mapping[int, nn.Module]) -> Iterator[dict[int, Call]]:
    """What each module is called with while the block runs."""
    calls: dict[int, Call] = {}
    hooks = [module.register_forward_pre_hook(partial(_note, calls, key), with_kwargs=True) for key, module in modules.items()]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _note(calls: dict[int, Call], key: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    calls[key] = (args, kwargs)
