"""Transformer and Conformer encoders."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from speechtx.attention.kernels import Bias
from speechtx.attention.linear import Linear
from speechtx.attention.multihead import SelfAttention
from speechtx.attention.relative import RelativeSelfAttention
from speechtx.attention.site import AttentionPenalty
from speechtx.config.penalty import PenaltyConfig
from speechtx.config.schema import EncoderConfig
from speechtx.model.convolution import ConvolutionModule
from speechtx.model.dropout import Dropout, depth_rates, left_out
from speechtx.model.inference import infer, may_infer
from speechtx.model.intermediate import IntermediateCtc
from speechtx.model.norm import make_norm
from speechtx.model.position import input_position
from speechtx.model.subsampling import make_subsampling, subsampled_length


def length_mask(lens: Tensor, length: int) -> Tensor:
    """(B, length) bool, True where there is data."""
    return torch.arange(length, device=lens.device) < lens.unsqueeze(1)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype matrix products of x will have: autocast's where it is on, else x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else x.dtype


class FeedForward(nn.Module):
    """Linear, activation, dropout, linear.

    Args:
        dim: D.
        ff_dim: inner width.
        dropout: probability, on the inner activations.
        activation: "relu" (Transformer) or "silu" (Conformer's swish).
    """

    def __init__(self, *, dim: int, ff_dim: int, dropout: float, activation: str = "relu") -> None:
        super().__init__()
        self.inner = Linear(dim, ff_dim)
        self.outer = Linear(ff_dim, dim)
        self.activation: nn.Module = {"relu": nn.ReLU(), "silu": nn.SiLU()}[activation]
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)"""
        return self.outer(self.dropout(self.activation(self.inner(x))))


def make_attention(config: EncoderConfig) -> SelfAttention:
    """The self-attention of a block, with the positions that act inside it."""
    shared = {"dim": config.dim, "num_heads": config.heads}
    if config.position == "relative":
        return RelativeSelfAttention(**shared, dropout=config.attention_dropout, weighting=config.attention_weights)
    rotary = config.position == "rotary"
    return SelfAttention(**shared, dropout=config.attention_dropout, weighting=config.attention_weights, rotary=rotary)


class TransformerEncoderLayer(nn.Module):
    """Pre-norm self-attention and feed-forward, each with a residual connection."""

    def __init__(self, *, config: EncoderConfig) -> None:
        super().__init__()
        dim = config.dim
        self.norm_attn = make_norm(config.norm, dim)
        self.attn = make_attention(config)
        self.norm_ff = make_norm(config.norm, dim)
        self.ff = FeedForward(dim=dim, ff_dim=config.ff_dim, dropout=config.dropout)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, *, bias: Bias, mask: Tensor) -> Tensor:
        """x (B, S, D), bias of the self-attention, mask (B, S) of data -> (B, S, D)"""
        x = x + self.dropout(self.attn(self.norm_attn(x, mask), bias=bias))
        return x + self.dropout(self.ff(self.norm_ff(x, mask)))


class ConformerEncoderLayer(nn.Module):
    """Half-step feed-forward, self-attention, convolution, half-step feed-forward, norm (Gulati et al. 2020, section 2.4)."""

    def __init__(self, *, config: EncoderConfig) -> None:
        super().__init__()
        dim = config.dim
        self.norm_ff_in = make_norm(config.norm, dim)
        self.ff_in = FeedForward(dim=dim, ff_dim=config.ff_dim, dropout=config.dropout, activation="silu")
        self.norm_attn = make_norm(config.norm, dim)
        self.attn = make_attention(config)
        self.norm_conv = make_norm(config.norm, dim)
        self.conv = ConvolutionModule(dim=dim, kernel=config.conv_kernel, norm=config.norm)
        self.norm_ff_out = make_norm(config.norm, dim)
        self.ff_out = FeedForward(dim=dim, ff_dim=config.ff_dim, dropout=config.dropout, activation="silu")
        self.norm_final = make_norm(config.norm, dim)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, *, bias: Bias, mask: Tensor) -> Tensor:
        """x (B, S, D), bias of the self-attention, mask (B, S) of data -> (B, S, D)"""
        if may_infer(self):
            return infer(self, x, bias=bias, mask=mask)
        x = x + 0.5 * self.dropout(self.ff_in(self.norm_ff_in(x, mask)))
        x = x + self.dropout(self.attn(self.norm_attn(x, mask), bias=bias))
        x = x + self.dropout(self.conv(self.norm_conv(x, mask), mask=mask))
        x = x + 0.5 * self.dropout(self.ff_out(self.norm_ff_out(x, mask)))
        return self.norm_final(x, mask)


