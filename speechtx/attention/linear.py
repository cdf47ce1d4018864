"""Linear layers, whose weights are kept in oneDNN's own layout where nobody wants gradients, on a CPU.

PyTorch multiplies float32 matrices by MKL. Ten rows with the weights of six decoder layers (D 256, feed-forward 2048, 33 MiB)
took it 6.2 ms, 5.0 in a layout of its own that PyTorch can keep, and oneDNN 3.1 ms with weights that it has laid out once.
Hundreds of rows, an encoder's, take MKL a tenth longer than oneDNN. Small weights are left to MKL: oneDNN takes up to a
millisecond to prepare for a number of rows that it has not met, which their products do not save.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

LARGE_WEIGHT = 2**17  # numbers, from which on it pays; smaller ones stay in the cache of a core besides
ROWS = 16  # of the product that oneDNN is told of when it lays out a weight; others are as fast

_packed: WeakIdKeyDictionary = WeakIdKeyDictionary()  # a weight -> (its version, what it was, packed)


class Linear(nn.Linear):
    """`nn.Linear`, faster in inference mode."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():  # asked in this order: see `model.inference`
            return F.linear(x, self.weight, self.bias)
        return PackedLinear.of(self)(x)


class PackedLinear(NamedTuple):
    """x W^T + b, of a layer whose weights do not change while this is held.

    Attributes:
        weight: (out, in).
        bias: (out,), or None.
        packed: the weight in oneDNN's layout; None where `weight` itself is multiplied.
    """

    weight: Tensor
    bias: Tensor | None
    packed: Tensor | None

    @staticmethod
    def of(linear: nn.Linear) -> PackedLinear:
        """The layer as it is now; a large weight is packed in inference mode on a CPU, once until it changes.

        Changes are seen as autograd sees them: one through `.data` or NumPy's view of a weight is not.
        """
        return PackedLinear(linear.weight, linear.bias, _pack(linear.weight) if _may_pack(linear.weight) else None)

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        if self.packed is None:
            return F.linear(x, self.weight, self.bias)
        found: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return found


def _may_pack(weight: Tensor) -> bool:
    return (
        torch.is_inference_mode_enabled()
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and weight.numel() >= LARGE_WEIGHT
        and not weight.is_inference()  # one that was made in this mode does not count its changes
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _pack(weight: Tensor) -> Tensor:
    known = _packed.get(weight)
    if known is None or known[0] != weight._version or known[1].data_ptr() != weight.data_ptr():
        # Another view of the same numbers is kept, so that no other weight can take their place in memory.
        known = (weight._version, weight.detach(), torch.ops.mkldnn._reorder_linear_weight(weight, ROWS))
        _packed[weight] = known
    packed: Tensor = known[2]
    return packed
