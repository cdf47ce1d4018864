"""The Transformer decoder: all positions at once in training, one token a step with kept keys and values in search."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechtx.attention.kernels import Bias, attend, padding_bias
from speechtx.attention.multihead import CrossAttention, SelfAttention, join_heads
from speechtx.attention.site import AttentionPenalty
from speechtx.config.penalty import CrossPenaltyConfig, PenaltyConfig
from speechtx.config.schema import DecoderConfig
from speechtx.model.axis import Audio, AxisState
from speechtx.model.cross_penalty import CrossPenalty, CrossWalk
from speechtx.model.dropout import Dropout
from speechtx.model.encoder import FeedForward, compute_dtype, length_mask
from speechtx.model.position import input_position

KeyValue = tuple[Tensor, Tensor]
CrossBias = Callable[[CrossAttention, Tensor, Tensor], Tensor | None]  # of a layer, its queries' input and its keys


@dataclass(frozen=True)
class DecoderState:
    """What the decoder remembers between two steps of N = B * beam hypotheses; never changed in place.

    Attributes:
        position: tokens fed so far.
        own: per layer, self-attention keys and values (N, H, position, d); empty before the first step.
        cross: per layer, cross-attention keys and values (B, H, S, d), shared by the hypotheses of an utterance.
        cross_bias: (B, 1, 1, S), masks the encoder's padding.
        axis: where the hypotheses stand, if cross-attention pays for distance.
    """

    position: int
    own: tuple[KeyValue, ...]
    cross: tuple[KeyValue, ...]
    cross_bias: Tensor | None
    axis: AxisState | None = None

    def select(self, rows: Tensor) -> DecoderState:
        """The state with its hypotheses reordered.

        Args:
            rows: (N,) int64 into the flat N hypotheses; row n of the result continues hypothesis rows[n], which must belong
                to the same utterance.
        """
        own = tuple((k.index_select(0, rows), v.index_select(0, rows)) for k, v in self.own)
        return replace(self, own=own, axis=None if self.axis is None else self.axis.select(rows))

    def keep(self, utterances: Tensor) -> DecoderState:
        """The state of some utterances (int64 indices into B), each with all its hypotheses; for dropping finished ones."""
        batch = self.cross[0][0].shape[0]
        own = tuple(
            (k.unflatten(0, (batch, -1))[utterances].flatten(0, 1), v.unflatten(0, (batch, -1))[utterances].flatten(0, 1))
            for k, v in self.own
        )
        cross = tuple((k[utterances], v[utterances]) for k, v in self.cross)
        return DecoderState(
            self.position,
            own,
            cross,
            None if self.cross_bias is None else self.cross_bias[utterances],
            None if self.axis is None else self.axis.keep(utterances),
        )


class DecoderLayer(nn.Module):
    """Pre-norm causal self-attention, cross-attention and feed-forward, each with a residual connection."""

    def __init__(self, *, config: DecoderConfig, dim: int) -> None:
        super().__init__()
        self.norm_attn = nn.LayerNorm(dim)
        rotary = config.position == "rotary"
        self.attn = SelfAttention(dim=dim, num_heads=config.heads, dropout=config.attention_dropout, rotary=rotary)
        self.norm_cross = nn.LayerNorm(dim)
        self.cross = CrossAttention(dim=dim, num_heads=config.heads, dropout=config.attention_dropout)
        self.norm_ff = nn.LayerNorm(dim)
        self.ff = FeedForward(dim=dim, ff_dim=config.ff_dim, dropout=config.dropout)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, enc_out: Tensor, *, own_bias: Bias, cross_bias: CrossBias) -> Tensor:
        """x (B, U, D), enc_out (B, S, D) -> (B, U, D); own_bias is causal by itself, None is plain causal attention"""
        x = x + self.dropout(self.attn(self.norm_attn(x), bias=own_bias, causal=own_bias is None))
        query, (keys, values) = self.norm_cross(x), self.cross.project(enc_out)
        x = x + self.dropout(self.cross(query, keys, values, bias=cross_bias(self.cross, query, keys)))
        return x + self.dropout(self.ff(self.norm_ff(x)))

    def step(
        self, x: Tensor, own: KeyValue | None, cross: KeyValue, *, own_bias: Tensor | None, cross_bias: CrossBias
    ) -> tuple[Tensor, KeyValue]:
        """One position: x (N, 1, D) -> (N, 1, D) and the self-attention keys and values with this position's appended."""
        q, k, v = self.attn.project(self.norm_attn(x), start=0 if own is None else own[0].shape[2])
        if own is not None:
            k, v = torch.cat((own[0], k), dim=2), torch.cat((own[1], v), dim=2)
        x = x + self.attn.out(join_heads(attend(q, k, v, bias=own_bias)))
        # The hypotheses of an utterance stand where queries stand: (B, beam, D) against that utterance's one set of keys.
        grouped = self.norm_cross(x).view(cross[0].shape[0], -1, x.shape[-1])
        x = x + self.cross(grouped, *cross, bias=cross_bias(self.cross, grouped, cross[0])).view_as(x)
        return x + self.ff(self.norm_ff(x)), (k, v)


