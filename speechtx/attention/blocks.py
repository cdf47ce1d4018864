"""Block-local attention: a penalty with a window of W positions to each side, at a cost that grows as T * W.

Queries are cut into blocks of m, and each block meets the m + 2W keys around it. A small band, the same for every block,
carries the penalty and hides the keys further than W from their query.

On CPU the heads of an utterance lie behind one another on one tape with gaps of at least W between them. So all blocks are
equal, the spans of keys are overlapping views of the tape, and as many blocks as the cache holds go through one batched matrix
product. Backward computes the weights again, as FlashAttention does (Dao et al. 2022, section 3.1): memory does not depend on
W. On GPU, and with dropout, PyTorch's SDPA gets the blocks as a batch.

Blocks that also see their neighbours are 1-D local attention of the Image Transformer (Parmar et al. 2018, section 3.3).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Logits of one group of blocks, per thread: 1 MiB in float32, about the second-level cache. Smaller groups compute no faster, and
# each product of a group is a barrier for the threads, which is dear where the cores are shared (OMP_WAIT_POLICY=PASSIVE helps).
_GROUP = 2**18
# Queries in a block where SDPA is called: the rows a fused kernel works on at once.
_SDPA_BLOCK = 64


@dataclass(frozen=True, eq=False)
class BlockBias:
    """A penalty by offset inside a window; query i sees the real keys among i-W..i+W and no others.

    Args:
        by_offset: (1 | H, 2W+1) float, -P at offsets (key minus query) -W..W; -inf hides an offset. It may be learned.
        mask: (B, T) bool, True where there is data; None if nothing is padded.

    Raises:
        ValueError: if the shapes or types are not these.
    """

    by_offset: Tensor
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        if self.by_offset.dim() != 2 or self.by_offset.shape[1] % 2 == 0 or not self.by_offset.is_floating_point():
            raise ValueError(f"by_offset must be float (1 or H, 2W+1), got {self.by_offset.dtype} {tuple(self.by_offset.shape)}")
        if self.mask is not None and (self.mask.dim() != 2 or self.mask.dtype != torch.bool):
            raise ValueError(f"mask must be bool (B, T), got {self.mask.dtype} {tuple(self.mask.shape)}")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, dropout: float = 0.0) -> Tensor:
        """softmax(q k^T / sqrt(d) + bias) v over the keys in the window; softmax in at least float32.

        Args:
            q: (B, H, T, d) queries.
            k: (B, H, T, d) keys.
            v: (B, H, T, d) values.
            dropout: probability of dropping an attention weight; above 0 the weights are kept for backward: O(T * W) memory.

        Returns:
            (B, H, T, d); zeros for a query that sees no real key.

        Raises:
            ValueError: if q, k and v are not of one shape, or the bias is not of theirs.
        """
        if not q.shape == k.shape == v.shape:
            raise ValueError(f"block-local attention is square: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")
        if self.by_offset.shape[0] not in (1, q.shape[1]):
            raise ValueError(f"by_offset is for {self.by_offset.shape[0]} heads, q {tuple(q.shape)} has {q.shape[1]}")
        if self.mask is not None and self.mask.shape != (q.shape[0], q.shape[2]):
            raise ValueError(f"mask {tuple(self.mask.shape)} does not fit q {tuple(q.shape)}")
        if dropout > 0.0 or q.device.type != "cpu":
            return _attend_by_sdpa(q, k, v, self.by_offset, self.mask, dropout)
        return _attend_by_tape(q, k, v, self.by_offset, self.mask)

    def dense(self, length: int | None = None) -> Tensor:
        """The same bias as one matrix, for the plain twin: (1 | B, 1 | H, T, T), -inf where a key is hidden.

        Args:
            length: T; needed only where there is no mask to tell it.
        """
        if self.mask is not None:
            length = self.mask.shape[1]
        if length is None:
            raise ValueError("dense() of a BlockBias without a mask needs the length")
        position = torch.arange(length, device=self.by_offset.device)
        offset = position[None, :] - position[:, None]
        window = self.by_offset.shape[1] // 2
        values = self.by_offset.to(torch.promote_types(self.by_offset.dtype, torch.float32))
        values = values[:, offset.clamp(-window, window) + window]
        bias = values.masked_fill(offset.abs() > window, float("-inf")).unsqueeze(0)
        return bias if self.mask is None else bias.masked_fill(~self.mask[:, None, None, :], float("-inf"))


def _block_size(window: int) -> int:
    """m on CPU: larger blocks make larger matrix products, smaller ones meet fewer keys in vain (2W + m instead of 2W + 1)."""
    return 32 if window <= 128 else 64


def _hidden(dtype: torch.dtype) -> float:
    """A logit that hides a key; finite, so that a row of nothing else is no NaN, and two of them still add up."""
    return torch.finfo(dtype).min / 4


def _crop(by_offset: Tensor, length: int) -> Tensor:
    """The offsets that occur among `length` positions: a window beyond the ends would only make blocks wider."""
    window = by_offset.shape[1] // 2
    beyond = max(window - (length - 1), 0)
    return by_offset[:, beyond : by_offset.shape[1] - beyond]


def _band(by_offset: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """The bias of one block: (1 | H, m, m + 2W), row r holding by_offset in columns r..r + 2W."""
    width = by_offset.shape[1]
    index = torch.arange(block + width - 1, device=by_offset.device) - torch.arange(block, device=by_offset.device)[:, None]
    values = by_offset.to(dtype).clamp(min=_hidden(dtype))[:, index.clamp(0, width - 1)]
    return values.masked_fill((index < 0) | (index >= width), _hidden(dtype))


def _empty(by_offset: Tensor, mask: Tensor | None, length: int) -> Tensor:
    """Which queries see no key at all: bool (1 | B, 1 | H, T, 1)."""
    real = torch.ones(1, length, device=by_offset.device) if mask is None else mask.float()
    window = by_offset.shape[1] // 2
    visible = (by_offset.detach() > float("-inf")).float()
    return F.conv1d(F.pad(real, (window, window)).unsqueeze(1), visible.unsqueeze(1)).unsqueeze(-1) < 0.5


class _Tape:
    """The H sequences of one utterance behind one another, each followed by a gap of at least W, and how blocks lie on them.

    Args:
        q: (B, H, T, d), for its sizes.
        by_offset: (1 | H, 2W+1), cropped to the length.
    """

    def __init__(self, q: Tensor, by_offset: Tensor) -> None:
        _, self.heads, self.length, self.dim = q.shape
        self.scale = self.dim**-0.5
        self.window = by_offset.shape[1] // 2
        self.block = _block_size(self.window)
        self.span = self.block + 2 * self.window
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        per_head = -(-(self.length + self.window) // self.block)
        self.blocks = self.heads * per_head
        self.band = _band(by_offset, self.block, self.dtype)
        self.band_of_block = torch.arange(len(self.band)).repeat_interleave(self.blocks // len(self.band))
        self.padding = self.new(dim=1)

    def new(self, dim: int | None = None) -> Tensor:
        """An empty tape (rows, d): W rows, the sequences with their gaps, W rows."""
        return torch.zeros(self.blocks * self.block + 2 * self.window, dim or self.dim, dtype=self.dtype)

    def queries(self, tape: Tensor) -> Tensor:
        """The queries of every block: a view (blocks, m, d)."""
        return tape[self.window : self.window + self.blocks * self.block].view(self.blocks, self.block, -1)

    def spans(self, tape: Tensor) -> Tensor:
        """The keys of every block: an overlapping view (blocks, span, d)."""
        dim = tape.shape[1]
        return tape.as_strided((self.blocks, self.span, dim), (self.block * dim, dim, 1))

    def sequences(self, tape: Tensor) -> Tensor:
        """The sequences without gaps: a view (H, T, d)."""
        return self.queries(tape).view(self.heads, -1, tape.shape[1])[:, : self.length]

    def hide(self, real: Tensor | None) -> None:
        """Hides the gaps and the keys that are padding; real: (T,) bool."""
        self.padding.fill_(_hidden(self.dtype))
        self.sequences(self.padding).masked_fill_(torch.tensor(True) if real is None else real.unsqueeze(-1), 0.0)

    def groups(self) -> Iterator[slice]:
        """Groups of blocks whose logits stay in the cache."""
        size = max(1, _GROUP * torch.get_num_threads() // (self.block * self.span))
        return (slice(first, min(first + size, self.blocks)) for first in range(0, self.blocks, size))

    def weights(self, group: slice, q: Tensor, k: Tensor) -> Tensor:
        """Attention weights (blocks of the group, m, span) between queries and spans of keys."""
        logits = self.band.index_select(0, self.band_of_block[group])
        logits = logits.baddbmm_(q[group], k[group].transpose(1, 2), alpha=self.scale)
        return torch.softmax(logits.add_(self.spans(self.padding)[group].transpose(1, 2)), -1)

    def add_spans(self, tape: Tensor, group: slice, x: Tensor) -> None:
        """Adds x (blocks of the group, span, d) to where those spans lie; they overlap, so piece by piece of m rows."""
        for first in range(0, self.span, self.block):
            piece = x[:, first : first + self.block]
            row = group.start * self.block + first
            tape.as_strided(piece.shape, (self.block * self.dim, self.dim, 1), row * self.dim).add_(piece)


def _output(like: Tensor) -> Tensor:
    """An uninitialised (B, H, T, d) whose memory is (B, T, H, d): joining the heads needs no copy."""
    batch, heads, length, dim = like.shape
    return like.new_empty(batch, length, heads, dim).transpose(1, 2)


# An operator of its own rather than an autograd.Function, so that torch.compile sees one call and not a loop to unroll.
@torch.library.custom_op("speechtx::block_attention", mutates_args=(), device_types="cpu")
def _attend_by_tape(q: Tensor, k: Tensor, v: Tensor, by_offset: Tensor, mask: Tensor | None) -> Tensor:
    """Block-local attention of q, k, v (B, H, T, d) on CPU."""
    by_offset = _crop(by_offset, q.shape[2])
    tape = _Tape(q, by_offset)
    q_tape, k_tape, v_tape, o_tape = (tape.new() for _ in range(4))
    q_blocks, k_spans, v_spans, o_blocks = tape.queries(q_tape), tape.spans(k_tape), tape.spans(v_tape), tape.queries(o_tape)
    out = _output(q)
    with torch.autocast("cpu", enabled=False):
        for utterance in range(len(q)):
            tape.hide(None if mask is None else mask[utterance])
            for target, x in ((q_tape, q), (k_tape, k), (v_tape, v)):
                tape.sequences(target).copy_(x[utterance])
            for group in tape.groups():
                torch.bmm(tape.weights(group, q_blocks, k_spans), v_spans[group], out=o_blocks[group])
            out[utterance] = tape.sequences(o_tape)
    return out.masked_fill_(_empty(by_offset, mask, q.shape[2]), 0.0)


@torch.library.custom_op("speechtx::block_attention_backward", mutates_args=(), device_types="cpu")
def _backward_by_tape(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, by_offset: Tensor, mask: Tensor | None, learned: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and by_offset (zeros unless it is learned) of `_attend_by_tape`."""
    cropped = _crop(by_offset, q.shape[2])
    tape = _Tape(q, cropped)
    q_tape, k_tape, v_tape, o_tape, dq_tape, dk_tape, dv_tape = (tape.new() for _ in range(7))
    q_blocks, k_spans, v_spans, do_blocks = tape.queries(q_tape), tape.spans(k_tape), tape.spans(v_tape), tape.queries(o_tape)
    dq, dk, dv, d_band = _output(q), _output(k), _output(v), torch.zeros_like(tape.band)
    grad = grad.masked_fill(_empty(cropped, mask, q.shape[2]), 0.0)
    with torch.autocast("cpu", enabled=False):
        for utterance in range(len(q)):
            tape.hide(None if mask is None else mask[utterance])
            for target, x in ((q_tape, q), (k_tape, k), (v_tape, v), (o_tape, grad)):
                tape.sequences(target).copy_(x[utterance])
            dk_tape.zero_()
            dv_tape.zero_()
            for group in tape.groups():
                weights = tape.weights(group, q_blocks, k_spans)
                tape.add_spans(dv_tape, group, weights.transpose(1, 2) @ do_blocks[group])
                # softmax's derivative: weights * (x - sum(weights * x)) with x the gradient of the weights
                x = do_blocks[group] @ v_spans[group].transpose(1, 2)
                d_logits = torch._softmax_backward_data(x, weights, -1, weights.dtype)
                if learned:
                    d_band.index_add_(0, tape.band_of_block[group], d_logits)
                tape.add_spans(dk_tape, group, d_logits.transpose(1, 2) @ q_blocks[group])
                torch.bmm(d_logits, k_spans[group], out=tape.queries(dq_tape)[group])
            torch.mul(tape.sequences(dq_tape), tape.scale, out=dq[utterance])
            torch.mul(tape.sequences(dk_tape), tape.scale, out=dk[utterance])
            dv[utterance] = tape.sequences(dv_tape)
    return dq, dk, dv, _offset_grad(d_band, by_offset, cropped.shape[1])