class Encoder(nn.Module):
    """Features to one vector for every four frames (six or eight, as configured).

    Args:
        config: the encoder's shape.
        penalty: of the self-attention.
        num_mel_bins: F.
        backend: how the penalty is computed, see `speechtx.attention.backend`.
        frame_ms: milliseconds of one encoder frame, for a penalty in milliseconds.
    """

    def __init__(
        self,
        *,
        config: EncoderConfig,
        penalty: PenaltyConfig,
        num_mel_bins: int,
        backend: str = "auto",
        frame_ms: float = 40.0,
    ) -> None:
        super().__init__()
        self.config = config
        if backend == "auto" and (config.position == "relative" or config.attention_weights == "relu"):
            backend = "sdpa"  # the penalty as a dense bias, which these options add to or apply themselves
        self.attention_penalty = AttentionPenalty(
            penalty, num_layers=config.layers, num_heads=config.heads, backend=backend, spacing=frame_ms
        )
        self.subsampling = make_subsampling(config.subsampling, num_mel_bins=num_mel_bins, dim=config.dim)
        self.position = input_position(config.position, dim=config.dim, dropout=config.positional_dropout)
        layer = ConformerEncoderLayer if config.type == "conformer" else TransformerEncoderLayer
        self.layers = nn.ModuleList(layer(config=config) for _ in range(config.layers))
        self.depth_rates = depth_rates(config.stochastic_depth, config.layers)
        self.intermediate: IntermediateCtc | None = None  # given by the owner of the CTC output
        self.norm = nn.LayerNorm(config.dim)  # with either norm in the blocks: CTC and decoder get frames of one size

    def forward(self, feats: Tensor, feat_lens: Tensor, *, predictions: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Encodes a padded batch.

        Args:
            feats: (B, T, F) float, normalised features; what lies behind feat_lens never matters as long as it is finite.
            feat_lens: (B,) int64, frames.
            predictions: gets the log-probabilities (B, S, V) of intermediate CTC appended, layer by layer, if there is any.

        Returns:
            enc_out (B, S, D) and enc_lens (B,); rows of enc_out behind enc_lens are arbitrary.
        """
        x = self.position(self.subsampling(feats, feat_lens))
        enc_lens = subsampled_length(feat_lens, self.subsampling.factor)
        mask = length_mask(enc_lens, x.shape[1])
        for number, (layer, bias) in enumerate(zip(self.layers, self.biases(x, mask), strict=True), start=1):
            rate = self.depth_rates[number - 1] if self.training else 0.0
            if not left_out(rate):
                y = layer(x, bias=bias, mask=mask)
                # Stochastic depth in the manner of inverted dropout: the mean over draws is what evaluation computes.
                x = y if rate == 0.0 else x + (y - x) / (1.0 - rate)
            if self.intermediate is not None and number in self.intermediate.layers:
                x = self.intermediate(x, self.norm, predictions)
        return self.norm(x), enc_lens

    def biases(self, x: Tensor, mask: Tensor) -> list[Bias]:
        """What every layer adds to its attention logits, built once for a batch x (B, S, D) with mask (B, S)."""
        return self.attention_penalty(
            length=x.shape[1],
            mask=mask,
            device=x.device,
            dtype=compute_dtype(x),
            head_dim=self.config.dim // self.config.heads,
            dropout=self.config.attention_dropout if self.training else 0.0,
        )
