"""From a penalty to a window: how far attention must look for what it misses to be at most a given share.

If content logits lie in [-B, B], a query's weight beyond W is greatest when all keys farther than W have +B and all others -B.
With R_W the penalty's own weight beyond W over that within W, sums of exp(-P) over the positions that can exist,

    weight beyond W      <=  e^(2B) R_W / (1 + e^(2B) R_W)  =: eps
    ||out - out_W||      <=  2 eps max_j ||v_j||              since out = (1 - eps') out_W + eps' out_far for an eps' <= eps

Keys are an interval that contains the query (a whole utterance, padding behind it, or the past of a causal query), so R_W is the
greatest of three: keys on both sides without end, on the left only, on the right only. A short side only adds weight within W.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from speechtx.attention.penalty import penalty
from speechtx.config.penalty import PenaltyConfig

MAX_POSITIONS = 1 << 20  # windows beyond a million positions (11 hours of 40 ms frames) are not looked for
ROUNDING = 1e-9  # of a logarithm of a sum of so many float64 numbers, with room to spare


def effective_window(config: PenaltyConfig, strength: Tensor, *, logit_bound: float, epsilon: float, spacing: float = 1.0) -> int:
    """The smallest window that provably cuts off at most `epsilon` of every query's attention, in every head.

    The proof holds for the penalty as given: while a ramp makes it weaker it does not, and a window that the configuration
    already has is not counted on.

    Args:
        config: the penalty; positions are integers.
        strength: s as `penalty` takes it, (sides, H, 1).
        logit_bound: B, a bound on |q.k| / sqrt(d_k) for every query and key.
        epsilon: the share, in (0, 1).
        spacing: from one position to the next in the configuration's unit: 1 for frames, else the milliseconds of a frame.

    Returns:
        W, at least one position, in the configuration's unit: a multiple of `spacing`, rounded up to an integer.

    Raises:
        ValueError: no window can be proved, and why.
    """
    if not 0.0 < epsilon < 1.0 or not 0.0 <= logit_bound < math.inf or not 1.0 <= spacing < math.inf:
        raise ValueError(f"epsilon {epsilon} must lie in (0, 1), logit_bound {logit_bound} be >= 0, spacing {spacing} >= 1")
    s = strength.detach().double().cpu()
    if reason := no_window(config, s):
        raise ValueError(f"no window bounds what attention loses: {reason}")
    soft = config.model_copy(update={"window": None})
    limit = math.log(epsilon) - math.log1p(-epsilon) - 2.0 * logit_bound - ROUNDING
    positions = 1024
    while True:
        certified = log_far_over_near(soft, s, positions=positions, spacing=spacing) <= limit
        # R_W falls with W, so the first certified one is the smallest; well before the end the tail's bound is sharp
        window = int(certified.long().argmax()) if certified.any() else positions
        if 8 * window <= positions or (positions >= MAX_POSITIONS and window < positions):
            return math.ceil(max(window, 1) * spacing)
        if positions >= MAX_POSITIONS:
            raise ValueError(
                f"no window below {MAX_POSITIONS} positions bounds what attention loses to {epsilon:g} with logits up to "
                f"{logit_bound:g}: the penalty ({config.shape}, strength from {float(s.min()):g}) is too weak"
            )
        positions *= 4


def no_window(config: PenaltyConfig, strength: Tensor) -> str:
    """Why the weight beyond every window is unbounded; empty if it is bounded."""
    if config.shape not in ("log", "linear", "gaussian", "power"):
        return f"shape {config.shape} does not grow with distance"
    if config.max_distance is not None:
        return f"max_distance {config.max_distance:g} ends the growth of the penalty"
    if config.apply != "logits":
        return f"apply: {config.apply} is no penalty of the logits"
    if not bool((strength > 0).all()) or not bool(strength.isfinite().all()):
        return "a head has strength 0, so it pays nothing"
    if config.shape == "log" and bool((strength <= 1).any()):
        return f"shape log with scale {float(strength.min()):g}: the sum of (1 + d)^-scale has no limit unless scale > 1"
    return ""


def log_far_over_near(config: PenaltyConfig, strength: Tensor, *, positions: int, spacing: float) -> Tensor:
    """An upper bound of ln R_W for W = 0, 1, ..., positions - 1, the worst over heads and keys: (positions,) float64."""
    distance = torch.arange(positions + 1, dtype=torch.float64) * spacing
    sides = [
        -penalty(config, sign * distance, strength) for sign in (-1.0, 1.0)[: len(strength)]
    ]  # ln exp(-P), (H, positions + 1)
    far, near = [], []
    for side, log_weight in enumerate(sides):
        tail = log_tail(config, strength[side, :, 0], last=positions, spacing=spacing)[:, None]
        beyond = torch.cat((log_weight[:, 1:], tail), dim=-1)  # keys 1, ..., positions, and all the others
        far.append(beyond.flip(-1).logcumsumexp(-1).flip(-1)[:, :positions])
        near.append(log_weight[:, :positions].logcumsumexp(-1))  # keys 0, ..., W: the query's own place counts on each side
    left, right = (far[0], near[0]), (far[-1], near[-1])
    both_far = torch.logaddexp(left[0], right[0])
    both_near = torch.logaddexp(left[1], right[1] + torch.log1p(-torch.exp(-right[1])))  # the own place only once
    ratios = (both_far - both_near, left[0] - left[1], right[0] - right[1])
    return torch.stack(ratios).amax(dim=(0, 1))


def log_tail(config: PenaltyConfig, strength: Tensor, *, last: int, spacing: float) -> Tensor:
    """An upper bound of ln sum_(k > last) exp(-P(k * spacing)) on one side, (H,); infinite where none is known.

    A staircase lies above its slope, n(d) >= u = (d - margin) / step, and a falling summand is below its integral:
    sum <= (1 / a) int_(u(last))^inf exp(-s rho(u)) du, with a = spacing / step from one u to the next. For log this is
    (1 + u)^(1 - s) / (s - 1). For s u^p, with z = s u^p, it is s^(-1/p) / p Gamma(1/p, z), and
    Gamma(c, z) <= z^(c - 1) e^-z / (1 - max(c - 1, 0) / z) for z > c - 1: put t = z + y and (1 + y/z)^(c-1) <= e^((c-1) y / z).
    """
    u = (last * spacing - config.margin) / config.step
    if u <= 0:
        return torch.full_like(strength, math.inf)
    if config.shape == "log":
        integral = (1.0 - strength) * math.log1p(u) - torch.log(strength - 1.0)
    else:
        p = {"linear": 1.0, "gaussian": 2.0}.get(config.shape, config.exponent or 1.0)
        c, z = 1.0 / p, strength * u**p
        gamma = (c - 1.0) * z.log() - z - torch.log1p(-max(c - 1.0, 0.0) / z)
        integral = torch.where(z > max(c - 1.0, 0.0), gamma - strength.log() / p - math.log(p), math.inf)
    return integral - math.log(spacing / config.step)
