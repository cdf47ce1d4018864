"""Any penalty by offset inside PyTorch's FlexAttention: no bias in memory, blocks outside the window skipped, learnable on CUDA.

The penalty is a table that the kernel looks into; a window, causality and padding are a mask that also says, per block of
128 x 128, whether there is anything to compute. The table is captured as a flat tensor that is indexed once: gradients to
captured tensors are sums of atomic additions, and 0-dimensional ones were wrong (pytorch issue 145208).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from speechtx.attention.backend import FLEX_HEAD_DIM
from speechtx.config.errors import ConfigError

_BLOCK = 128  # FlexAttention's default; its kernels are tuned for it
_EVERYWHERE = 2**30  # beyond any length


@dataclass(frozen=True, eq=False)
class FlexBias:
    """A penalty by offset for square attention, with an optional window, padding and causality.

    On CUDA the kernel is compiled, at its first use. On CPU it runs unfused and only without gradients.

    Args:
        by_offset: (1|H, 2T-1) -P at offsets (key minus query) -(T-1)..T-1; -inf hides. May be learned on CUDA.
        window: query i sees keys i-window..i+window; None sees all.
        mask: (B, T) bool, True where a key is data; None if nothing is padded.
        causal: query i sees keys up to i.

    Raises:
        ConfigError: shapes disagree.
    """

    by_offset: Tensor
    window: int | None = None
    mask: Tensor | None = None
    causal: bool = False

    def __post_init__(self) -> None:
        if self.by_offset.dim() != 2 or self.by_offset.shape[1] % 2 == 0:
            raise ConfigError(f"by_offset must be (1 or H, 2T-1), not {tuple(self.by_offset.shape)}")
        if self.mask is not None and (self.mask.dtype != torch.bool or self.mask.shape[1:] != (self.length,)):
            raise ConfigError(f"the mask must be bool (B, {self.length}), not {self.mask.dtype} {tuple(self.mask.shape)}")
        if self.window is not None and self.window < 0:
            raise ConfigError(f"a window must not be negative, it is {self.window}")

    @property
    def length(self) -> int:
        """T"""
        return (self.by_offset.shape[1] + 1) // 2

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, dropout: float = 0.0) -> Tensor:
        """q, k, v (B, H, T, d) -> (B, H, T, d); a query without any key gets zeros.

        Raises:
            ConfigError: what FlexAttention cannot do: dropout, gradients on CPU, heads below 16 on CUDA.
        """
        if not q.shape == k.shape == v.shape or q.shape[-2] != self.length:
            raise ConfigError(f"built for {self.length} positions, called with q {tuple(q.shape)} and k {tuple(k.shape)}")
        if dropout > 0:
            raise ConfigError("FlexAttention knows no attention dropout: set the attention's dropout to 0, or backend: sdpa")
        if q.is_cuda and q.shape[-1] < FLEX_HEAD_DIM:
            raise ConfigError(f"FlexAttention needs heads of {FLEX_HEAD_DIM} and more, not {q.shape[-1]}: use backend: sdpa")
        learning = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, self.by_offset))
        if not q.is_cuda and learning:
            raise ConfigError("FlexAttention has no backward pass on CPU: train with backend: sdpa, eager or blocks")
        score = self.score_mod(q.shape[1])
        if q.is_cuda and not torch.compiler.is_compiling():
            return _compiled()(q, k, v, score_mod=score, block_mask=self.block_mask)
        q, k, v = q.detach(), k.detach(), v.detach()  # it looks at requires_grad even where no gradient is asked for
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
            return flex_attention(q, k, v, score_mod=score, block_mask=self.block_mask)

    def dense(self) -> Tensor:
        """(1|B, 1|H, T, T) the same as a plain bias, -inf where a key is hidden."""
        position = torch.arange(self.length, device=self.by_offset.device)
        offset = position - position[:, None]
        values = self.by_offset.to(torch.promote_types(self.by_offset.dtype, torch.float32))
        left, right = self._reach
        bias = values[:, offset + self.length - 1].unsqueeze(0).masked_fill((offset < -left) | (offset > right), float("-inf"))
        return bias if self.mask is None else bias.masked_fill(~self.mask[:, None, None, :], float("-inf"))

    @property
    def _reach(self) -> tuple[int, int]:
        """How far a query sees to the left and to the right."""
        left = _EVERYWHERE if self.window is None else self.window
        return left, 0 if self.causal else left

    def score_mod(self, num_heads: int) -> Callable[..., Tensor]:
        """Adds the penalty. A head's offset 0 lies at `origin` in the flat table; only tensors are captured, no length."""
        if self.by_offset.shape[0] not in (1, num_heads):
            raise ConfigError(f"by_offset is for {self.by_offset.shape[0]} heads, the queries have {num_heads}")
        table, rows = self.by_offset.flatten(), self.by_offset.shape[0]
        step = 0 if rows == 1 else self.by_offset.shape[1]
        origin = torch.arange(num_heads, device=table.device) * step + self.length - 1

        def add_penalty(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return score + table[origin[h] + key - query]

        return add_penalty

    @functools.cached_property
    def block_mask(self) -> BlockMask | None:
        """Which blocks to compute, and the mask inside those that are cut; built once per batch. None if all is visible.

        Found from the blocks' corners at a cost of (T / 128)^2, where PyTorch's own builder looks at all T^2 pairs. A block at
        the end of the window and of an utterance may be kept though nothing in it is visible.
        """
        left, right = self._reach
        if self.window is None and self.mask is None and not self.causal:
            return None
        first = torch.arange(0, self.length, _BLOCK, device=self.by_offset.device)
        last = (first + _BLOCK).clamp(max=self.length) - 1
        nearest, furthest = first - last[:, None], last - first[:, None]  # the offsets that occur, (blocks, blocks)
        some = ((nearest <= right) & (furthest >= -left))[None]
        whole = last - first + 1 == _BLOCK
        every = ((nearest >= -left) & (furthest <= right) & whole & whole[:, None])[None]
        mask = self.mask
        if mask is not None:
            keys = F.pad(mask, (0, -self.length % _BLOCK)).unflatten(1, (-1, _BLOCK))
            some, every = some & keys.any(-1)[:, None, :], every & keys.all(-1)[:, None, :]

        reach = torch.tensor([-left, right], dtype=torch.int32, device=first.device)  # the compiler fails on numbers

        def is_visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            visible = (key - query >= reach[0]) & (key - query <= reach[1])
            return visible if mask is None else visible & mask[b, key]

        return BlockMask.from_kv_blocks(
            *_listed(some & ~every),
            *_listed(every),
            BLOCK_SIZE=_BLOCK,
            mask_mod=is_visible,
            seq_lengths=(self.length, self.length),
        )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(1|B, n, n) bool -> how many blocks of keys each block of queries meets (1|B, 1, n), and these first (1|B, 1, n, n)."""
    blocks = blocks.unsqueeze(1).to(torch.int32)
    return blocks.sum(-1, dtype=torch.int32), blocks.argsort(dim=-1, descending=True, stable=True).to(torch.int32)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    """FlexAttention compiled once for all lengths."""
    return torch.compile(flex_attention, dynamic=True)
