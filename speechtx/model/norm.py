"""The norms of the encoder's blocks: per frame, or per channel over all frames of a batch."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn


class FrameNorm(nn.LayerNorm):
    """LayerNorm (Ba et al. 2016): each frame by itself, so it needs no mask."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, S, D) -> (B, S, D)"""
        return super().forward(x)


class MaskedBatchNorm(nn.Module):
    """BatchNorm (Ioffe and Szegedy 2015) of each channel over the valid frames of the batch; padding never counts.

    In training mean and variance are the batch's own, over all frames where the mask is True; in evaluation they are the running
    ones. These are float buffers, so that checkpoints hold them and averaging weights averages them too; there is no integer
    count. A batch with NaN or infinite values, or with fewer than two valid frames, leaves them as they are: the trainer skips
    a step of the former, and one such batch must not spoil the model for good. With several processes each one normalises with
    its own batch, and the running statistics are those of the first process.

    For the encoder only. The decoder sees all tokens of a sentence at once in training, and statistics over them would tell
    position i about the tokens behind it, which it is to predict; in search, token by token, nobody could tell it.

    Args:
        dim: D, channels.
        momentum: weight of the newest batch in the running statistics.
        eps: added to the variance.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, *, dim: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum = momentum
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (B, S, D), mask (B, S) True where there is data -> (B, S, D); rows of padding are arbitrary but finite."""
        precise = x.to(torch.promote_types(x.dtype, torch.float32))
        mean, var = self._batch_statistics(precise, mask) if self.training else (self.running_mean, self.running_var)
        return ((precise - mean) * (self.weight * torch.rsqrt(var + self.eps)) + self.bias).to(x.dtype)

    def _batch_statistics(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        padding = ~mask.unsqueeze(-1)
        count = mask.sum()
        mean = x.masked_fill(padding, 0.0).sum(dim=(0, 1)) / count.clamp(min=1)
        var = (x - mean).masked_fill(padding, 0.0).square().sum(dim=(0, 1)) / count.clamp(min=1)
        with torch.no_grad():
            unbiased = var * (count / (count - 1).clamp(min=1))
            usable = (count > 1) & mean.isfinite().all() & var.isfinite().all()
            for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
                running.copy_(torch.where(usable, running + self.momentum * (new - running), running))
        return mean, var

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}, momentum={self.momentum}"


def make_norm(kind: Literal["layer", "batch"], dim: int) -> FrameNorm | MaskedBatchNorm:
    """The norm `encoder.norm` names; both are called as norm(x, mask)."""
    return FrameNorm(dim) if kind == "layer" else MaskedBatchNorm(dim=dim)
