"""Which kernel computes a penalty: the configured one, or with `auto` the one that suits shape, device, dtype and length.

Thresholds for the CPU were measured (benchmarks/attention.py). Those for CUDA follow from what each kernel's source accepts
(docs/attention_penalty.md); no GPU was timed.
"""

from __future__ import annotations

import importlib.util
import logging

import torch

from speechtx.attention.fold import gaussian_fold_dims, keeps_flash_tier
from speechtx.attention.penalty import initial_strength, strength_of
from speechtx.config.penalty import PenaltyConfig, backend_refuses

log = logging.getLogger(__name__)

BLOCKS_FROM = 8  # blocks pay on a CPU when the sequence is this many times as long as the window to one side
FLEX_FROM = 1500  # frames from which a block mask of 128 x 128 skips most of a window's complement
FLEX_HEAD_DIM = 16  # the least that FlexAttention's CUDA kernel takes

_said: set[tuple[str, str, str]] = set()


def choose_backend(
    requested: str,
    config: PenaltyConfig,
    *,
    site: str,
    device: torch.device,
    dtype: torch.dtype,
    length: int,
    window: int | None,
    head_dim: int,
    dropout: float,
    padded: bool,
    causal: bool,
) -> str:
    """The name of the kernel; each choice and its reason are logged once.

    Args:
        requested: `backend` of the configuration.
        config: the site's penalty.
        site: its name, for the log.
        device: of queries and keys.
        dtype: of queries and keys.
        length: T.
        window: positions to each side, if limited for all heads.
        head_dim: d.
        dropout: of the attention weights.
        padded: whether keys are padded.
        causal: whether the site is causal.
    """
    if requested != "auto":
        chosen, reason = requested, "as configured"
    elif device.type == "cuda":
        chosen, reason = _on_cuda(config, dtype, length, window, head_dim, dropout, padded, causal)
    elif window is not None and not causal and length >= BLOCKS_FROM * window and length >= 256:
        chosen, reason = "blocks", f"a window of {window} in sequences of {BLOCKS_FROM * window} positions and more"
    else:
        chosen, reason = (
            "sdpa",
            "PyTorch's fused kernel with one shared bias"
            + ("; its gradient and dropout take the unfused path" if config.learnable != "none" or dropout > 0 else ""),
        )
    if (site, chosen, reason) not in _said:
        _said.add((site, chosen, reason))
        log.info("attention penalty of %s (%s): backend %s, %s", site, config.shape, chosen, reason)
    return chosen


def _on_cuda(
    config: PenaltyConfig,
    dtype: torch.dtype,
    length: int,
    window: int | None,
    head_dim: int,
    dropout: float,
    padded: bool,
    causal: bool,
) -> tuple[str, str]:
    sixteen_bit = dtype in (torch.bfloat16, torch.float16)
    if window is not None and length >= FLEX_FROM and dropout == 0.0 and head_dim >= FLEX_HEAD_DIM:
        return "flex", f"a window of {window} in {FLEX_FROM} positions and more, whole blocks are skipped"
    slopes = not backend_refuses("flash_attn", config, causal=causal) and config.unit == "frame"
    if slopes and sixteen_bit and not padded and importlib.util.find_spec("flash_attn") is not None:
        return "flash_attn", "its slopes are arithmetic only"
    if config.shape == "gaussian" and not backend_refuses("fold", config, causal=causal) and config.ramp is None:
        strength = strength_of(config, initial_strength(config, 1)[:, :, None])[0, :, 0].float()
        dims = gaussian_fold_dims(strength, length=length, head_dim=head_dim, dtype=dtype)
        if keeps_flash_tier(head_dim, dims):
            return "fold", f"its {dims} dims are free beside heads of {head_dim} in flash attention"
    return "sdpa", "PyTorch's fused kernels with one shared bias"
