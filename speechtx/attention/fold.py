"""Penalties folded into the queries and the keys: a few more dimensions, no attention mask, any unmodified fused kernel.

Softmax ignores what depends on the query alone, so that a penalty need only be a sum of products (query's part) * (key's part):

    Gaussian       -lam (x - y)^2  ~  2 lam x y - lam y^2      what is left out, -lam x^2, is the query's own
    causal linear  -m (i - j)      ~  m j

Such parts are appended to q and k; padding is a large negative number in a column that depends on the key alone. A symmetric
linear penalty -m |i - j| has full rank and cannot be folded, but it is two causal ones, whose results are merged by their
log-sum-exp. Exact low-rank biases appended to q and k are the idea of FlashBias (Wu et al., NeurIPS 2025).

**Precision.** Large terms cancel: the logits' error is about 4 u lam X^2, with u the rounding unit of q's and k's numbers and X
the largest coordinate. Coordinates are therefore centred. float32 and float64 need two columns. bfloat16, float16 and TF32 would
give garbage with two; there, positions and squares are cut into parts that the type holds exactly, see `GaussianFold`.

**Fixed strengths only.** The strength's gradient would be right in float32, but fused 16-bit kernels round the gradient of the
logits before they multiply it with y^2: its error exceeds 100 % at 500 frames. q, k and v get the right gradients in every type.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from speechtx.attention.fold_columns import Columns, centred_frames, cut_gaussian, gaussian_columns, linear_columns, operand_type
from speechtx.config.errors import ConfigError

_FLASH_TIERS = (32, 64, 96, 128, 192, 256)  # head widths that CUDA's flash kernels are built for; others are rounded up


def gaussian_fold_dims(strength: Tensor, *, length: int, head_dim: int, dtype: torch.dtype) -> int:
    """How many columns `GaussianFold` needs at the frames 0..length-1.

    Args:
        strength: (1|H,) lam.
        length: T.
        head_dim: d of the queries.
        dtype: of q and k; torch.bfloat16 for float32 that is multiplied in TF32.

    Returns:
        2 for float32 and float64, else 3 or 7.
    """
    frames = centred_frames(length, strength.device)[None]
    return cut_gaussian(frames, frames, strength.detach(), head_dim=head_dim, dtype=dtype)[0].shape[-1]


def keeps_flash_tier(head_dim: int, dims: int) -> bool:
    """Whether `dims` more columns leave a head in the same size class of the CUDA flash kernels (32/64/96/128/192/256).

    Crossing into the next class can cost up to half as much time again, more than a bias would.
    """
    tier = bisect.bisect_left(_FLASH_TIERS, head_dim)
    return tier < len(_FLASH_TIERS) and head_dim + dims <= _FLASH_TIERS[tier]


@dataclass(frozen=True, eq=False)
class GaussianFold:
    """The fixed penalty lam (x - y)^2 and the padding mask, folded into q and k; square or not.

    The number of columns:
    - float32, float64: 2.
    - bfloat16, float16, TF32: 3 and without any rounding of the bias, if every lam * sqrt(d) is a power of two (that is
      sigma = sqrt(sqrt(d) / 2) * 2^(n/2)) or 0, coordinates are whole and, in bfloat16, within +-256 of their middle (T <= 513).
    - otherwise 7: positions in two parts, their squares in three. Again without rounding for such lam up to T = 4097; for other
      lam the positions are rounded (below 0.01 frame at T = 2000), the logits are not.

    Args:
        x: (1|B, U) coordinates of the queries.
        y: (1|B, T) coordinates of the keys.
        strength: (1|H,) lam >= 0.
        mask: (B, T) bool, True where a key is data; None if nothing is padded.
        dims: insist on 2, 3 or 7 columns; None takes the fewest that are precise.

    Raises:
        ConfigError: something requires a gradient, shapes disagree, or (when q's type is known) `dims` would lose precision.
    """

    x: Tensor
    y: Tensor
    strength: Tensor
    mask: Tensor | None = None
    dims: int | None = None
    _cache: dict[Any, Columns] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        _check_fixed(x=self.x, y=self.y, strength=self.strength)
        batches = {t.shape[0] for t in (self.x, self.y, self.mask) if t is not None}
        if self.x.dim() != 2 or self.y.dim() != 2 or self.strength.dim() != 1 or len(batches - {1}) > 1:
            raise ConfigError(
                f"the Gaussian fold wants x (1|B, U), y (1|B, T), strength (1|H,), not "
                f"{tuple(self.x.shape)}, {tuple(self.y.shape)}, {tuple(self.strength.shape)}"
            )
        _check_mask(self.mask, self.y.shape[1])
        if self.dims not in (None, 2, 3, 7):
            raise ConfigError(f"a Gaussian folds into 2, 3 or 7 dimensions, not {self.dims}")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, dropout: float = 0.0) -> Tensor:
        """q (B, H, U, d), k, v (B, H, T, d) -> (B, H, U, d); see `kernels.attend`."""
        q, k, v = _autocast(q, k, v)
        return _attend_folded(q, k, v, self._columns(q), causal=False, dropout=dropout)

    def dense(self) -> Tensor:
        """(1|B, 1|H, U, T) the same as a plain bias, -inf on padding."""
        precise = torch.promote_types(torch.promote_types(self.x.dtype, self.y.dtype), torch.float32)
        x, y = self.x.to(precise), self.y.to(precise)
        bias = -self.strength.to(precise).view(1, -1, 1, 1) * (x[:, None, :, None] - y[:, None, None, :]).square()
        return bias if self.mask is None else bias.masked_fill(~self.mask[:, None, None, :], float("-inf"))

    def _columns(self, q: Tensor) -> Columns:
        """Built once for all layers; on CUDA it waits for the device, to see whether coordinates fit."""
        key = (q.shape[-1], q.dtype, operand_type(q))
        if key not in self._cache:
            empty = None if self.mask is None else _if_any(~self.mask.any(1)[:, None, None, None])
            fixed = self.x.detach(), self.y.detach(), self.strength.detach()
            self._cache[key] = gaussian_columns(*fixed, self.mask, empty, like=q, dims=self.dims)
        return self._cache[key]


@dataclass(frozen=True, eq=False)
class CausalLinearFold:
    """The fixed penalty m (i - j) on keys j <= i, later keys hidden: one column (two or three in 16 bit, if they are needed).

    Args:
        slopes: (1|H,) m >= 0.
        length: U = T, the number of queries and keys.
        mask: (B, T) bool, True where a key is data; None if nothing is padded.

    Raises:
        ConfigError: the slopes require a gradient, or shapes disagree.
    """

    slopes: Tensor
    length: int
    mask: Tensor | None = None
    _cache: dict[Any, Columns] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        _check_fixed(slopes=self.slopes)
        _check_mask(self.mask, self.length)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, dropout: float = 0.0) -> Tensor:
        """q, k, v (B, H, T, d) -> (B, H, T, d)."""
        _check_square(q, k, self.length)
        q, k, v = _autocast(q, k, v)
        return _attend_folded(q, k, v, self._columns(q), causal=True, dropout=dropout)

    def dense(self) -> Tensor:
        """(1|B, 1|H, T, T) the same as a plain bias, -inf on later keys and on padding."""
        bias = _dense_linear(self.slopes, self.length, self.mask)
        future = torch.ones(self.length, self.length, dtype=torch.bool, device=bias.device).triu(1)
        return bias.masked_fill(future, float("-inf"))

    def _columns(self, q: Tensor) -> Columns:
        key = (q.shape[-1], q.dtype, operand_type(q))
        if key not in self._cache:
            empty = None if self.mask is None else _if_any((self.mask.cumsum(1) == 0)[:, None, :, None])
            self._cache[key] = linear_columns(self.slopes, self.length, self.mask, empty, like=q)
        return self._cache[key]


@dataclass(frozen=True, eq=False)
class TwoPassLinear:
    """The fixed symmetric penalty m |i - j|: keys up to i and keys after i in a causal pass each, merged by log-sum-exp.

    Both passes cost as much as one pass without causality. On CUDA in bfloat16 and float16 only, where the flash kernel hands
    out its log-sum-exp for every row.

    Args:
        slopes: (1|H,) m >= 0.
        mask: (B, T) bool, True where a key is data; None if nothing is padded.

    Raises:
        ConfigError: the slopes require a gradient, shapes disagree, dropout is not 0, or float32 on CUDA.
    """

    slopes: Tensor
    mask: Tensor | None = None
    _cache: dict[Any, tuple[Columns, Columns, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        _check_fixed(slopes=self.slopes)
        _check_mask(self.mask)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, dropout: float = 0.0) -> Tensor:
        """q, k, v (B, H, T, d) -> (B, H, T, d)."""
        length = q.shape[-2] if self.mask is None else self.mask.shape[1]
        _check_square(q, k, length)
        if dropout > 0:
            raise ConfigError("two causal passes know no attention dropout: set the attention's dropout to 0, or backend: sdpa")
        q, k, v = _autocast(q, k, v)
        if q.is_cuda and q.dtype not in (torch.bfloat16, torch.float16):
            raise ConfigError(f"two causal passes on CUDA need bfloat16 or float16, not {q.dtype}: use backend: sdpa")
        forth, back, rows = self._columns(q)
        if length == 1:  # nothing is after the only key
            return _attend_folded(q, k, v, forth, causal=True, dropout=0.0)
        v_wide = F.pad(v, (0, forth.k.shape[-1]))
        earlier = (_append(q, forth.q), _append(k, forth.k), v_wide)
        # Backwards in time and strictly after: the first query has no key, the last key no query.
        reverse = _append(q.flip(-2), back.q), _append(k.flip(-2), back.k), v_wide.flip(-2)
        later = (reverse[0][..., 1:, :], reverse[1][..., :-1, :], reverse[2][..., :-1, :])
        out: Tensor = _MergedPasses.apply(*earlier, *later, rows, q.shape[-1] ** -0.5)
        out = out[..., : v.shape[-1]]
        return out if forth.empty is None else out.masked_fill(forth.empty, 0.0)

    def dense(self, length: int | None = None) -> Tensor:
        """(1|B, 1|H, T, T) the same as a plain bias, -inf on padding; without a mask, the length must be told."""
        length = length if self.mask is None else self.mask.shape[1]
        if length is None:
            raise ConfigError("dense() of a TwoPassLinear without a mask needs the length")
        return _dense_linear(self.slopes, length, self.mask)

    def _columns(self, q: Tensor) -> tuple[Columns, Columns, Tensor]:
        """Columns of both passes and m i (1|H, T), by which a pass's log-sum-exp is too large; the second pass is reversed."""
        length = q.shape[-2]
        key = (length, q.shape[-1], q.dtype, operand_type(q))
        if key not in self._cache:
            mask, slopes = self.mask, self.slopes.detach()
            empty = None if mask is None else _if_any(~mask.any(1)[:, None, None, None])
            forth = linear_columns(slopes, length, mask, empty, like=q)
            back = linear_columns(slopes, length, None if mask is None else mask.flip(1), empty, like=q)
            rows = slopes.double()[:, None] * centred_frames(length, q.device)
            self._cache[key] = (forth, back, rows.to(torch.promote_types(q.dtype, torch.float32)))
        return self._cache[key]


class _MergedPasses(torch.autograd.Function):
    """Two causal passes over folded q, k and v, the second reversed and one shorter, merged to one softmax over all keys.

    Backward calls the kernels' backward with the merged output and log-sum-exp, which makes the weights that they compute anew
    the weights of the whole softmax; ring attention does the same (Liu, Zaharia and Abbeel, 2023).
    """

    @staticmethod
    def forward(
        ctx: Any, q1: Tensor, k1: Tensor, v1: Tensor, q2: Tensor, k2: Tensor, v2: Tensor, rows: Tensor, scale: float
    ) -> Tensor:
        (out1, lse1, state1), (out2, lse2, state2) = _flash(q1, k1, v1, scale), _flash(q2, k2, v2, scale)
        lse1 = lse1 - rows
        lse2 = F.pad(lse2 - rows[..., 1:], (1, 0), value=float("-inf")).flip(-1)
        lse = torch.logaddexp(lse1, lse2)
        share = (lse1 - lse).exp().unsqueeze(-1)
        out = (share * out1 + (1 - share) * F.pad(out2, (0, 0, 1, 0)).flip(-2)).to(q1.dtype)
        ctx.save_for_backward(q1, k1, v1, q2, k2, v2, out, lse, rows)
        ctx.scale, ctx.states = scale, (state1, state2)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q1, k1, v1, q2, k2, v2, out, lse, rows = ctx.saved_tensors
        forth = _flash_backward(grad, q1, k1, v1, out, lse + rows, ctx.scale, ctx.states[0])
        grad, out, lse = grad.flip(-2)[..., 1:, :], out.flip(-2)[..., 1:, :], lse.flip(-1)[..., 1:]
        back = _flash_backward(grad, q2, k2, v2, out, lse + rows[..., 1:], ctx.scale, ctx.states[1])
        return *forth, *back, None, None


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    """Output, log-sum-exp (B, H, T) and what the kernel's backward wants besides, of one causal pass."""
    if not q.is_cuda:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
        return out, lse, ()
    out, lse, *state = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False, scale=scale)
    return out, lse, tuple(state[:6])  # cum_seq_q, cum_seq_k, max_q, max_k, and two of the random state


