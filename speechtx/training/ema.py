"""The exponential moving average of the weights, kept beside the ones that are trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Averages a model's weights and buffers over its steps (Polyak and Juditsky 1992; as TensorFlow's ExponentialMovingAverage).

    The decay of step n is min(decay, (1 + n) / (10 + n)), so that the weights of the start are soon forgotten.

    Args:
        model: on its device; the average starts with its weights and follows the same tensors from then on.
        decay: weight of the past, such as 0.999: a mean over the last 1 / (1 - decay) steps or so.
    """

    def __init__(self, model: nn.Module, *, decay: float) -> None:
        self.decay = decay
        self.trained: dict[str, Tensor] = model.state_dict()  # views of the model's own tensors, which only change in place
        self.values = {name: tensor.clone() for name, tensor in self.trained.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after optimiser step `step` (1 is the first)."""
        weight = 1.0 - min(self.decay, (1 + step) / (10 + step))
        floats = [name for name, value in self.values.items() if value.is_floating_point()]
        torch._foreach_lerp_([self.values[n] for n in floats], [self.trained[n] for n in floats], weight)
        for name in self.values.keys() - set(floats):
            self.values[name].copy_(self.trained[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block the model has the averaged weights; afterwards its own, to the bit."""
        own = {name: tensor.clone() for name, tensor in self.trained.items()}
        _copy(self.values, self.trained)
        try:
            yield
        finally:
            _copy(own, self.trained)

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Continues with the `values` of a checkpoint."""
        _copy(values, self.values)


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, tensor in target.items():
        tensor.copy_(source[name])