def _offset_grad(band_grad: Tensor, by_offset: Tensor, width: int) -> Tensor:
    """Sums the diagonals of (1 | H, m, m + 2W), which `_band` filled with one value each; zeros for cropped offsets."""
    heads, block, span = band_grad.shape
    diagonals = band_grad.as_strided((heads, block, width), (block * span, span + 1, 1))
    beyond = (by_offset.shape[1] - width) // 2
    return F.pad(diagonals.sum(1), (beyond, beyond)).to(by_offset.dtype)


@_attend_by_tape.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, by_offset: Tensor, mask: Tensor | None) -> Tensor:
    return _output(q)


@_backward_by_tape.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, by_offset: Tensor, mask: Tensor | None, learned: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _output(q), _output(k), _output(v), torch.empty_like(by_offset, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward_by_tape(grad, *ctx.saved_tensors, ctx.needs_input_grad[3]), None


_attend_by_tape.register_autograd(_differentiate, setup_context=_save)


def _cut(x: Tensor, block: int, window: int) -> Tensor:
    """(B, H, T, d) -> (B * blocks, H, m + 2W, d): what lies in each block and W positions around it, zeros beyond the ends."""
    rest = -x.shape[2] % block
    spans = F.pad(x, (0, 0, window, window + rest)).unfold(2, block + 2 * window, block)  # (B, H, blocks, d, span)
    return spans.permute(0, 2, 1, 4, 3).flatten(0, 1)


def _attend_by_sdpa(q: Tensor, k: Tensor, v: Tensor, by_offset: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Block-local attention through PyTorch's SDPA, a block being an entry of its batch; differentiable in all four."""
    batch, _, length, _ = q.shape
    by_offset = _crop(by_offset, length)
    window = by_offset.shape[1] // 2
    block = _SDPA_BLOCK
    real = torch.ones(1, length, dtype=torch.bool, device=q.device) if mask is None else mask
    real = _cut(real.expand(batch, -1)[:, None, :, None], block, window).transpose(2, 3)  # (B * blocks, 1, 1, span)
    bias = torch.where(real, _band(by_offset, block, q.dtype), _hidden(q.dtype))
    out = F.scaled_dot_product_attention(
        _cut(q, block, 0), _cut(k, block, window), _cut(v, block, window), attn_mask=bias, dropout_p=dropout
    )
    out = out.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)[:, :, :length]
    return out.masked_fill(_empty(by_offset, mask, length), 0.0)
