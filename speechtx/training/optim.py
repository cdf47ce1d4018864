"""The optimiser and the learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from speechtx.config.schema import OptimizerConfig, ScheduleConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig, device: torch.device) -> torch.optim.Optimizer:
    """Adam or AdamW; weight decay spares biases, norms and everything else of one dimension (Loshchilov & Hutter 2019)."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    spared = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": spared, "weight_decay": 0.0}]
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.name]
    # The fused kernel updates all parameters in one pass; on CPU a loop over tensors costs several times as much.
    return kind(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=device.type in ("cuda", "cpu"))


def learning_rate(config: ScheduleConfig, *, peak: float, step: int, progress: float) -> float:
    """The rate for one step.

    Args:
        config: which schedule.
        peak: the rate at the end of the warm-up.
        step: optimiser steps taken so far, this one included (the first step is 1).
        progress: share of the whole training that is done, 0 to 1; cosine follows it from the end of the warm-up on.
    """
    warmup = config.warmup_steps
    if step < warmup:
        return peak * step / warmup
    if config.name == "constant":
        return peak
    if config.name == "inverse_sqrt":
        return peak * math.sqrt(max(warmup, 1) / step)
    warm = progress * warmup / step  # the share that the warm-up was, had all steps done as much
    floor = peak * config.final_ratio
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min((progress - warm) / (1 - warm), 1.0)))
