"""ALiBi's slopes inside the kernels of the flash-attn 2 package, where it is installed: the penalty costs no memory at all.

The package computes -m |i + T_k - T_q - j|: symmetric |i - j| for as many keys as queries, ALiBi's own form when causal. It
gives the slopes no gradient, takes 16-bit tensors on CUDA only, and, for batches that are not packed, has no padding mask.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from speechtx.config.errors import ConfigError


@dataclass(frozen=True, eq=False)
class SlopeBias:
    """The fixed penalty m |i - j| of square attention, with an optional window and causality, by flash-attn.

    Args:
        slopes: (1|H,) m >= 0.
        window: query i sees keys i-window..i+window; None sees all.
        causal: query i sees keys up to i.
        mask: must be None: the kernel would see padded keys. The parameter is here so that a padded batch is refused, not wrong.

    Raises:
        ConfigError: the slopes require a gradient, there is padding, or a shape or a window is impossible.
    """

    slopes: Tensor
    window: int | None = None
    causal: bool = False
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        if self.slopes.dim() != 1:
            raise ConfigError(f"slopes must be (1 or H,), not {tuple(self.slopes.shape)}")
        if self.slopes.requires_grad:
            raise ConfigError("flash-attn gives ALiBi's slopes no gradient: choose learnable: none, or backend: sdpa or flex")
        if self.mask is not None:
            raise ConfigError(
                "flash-attn would attend to padded keys, it takes no padding mask: use backend: sdpa, fold or flex, "
                "or batches of utterances of one length"
            )
        if self.window is not None and self.window < 0:
            raise ConfigError(f"a window must not be negative, it is {self.window}")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, dropout: float = 0.0) -> Tensor:
        """q, k, v (B, H, T, d) in bfloat16 or float16 -> (B, H, T, d), a view of the (B, T, H, d) that the kernel writes.

        Raises:
            ConfigError: flash-attn is not installed, or cannot take such tensors.
        """
        if not q.shape == k.shape == v.shape:
            raise ConfigError(f"flash-attn's slopes are for square attention: q {tuple(q.shape)}, k {tuple(k.shape)}")
        if q.dtype not in (torch.bfloat16, torch.float16):
            raise ConfigError(
                f"flash-attn takes bfloat16 and float16, not {q.dtype}: train with mixed precision, or backend: sdpa"
            )
        if self.slopes.shape[0] not in (1, q.shape[1]):
            raise ConfigError(f"there are {self.slopes.shape[0]} slopes, but {q.shape[1]} heads")
        reach = -1 if self.window is None else self.window
        out = _kernel()(
            *(x.transpose(1, 2) for x in (q, k, v)),
            dropout_p=dropout,
            softmax_scale=q.shape[-1] ** -0.5,
            causal=self.causal,
            window_size=(reach, 0 if self.causal else reach),
            alibi_slopes=self.slopes.float().expand(q.shape[1]).contiguous(),
        )
        return out.transpose(1, 2)

    def dense(self, length: int | None = None) -> Tensor:
        """(1, 1|H, T, T) the same as a plain bias, -inf outside the window and on later keys if causal; T must be told."""
        if length is None:
            raise ConfigError("dense() of a SlopeBias needs the length")
        position = torch.arange(length, device=self.slopes.device)
        offset = position - position[:, None]
        slopes = self.slopes.to(torch.promote_types(self.slopes.dtype, torch.float32))
        hidden = offset.abs() > (length if self.window is None else self.window)
        hidden = hidden | (offset > 0) if self.causal else hidden
        return (-slopes.view(1, -1, 1, 1) * offset.abs()).masked_fill(hidden, float("-inf"))


def _kernel() -> Callable[..., Tensor]:
    """flash_attn_func; imported here, because the package exists only where somebody built it for their GPU."""
    try:
        kernel: Callable[..., Tensor] = importlib.import_module("flash_attn").flash_attn_func
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"backend: flash_attn needs the package flash-attn 2 ({error}): use backend: auto") from error
    return kernel
