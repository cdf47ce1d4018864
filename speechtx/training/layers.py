"""Two ways to run a model's layers otherwise in training: computed again in the backward pass, or compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from speechtx.config.schema import TrainingConfig
from speechtx.model.recognizer import Recognizer


def set_up_layers(model: Recognizer, config: TrainingConfig) -> None:
    """Applies `training.compile` and `training.gradient_checkpointing` to all layers of encoder and decoder."""
    layers = [*model.encoder.layers, *(model.decoder.layers if model.decoder is not None else ())]
    if config.compile:
        compile_layers(layers)
    if config.gradient_checkpointing:
        recompute_layers(layers)


def compile_layers(layers: Sequence[nn.Module], backend: str = "inductor") -> None:
    """Compiles each layer's forward with sizes left open: batches of any length, and layers of one shape, share what is compiled.

    Lengths are bucketed by the batches themselves; a batch of one utterance is compiled once more.
    """
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=True, backend=backend)


def recompute_layers(layers: Sequence[nn.Module]) -> None:
    """Gradient checkpointing (Chen et al. 2016): in training, layers keep their input only and run again in the backward pass.

    Random draws are repeated exactly, so gradients stay the same to the bit.
    """
    for layer in layers:
        layer.forward = functools.partial(_recomputed, layer, layer.forward)


def _recomputed(layer: nn.Module, forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    if not (layer.training and torch.is_grad_enabled()):
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