class Decoder(nn.Module):
    """Tokens and the encoder's output to scores of the next token.

    Args:
        config: the decoder's shape.
        dim: D, the encoder's width.
        vocab_size: V.
        penalty: of the self-attention; distances count tokens.
        cross_penalty: of the attention to the encoder, on an axis of its own (`speechtx.model.axis`).
        backend: how the penalty is computed in training, see `speechtx.attention.backend`.
    """

    def __init__(
        self,
        *,
        config: DecoderConfig,
        dim: int,
        vocab_size: int,
        penalty: PenaltyConfig | None = None,
        cross_penalty: CrossPenaltyConfig | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.config = config
        self.attention_penalty = AttentionPenalty(
            penalty or PenaltyConfig(), num_layers=config.layers, num_heads=config.heads, backend=backend, site="decoder_self"
        )
        self.cross_penalty: CrossPenalty | None = None
        if cross_penalty is not None and cross_penalty.shape != "none":
            self.cross_penalty = CrossPenalty(cross_penalty, num_layers=config.layers, num_heads=config.heads, dim=dim)
        self.embedding = nn.Embedding(vocab_size, dim)
        self.position = input_position(config.position, dim=dim, dropout=config.positional_dropout)
        self.layers = nn.ModuleList(DecoderLayer(config=config, dim=dim) for _ in range(config.layers))
        self.norm = nn.LayerNorm(dim)
        self.output = nn.Linear(dim, vocab_size)

    @property
    def needs_ctc(self) -> bool:
        """Whether `forward` and `start` want the CTC log-probabilities, in the mode (training or evaluation) it is in."""
        return self.cross_penalty is not None and self.cross_penalty.axis.needs_ctc()

    def forward(
        self,
        tokens_in: Tensor,
        token_lens: Tensor,
        enc_out: Tensor,
        enc_lens: Tensor,
        *,
        ctc_log_probs: Tensor | None = None,
    ) -> Tensor:
        """Teacher forcing.

        Args:
            tokens_in: (B, U) int64, starting with <sos/eos>; padding may be any valid id.
            token_lens: (B,) valid positions of tokens_in. Read by the axis `uniform` in training only: position i sees
                positions up to i, so padding cannot reach a valid position, and logits behind token_lens are arbitrary.
            enc_out: (B, S, D).
            enc_lens: (B,).
            ctc_log_probs: (B, S, V), read (and detached) if `needs_ctc`.

        Returns:
            logits (B, U, V); position i scores the token that follows tokens_in[:, i].
        """
        x = self.position(self.embedding(tokens_in))
        padding = padding_bias(length_mask(enc_lens, enc_out.shape[1]), dtype=compute_dtype(x))
        axis = self._start_axis(enc_lens, enc_out.shape[1], ctc_log_probs, beam=1, token_lens=token_lens - 1)
        walk = CrossWalk(self.cross_penalty, tokens_in, axis, padding)
        own_biases = self.attention_penalty(
            length=x.shape[1],
            device=x.device,
            dtype=compute_dtype(x),
            head_dim=x.shape[-1] // self.config.heads,
            dropout=self.config.attention_dropout if self.training else 0.0,
            causal=True,
        )
        for index, (layer, own_bias) in enumerate(zip(self.layers, own_biases, strict=True)):
            x = layer(x, enc_out, own_bias=own_bias, cross_bias=partial(walk.bias, index))
        return self.output(self.norm(x))

    def start(self, enc_out: Tensor, enc_lens: Tensor, *, beam: int, ctc_log_probs: Tensor | None = None) -> DecoderState:
        """The state before the first token of `beam` hypotheses for each of the B utterances; arguments as in `forward`."""
        if beam < 1:
            raise ValueError(f"beam {beam} must be at least 1")
        bias = padding_bias(length_mask(enc_lens, enc_out.shape[1]), dtype=compute_dtype(enc_out))
        cross = tuple(cast(DecoderLayer, layer).cross.project(enc_out) for layer in self.layers)
        axis = self._start_axis(enc_lens, enc_out.shape[1], ctc_log_probs, beam=beam, token_lens=None)
        return DecoderState(0, (), cross, bias, axis)

    def _start_axis(
        self, enc_lens: Tensor, frames: int, ctc_log_probs: Tensor | None, *, beam: int, token_lens: Tensor | None
    ) -> AxisState | None:
        if self.cross_penalty is None:
            return None
        if self.needs_ctc and ctc_log_probs is None:
            raise ValueError(f"axis {self.cross_penalty.axis.config.axis} needs ctc_log_probs, of `Recognizer.ctc_log_probs`")
        audio = Audio(lens=enc_lens, size=frames, log_probs=ctc_log_probs if self.needs_ctc else None)
        return self.cross_penalty.axis.start(audio, beam=beam, token_lens=token_lens)

    def step(self, tokens: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """Feeds one token to each hypothesis; dropout must be off (eval mode).

        Args:
            tokens: (N,) int64 with N = B * beam, utterance by utterance; <sos/eos> in the first step.
            state: of `start` or of the step before.

        Returns:
            log-probabilities (N, V) float32 of the next token, and the new state.
        """
        x = self.position(self.embedding(tokens).unsqueeze(1), start=state.position)
        own: list[KeyValue] = []
        own_biases = self.attention_penalty.last_row(state.position + 1, x.device, compute_dtype(x))
        walk = CrossWalk(self.cross_penalty, tokens.unsqueeze(1), state.axis, state.cross_bias)
        for index, layer in enumerate(self.layers):
            x, cache = cast(DecoderLayer, layer).step(
                x,
                state.own[index] if state.own else None,
                state.cross[index],
                own_bias=own_biases[index],
                cross_bias=partial(walk.bias, index),
            )
            own.append(cache)
        log_probs = F.log_softmax(self.output(self.norm(x)).squeeze(1).float(), dim=-1)
        return log_probs, replace(state, position=state.position + 1, own=tuple(own), axis=walk.state)