def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, state: tuple[Any, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    lse = lse.contiguous()
    if not q.is_cuda:
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return backward(grad, q, k, v, out, lse, 0.0, True, scale=scale)
    lengths, random = state[:4], state[4:]
    backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
    return backward(grad, q, k, v, out, lse, *lengths, 0.0, True, *random, scale=scale)


def _attend_folded(q: Tensor, k: Tensor, v: Tensor, columns: Columns, *, causal: bool, dropout: float) -> Tensor:
    """SDPA of the widened q and k with the scale of the narrow ones.

    v is widened by zeros: flash kernels want one width. On CPU, leaving v alone means the unfused kernel, which takes 1.1 times
    as long at T = 500 and 1.8 times at T = 1500 (4 heads of 64, batch of 4, forward and backward).
    """
    out = F.scaled_dot_product_attention(
        _append(q, columns.q),
        _append(k, columns.k),
        F.pad(v, (0, columns.k.shape[-1])),
        dropout_p=dropout,
        is_causal=causal,
        scale=q.shape[-1] ** -0.5,
    )[..., : v.shape[-1]]
    return out if columns.empty is None else out.masked_fill(columns.empty, 0.0)


def _append(x: Tensor, columns: Tensor) -> Tensor:
    return torch.cat([x, columns.expand(*x.shape[:-1], -1)], dim=-1)


def _dense_linear(slopes: Tensor, length: int, mask: Tensor | None) -> Tensor:
    precise = torch.promote_types(slopes.dtype, torch.float32)
    frames = torch.arange(length, dtype=precise, device=slopes.device)
    bias = -slopes.to(precise).view(1, -1, 1, 1) * (frames[:, None] - frames).abs()
    return bias if mask is None else bias.masked_fill(~mask[:, None, None, :], float("-inf"))


def _autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What autocast will make of them inside the kernel, now: columns must be cut for the type that is multiplied."""
    if not torch.is_autocast_enabled(q.device.type):
        return q, k, v
    dtype = torch.get_autocast_dtype(q.device.type)
    return tuple(x.to(dtype) if x.dtype == torch.float32 else x for x in (q, k, v))  # type: ignore[return-value]


def _if_any(rows: Tensor) -> Tensor | None:
    return rows if bool(rows.any()) else None


def _check_fixed(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.requires_grad:
            raise ConfigError(
                f"a folded penalty must be fixed, but {name} requires a gradient: fused 16-bit kernels would compute it with an "
                f"error above 100 % at 500 frames; choose learnable: none, or backend: sdpa, flex or eager"
            )


def _check_mask(mask: Tensor | None, length: int | None = None) -> None:
    if mask is not None and (mask.dtype != torch.bool or mask.dim() != 2 or length not in (None, mask.shape[1])):
        raise ConfigError(f"the mask must be bool (B, {length or 'T'}), not {mask.dtype} {tuple(mask.shape)}")


def _check_square(q: Tensor, k: Tensor, length: int) -> None:
    if not q.shape[-2] == k.shape[-2] == length:
        raise ConfigError(f"built for {length} queries and keys, called with {q.shape[-2]} and {k.shape[-2]}")
