"""The penalty of cross-attention: an axis says where tokens and frames lie, `AttentionPenalty` what their distance costs."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from speechtx.attention.kernels import attention_weights
from speechtx.attention.multihead import CrossAttention, split_heads
from speechtx.attention.site import AttentionPenalty
from speechtx.config.penalty import CrossPenaltyConfig
from speechtx.model.axis import AXES, AxisState

_AHEAD = 16  # positions whose biases a search computes at once, where they do not depend on what it finds


class CrossPenalty(nn.Module):
    """The decoder's cross-attention as one site, with what axis and penalty learn.

    Args:
        config: of the site; its shape is not none.
        num_layers: of the decoder.
        num_heads: H of the decoder.
        dim: D, its width.
    """

    def __init__(self, config: CrossPenaltyConfig, *, num_layers: int, num_heads: int, dim: int) -> None:
        super().__init__()
        self.axis = AXES[config.axis](config=config, num_layers=num_layers, dim=dim)
        self.penalty = AttentionPenalty(config, num_layers=num_layers, num_heads=num_heads, site="cross")
        self.heads = None if config.heads == "all" else list(config.selected_heads(num_heads))
        self.same_everywhere = not self.axis.by_layer and config.learnable == "none"


class CrossWalk:
    """One pass of tokens through the decoder's layers, which ask it for their bias one after the other.

    Teacher forcing makes one walk with all tokens; search makes one for every token.

    Args:
        site: None if cross-attention pays nothing: then every bias is the padding, and nothing is computed.
        tokens: (N, L) the decoder's input.
        state: of the axis, for N hypotheses; None without a site.
        padding: (B, 1, 1, S) 0 or -inf, of the queries' dtype.

    Attributes:
        state: of the axis, complete once the last layer has asked.
    """

    def __init__(self, site: CrossPenalty | None, tokens: Tensor, state: AxisState | None, padding: Tensor | None) -> None:
        self.site, self.state, self.padding = site, state, padding
        self._x: Tensor | None = None
        self._shared: Tensor | None = None  # the bias of all layers that pay, where they pay the same
        self._below: Tensor | None = None  # (B, Q, S) where the layer below looked, if the axis wants to know
        if site is None or state is None:
            return
        if tokens.shape[1] == 1 and site.axis.even and site.same_everywhere:
            self._step_ahead(site, state)
        else:
            self._x, self.state = site.axis.advance(tokens, state)

    def _step_ahead(self, site: CrossPenalty, state: AxisState) -> None:
        """One step of an even axis: its bias (B, 1 or H, 1, S), the same for all hypotheses, is one row of a table."""
        row = state.position % _AHEAD
        if row == 0 or state.ahead is None:
            position = torch.arange(state.position - row, state.position - row + _AHEAD, device=state.y.device)
            x = site.axis.evenly(position, state)
            state = replace(state, ahead=self._between(site, min(site.penalty.layers), x, state.y, x.dtype))
        assert state.ahead is not None
        self._shared = state.ahead[:, :, row : row + 1]
        self.state = replace(state, position=state.position + 1)

    def bias(self, layer: int, attn: CrossAttention, query: Tensor, keys: Tensor) -> Tensor | None:
        """The bias of one layer.

        Args:
            layer: counted from 0; layers ask in their order.
            attn: the layer's cross-attention.
            query: (B, Q, D) its normed input: Q tokens in training, Q hypotheses in search.
            keys: (B, H, S, d) of `attn.project`.

        Returns:
            (B, 1 or H, Q, S); the padding for a layer that does not pay.
        """
        if self.site is None:
            return self.padding
        bias = self._charge(self.site, layer, query) if layer in self.site.penalty.layers else self.padding
        if self.site.axis.uses_weights and layer + 1 in self.site.penalty.layers:
            self._below = self._look(self.site, attn, query, keys, bias)
        return bias

    def _charge(self, site: CrossPenalty, layer: int, query: Tensor) -> Tensor | None:
        if self._shared is not None:
            return self._shared
        assert self.state is not None
        x = self._x
        if site.axis.by_layer:
            x, self.state = site.axis.at_layer(layer, query, self._below, self.state)
        if x is None:
            return self.padding
        bias = self._between(site, layer, x, self.state.y, query.dtype)
        self._shared = bias if site.same_everywhere else None
        return bias

    def _between(self, site: CrossPenalty, layer: int, x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor | None:
        dtype = dtype if self.padding is None else self.padding.dtype
        bias = site.penalty.between(layer, x, y.to(x.dtype), dtype=dtype)
        return bias if bias is None or self.padding is None else bias + self.padding

    @staticmethod
    @torch.no_grad()
    def _look(site: CrossPenalty, attn: CrossAttention, query: Tensor, keys: Tensor, bias: Tensor | None) -> Tensor:
        """(B, Q, S) attention weights, on average over the heads that pay."""
        q = split_heads(attn.q(query), attn.num_heads)
        if site.heads is not None:
            q, keys = q[:, site.heads], keys[:, site.heads]
            bias = bias[:, site.heads] if bias is not None and bias.shape[1] > 1 else bias
        return attention_weights(q, keys, bias=bias).mean(dim=1)
