"""The numbers that a fold appends to queries and keys, cut so that the type they are multiplied in holds them exactly."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from speechtx.config.errors import ConfigError

# The query's side of every column that depends on the key alone; a power of two, so that float16 holds key * 1/256 up to 1.6e7.
_UNIT = 256.0
_ROOM = 1e4  # logits between a padded key and the worst visible one: exp underflows at -104, the rest is for q.k


class Columns(NamedTuple):
    """What is appended to q (1|B, 1|H, U, r) and to k (1|B, 1|H, T, r), and the queries without a key (B, 1, 1|U, 1), if any."""

    q: Tensor
    k: Tensor
    empty: Tensor | None


def gaussian_columns(
    x: Tensor, y: Tensor, strength: Tensor, mask: Tensor | None, empty: Tensor | None, *, like: Tensor, dims: int | None
) -> Columns:
    """Columns of -strength (x - y)^2, up to what depends on x alone.

    Args:
        x: (1|B, U) coordinates of the queries.
        y: (1|B, T) coordinates of the keys.
        strength: (1|H,)
        mask: (B, T) bool, False hides a key; or None.
        empty: for the result.
        like: the queries, for d, type and device.
        dims: 2, 3, 7, or None for the fewest that are precise.

    Raises:
        ConfigError: `dims` are too few for `like`'s type, or its range is.
    """
    y = y.double()
    centre = ((y.amin(1, keepdim=True) + y.amax(1, keepdim=True)) / 2).round()  # whole numbers stay whole
    x, y = x.double() - centre, y - centre
    head_dim = like.shape[-1]
    q, k = cut_gaussian(x, y, strength, head_dim=head_dim, dtype=operand_type(like), dims=dims)
    furthest = torch.maximum(x.abs().amax(1), y.abs().amax(1)).view(-1, 1, 1)
    # A visible key is at most 3 lam X^2 below the centre, where the padded keys are put.
    depth = (3 * strength.double().view(1, -1, 1) * furthest.square() + _ROOM) * head_dim**0.5
    return _finish(q, _hide(k, mask, depth, column={2: 1, 3: 1, 7: 4}[k.shape[-1]]), empty, like=like)


def cut_gaussian(
    x: Tensor, y: Tensor, strength: Tensor, *, head_dim: int, dtype: torch.dtype, dims: int | None = None
) -> tuple[Tensor, Tensor]:
    """The columns (1|B, 1|H, U|T, 2|3|7) in float64, of centred float64 coordinates, that `dtype` is to hold."""
    precise = dtype in (torch.float32, torch.float64)
    weight = strength.double().view(1, -1, 1) * head_dim**0.5
    if dims == 2 and not precise:
        raise ConfigError(
            f"a Gaussian in 2 dimensions loses all precision in {dtype} or TF32 (outputs wrong by more than 1): "
            f"leave dims open, or compute attention in float32 without TF32"
        )
    if dims == 2 or (dims is None and precise):
        return _cut_square(x, y, torch.ones_like(weight), weight, dtype, positions=1, squares=1)[:2]
    power = torch.log2(weight).round().exp2()
    on_grid = (weight - power).abs() <= 2.0**-20 * power  # what float32 made of a power of two; 0 stays 0
    stretch, factor = torch.where(on_grid, 1.0, weight.sqrt()), torch.where(on_grid, power, 1.0)
    if dims != 7:
        q, k, lossless = _cut_square(x, y, stretch, factor, dtype, positions=1, squares=2)
        if bool(on_grid.all() & lossless):
            return q, k
        if dims == 3:
            raise ConfigError(
                f"a Gaussian in 3 dimensions is exact in {dtype} only if lam * sqrt(d) is a power of two and coordinates are "
                f"whole and few (T <= 513 in bfloat16): leave dims open"
            )
    return _cut_square(x, y, stretch, factor, dtype, positions=2, squares=3)[:2]


def _cut_square(
    x: Tensor, y: Tensor, stretch: Tensor, factor: Tensor, dtype: torch.dtype, *, positions: int, squares: int
) -> tuple[Tensor, Tensor, Tensor]:
    """factor * (2 X Y - Y^2) with X = stretch * x, Y = stretch * y as columns of numbers that `dtype` holds.

    X and Y are cut into `positions` parts and Y^2, of the Y that the parts add up to, into `squares`: what is rounded is
    where a frame lies, never the balance between the terms. The third result says whether nothing was rounded at all.
    """
    xs, x_left = _cut(x[:, None, :] * stretch, positions, dtype)
    ys, y_left = _cut(y[:, None, :] * stretch, positions, dtype)
    zs, z_left = _cut(-factor * torch.stack(ys).sum(0).square() / _UNIT, squares, dtype)
    crossed = [2 * factor * part for part in xs]
    lossless = torch.stack([(left == 0).all() for left in (x_left, y_left, z_left, *(_cut(c, 1, dtype)[1] for c in crossed))])
    q = [part for part in crossed for _ in ys] + [torch.full_like(crossed[0], _UNIT)] * squares
    k = [part for _ in xs for part in ys] + zs
    return torch.stack(torch.broadcast_tensors(*q), -1), torch.stack(torch.broadcast_tensors(*k), -1), lossless.all()


def _cut(values: Tensor, count: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """`count` numbers of `dtype` (in float64) that add up to the values as nearly as they can, and what is left over."""
    parts = []
    for _ in range(count):
        parts.append(values.to(dtype).double())
        values = values - parts[-1]
    return parts, values


def linear_columns(slopes: Tensor, length: int, mask: Tensor | None, empty: Tensor | None, *, like: Tensor) -> Columns:
    """m j, in as few parts as hold it exactly, three at most (24 bits of bfloat16)."""
    weight = slopes.detach().double().view(1, -1, 1) * like.shape[-1] ** 0.5
    values = weight * centred_frames(length, like.device)
    dtype = operand_type(like)
    for count in (1,) if dtype in (torch.float32, torch.float64) else (1, 2, 3):
        parts, left = _cut(values / _UNIT, count, dtype)
        if count < 3 and bool((left == 0).all()):
            break
    k = torch.stack(parts, -1)
    depth = 4 * values.abs().amax(-1, keepdim=True) + _ROOM * like.shape[-1] ** 0.5
    return _finish(torch.full_like(k[:1, :1], _UNIT), _hide(k, mask, depth, column=0), empty, like=like)


def centred_frames(length: int, device: torch.device) -> Tensor:
    return torch.arange(length, dtype=torch.float64, device=device) - length // 2


def _hide(k: Tensor, mask: Tensor | None, depth: Tensor, *, column: int) -> Tensor:
    """Puts padded keys `depth` (1|B, 1|H, 1), in units of 1/scale, below the others, whatever their coordinate."""
    if mask is None:
        return k
    at = torch.zeros(k.shape[-1], dtype=k.dtype, device=k.device)
    at[column] = -1.0
    return torch.where(mask[:, None, :, None], k, at * (depth / _UNIT).unsqueeze(-1))


def _finish(q: Tensor, k: Tensor, empty: Tensor | None, *, like: Tensor) -> Columns:
    """The columns in `like`'s type; on CUDA widened by zeros to a multiple of 8, which every fused kernel accepts."""
    fill = -(like.shape[-1] + q.shape[-1]) % 8 if like.is_cuda else 0
    q, k = (F.pad(x, (0, fill)).to(like.dtype) for x in (q, k))
    if not bool(q.isfinite().all() & k.isfinite().all()):
        raise ConfigError(f"the folded penalty exceeds the range of {like.dtype}: use bfloat16 or float32, or backend: sdpa")
    return Columns(q, k, empty)


def operand_type(q: Tensor) -> torch.dtype:
    """The type whose numbers the kernel multiplies without rounding; TF32 keeps 11 bits of float32, bfloat16's 8 among them."""
    if q.dtype != torch.float32 or not q.is_cuda:
        return q.dtype
    setting = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    tf32 = torch.backends.cuda.matmul.allow_tf32 if setting is None else setting == "tf32"
    return torch.bfloat16 if tf32 else torch.float32
