"""One site that pays a penalty (the encoder's or the decoder's self-attention, or cross-attention): from schema to biases.

The biases of all layers are built once per batch and shared wherever layers pay the same. Which kernel computes them is
`speechtx.attention.backend`'s choice.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from speechtx.attention.backend import choose_backend
from speechtx.attention.blocks import BlockBias
from speechtx.attention.bound import effective_window
from speechtx.attention.kernels import Bias, EagerBias, dense_bias, padding_bias
from speechtx.attention.penalty import Strength, initial_strength, penalty, strength_of
from speechtx.attention.study import AfterSoftmax
from speechtx.config.errors import ConfigError
from speechtx.config.penalty import PenaltyConfig, RampConfig, unit_problem


class AttentionPenalty(nn.Module):
    """The penalty of one site, with what it learns.

    Args:
        config: the site's section.
        num_layers: layers of the encoder or decoder.
        num_heads: H.
        backend: of `AttentionPenaltyConfig`.
        spacing: what one position is worth in the unit of the configuration: milliseconds of an encoder frame, or 1.
        site: the name that messages show.

    Raises:
        ConfigError: lengths in milliseconds that are no whole number of frames; `window: auto` where no window can be proved.
    """

    def __init__(
        self,
        config: PenaltyConfig,
        *,
        num_layers: int,
        num_heads: int,
        backend: str = "auto",
        spacing: float = 1.0,
        site: str = "encoder_self",
    ) -> None:
        super().__init__()
        self.spacing = spacing if config.unit == "ms" else 1.0
        if problem := unit_problem(config, self.spacing):
            raise ConfigError(f"attention_penalty.{site}.{problem[0]} {problem[1]}")
        self.config = _with_numeric_window(config, num_heads=num_heads, spacing=self.spacing, site=site)
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.backend = backend
        self.site = site
        self.layers = frozenset(config.selected_layers(num_layers)) if config.shape != "none" else frozenset()
        self.strength = Strength(self.config, num_layers=num_layers, num_heads=num_heads)
        if config.ramp is not None:
            self.register_buffer("steps", torch.zeros(()))

    # ---------------------------------------------------------------------------------------------------- strength

    def at_step(self, step: int) -> None:
        """Tells the ramp how many training steps are done; checkpoints keep it, so decoding uses the strength trained with."""
        if self.config.ramp is not None:
            self.get_buffer("steps").fill_(step)

    def values(self, layer: int, offset: Tensor) -> Tensor:
        """P(offset) of every head of a layer: (1 or H, *offset.shape), at least float32; zero for heads that do not pay."""
        value = penalty(self.config, offset, self.strength(layer).to(offset.dtype))
        if self.config.ramp is not None:
            factor = ramp_factor(self.config.ramp, self.get_buffer("steps"))
            value = torch.where(value.isinf(), value, value * factor)
        if self.config.heads == "all":
            return value
        chosen = torch.tensor(self.config.selected_heads(self.num_heads), device=offset.device)
        everyone = value.new_zeros(self.num_heads, *offset.shape)
        return everyone.index_copy(0, chosen, value.expand(len(chosen), *offset.shape))

    def by_offset(
        self, layer: int, length: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """-P for the offsets -(length - 1) .. length - 1 of square attention: (1 or H, 2 * length - 1), at least float32."""
        precise = torch.promote_types(dtype, torch.float32)
        offset = torch.arange(1 - length, length, device=device, dtype=precise) * self.spacing
        return -self.values(layer, offset)

    @property
    def window_frames(self) -> int | None:
        """How many positions to each side may be attended to, if that is limited for every head."""
        if self.config.window is None or self.config.heads != "all":
            return None
        assert not isinstance(self.config.window, str)  # numeric since __init__
        return math.floor(self.config.window / self.spacing)

    # ---------------------------------------------------------------------------------------------------- biases

    def forward(
        self,
        *,
        length: int,
        mask: Tensor | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        head_dim: int = 64,
        dropout: float = 0.0,
        causal: bool = False,
    ) -> list[Bias]:
        """The biases of square self-attention, one per layer.

        Args:
            length: T.
            mask: (B, T) bool, True where there is data; None if nothing is padded.
            device: where they are wanted.
            dtype: of queries and keys; penalties are computed in float32 and rounded once.
            head_dim: d, which decides whether a fold is free.
            dropout: of the attention weights; not every kernel has it.
            causal: whether a query sees keys up to its own position only; merged into every bias of a layer that pays. A layer
                that does not pay gets None, and its caller says `causal` to the kernel.
        """
        nothing: Bias = None if causal else padding_bias(mask, dtype=dtype)
        biases: list[Bias] = [nothing] * self.num_layers
        shared: Bias = None
        for layer in sorted(self.layers):
            if self.config.learnable != "none" or shared is None:
                shared = self._build(layer, length, mask, torch.device(device), dtype, head_dim, dropout, causal)
            biases[layer] = shared
        return biases

    def _build(
        self,
        layer: int,
        length: int,
        mask: Tensor | None,
        device: torch.device,
        dtype: torch.dtype,
        head_dim: int,
        dropout: float,
        causal: bool,
    ) -> Bias:
        if self.config.apply == "after_softmax":
            return AfterSoftmax(-toeplitz(self.by_offset(layer, length, device)), padding_bias(mask, dtype=dtype))
        backend = choose_backend(
            self.backend,
            self.config,
            site=self.site,
            device=device,
            dtype=dtype,
            length=length,
            window=self.window_frames,
            head_dim=head_dim,
            dropout=dropout,
            padded=mask is not None,
            causal=causal,
        )
        if backend in ("sdpa", "eager"):
            dense = dense_self_bias(self.by_offset(layer, length, device, dtype), dtype=dtype, mask=mask, causal=causal)
            return dense if backend == "sdpa" else EagerBias(dense)
        if backend == "blocks":
            assert self.window_frames is not None  # the schema requires it
            return BlockBias(self.by_offset(layer, self.window_frames + 1, device, dtype), mask)
        return self._special(backend, layer, length, mask, device, causal)

    def _special(self, backend: str, layer: int, length: int, mask: Tensor | None, device: torch.device, causal: bool) -> Bias:
        """Biases of the kernels that most runs never meet, imported only when one does."""
        if backend == "flex":
            from speechtx.attention.flex import FlexBias

            table = self.by_offset(layer, length, device)
            return FlexBias(by_offset=table, window=self.window_frames, mask=mask, causal=causal)
        strength = self.strength(layer)[0, :, 0].to(device)
        if self.config.ramp is not None:
            strength = strength * ramp_factor(self.config.ramp, self.get_buffer("steps"))
        if backend == "flash_attn":
            from speechtx.attention.flash import SlopeBias

            slopes = (strength * self.spacing).expand(self.num_heads)
            return SlopeBias(slopes=slopes, window=self.window_frames, causal=causal, mask=mask)
        from speechtx.attention.fold import CausalLinearFold, GaussianFold, TwoPassLinear

        if self.config.shape == "gaussian":
            position = torch.arange(length, device=device, dtype=torch.float32).unsqueeze(0) * self.spacing
            return GaussianFold(x=position, y=position, strength=strength, mask=mask)
        slopes = strength * self.spacing
        if causal:
            return CausalLinearFold(slopes=slopes, length=length, mask=mask)
        return TwoPassLinear(slopes=slopes, mask=mask)

    def last_row(self, length: int, device: torch.device | str, dtype: torch.dtype) -> list[Tensor | None]:
        """The biases (1, 1 or H, 1, length) of the newest of `length` positions of causal self-attention; None if free."""
        rows: list[Tensor | None] = [None] * self.num_layers
        shared: Tensor | None = None
        for layer in sorted(self.layers):
            if self.config.learnable != "none" or shared is None:
                shared = self.by_offset(layer, length, device, dtype)[:, :length].to(dtype)[None, :, None, :]
            rows[layer] = shared
        return rows

    def between(
        self, layer: int, x: Tensor, y: Tensor, *, mask: Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor | None:
        """The bias of non-square attention in one layer.

        Args:
            layer: counted from 0.
            x: (B, U) coordinates of the queries, at least float32.
            y: (B, S) coordinates of the keys, on the same axis.
            mask: (B, S) bool of the keys that are data.
            dtype: of the queries.

        Returns:
            (B, 1 or H, U, S); only the padding (B, 1, 1, S), or None, for a layer that does not pay.
        """
        if layer not in self.layers:
            return padding_bias(mask, dtype=dtype)
        bias = -self.values(layer, y.unsqueeze(1) - x.unsqueeze(2)).transpose(0, 1).to(dtype)
        return bias if mask is None else bias.masked_fill(~mask[:, None, None, :], float("-inf"))


def build_bias(
    config: PenaltyConfig,
    *,
    length: int,
    num_heads: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    mask: Tensor | None = None,
) -> Tensor | None:
    """The dense bias of one layer of square self-attention; see `AttentionPenalty.forward`."""
    site = AttentionPenalty(config, num_layers=1, num_heads=num_heads, backend="sdpa").to(device)
    bias = site(length=length, mask=mask, device=device, dtype=dtype)[0]
    return dense_bias(bias)


def toeplitz(by_offset: Tensor) -> Tensor:
    """(H, 2T-1) values by offset -> (H, T, T) with [i, j] the value at offset j - i."""
    length = (by_offset.shape[-1] + 1) // 2
    return by_offset.unfold(-1, length, 1).flip(-2)


def dense_self_bias(
    by_offset: Tensor, *, dtype: torch.dtype = torch.float32, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """The additive bias of square self-attention as one tensor.

    Args:
        by_offset: (1 or H, 2T-1) of -P.
        dtype: of the queries, because the fused kernels want a bias of their own type.
        mask: (B, T) bool, True where there is data.
        causal: hides the keys to the right.

    Returns:
        (1 or B, 1 or H, T, T). Every dimension is 1 or full, which is what keeps PyTorch's fused CPU kernel.
    """
    bias = toeplitz(by_offset.to(dtype)).unsqueeze(0)
    hidden = None if mask is None else ~mask[:, None, None, :]
    if causal:
        future = torch.ones(bias.shape[-2:], dtype=torch.bool, device=bias.device).triu(1)
        hidden = future if hidden is None else hidden | future
    return bias if hidden is None else bias.masked_fill(hidden, float("-inf"))


def ramp_factor(ramp: RampConfig, steps: Tensor) -> Tensor:
    """The factor after so many training steps: linear from `from` to `to`, then constant."""
    return ramp.start + (ramp.end - ramp.start) * (steps / ramp.steps).clamp(max=1.0)


def _with_numeric_window(config: PenaltyConfig, *, num_heads: int, spacing: float, site: str) -> PenaltyConfig:
    if config.window != "auto":
        return config
    assert config.logit_bound is not None  # the schema requires it
    strength = strength_of(config, initial_strength(config, len(config.selected_heads(num_heads))).unsqueeze(-1))
    bounds = {"logit_bound": config.logit_bound, "epsilon": config.epsilon, "spacing": spacing}
    try:
        window = effective_window(config, strength, **bounds)
    except ValueError as err:
        raise ConfigError(f"attention_penalty.{site}.window: auto: {err}; give the window as a number") from None
    return config.model_copy(update={"window": window})
