"""The Transformer decoder: all positions at once in training, one token a step with kept keys and values in search.

With `type: mask_ctc` it is not causal: it predicts hidden tokens (fed as <blank>) from all others, before and behind, and search
makes whole passes too (Higuchi et al., Interspeech 2020; Ghazvininejad et al., EMNLP 2019).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechtx.attention.kernels import Bias, attend, attention_weights, padding_bias
from speechtx.attention.linear import Linear, PackedLinear
from speechtx.attention.multihead import CrossAttention, SelfAttention, split_heads
from speechtx.attention.site import AttentionPenalty
from speechtx.config.penalty import CrossPenaltyConfig, PenaltyConfig
from speechtx.config.schema import DecoderConfig
from speechtx.model.axis import Audio, AxisState
from speechtx.model.cross_penalty import CrossPenalty, CrossWalk
from speechtx.model.decoder_state import DecoderState, KeyValue, TokenTree
from speechtx.model.dropout import Dropout
from speechtx.model.encoder import FeedForward, compute_dtype, length_mask
from speechtx.model.one_step import FeedForwardStep, Norm, OwnStep, norm_of, normed
from speechtx.model.position import input_position

CrossBias = Callable[[CrossAttention, Tensor, Tensor], Tensor | None]  # of a layer, its queries' input and its keys


class DecoderLayer(nn.Module):
    """Pre-norm self-attention, cross-attention and feed-forward, each with a residual connection."""

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

    def forward(self, x: Tensor, cross: KeyValue, *, own_bias: Bias, cross_bias: CrossBias) -> Tensor:
        """x (B, U, D) -> (B, U, D), cross as in `DecoderState`; own_bias hides what it must, None is plain causal attention"""
        x = x + self.dropout(self.attn(self.norm_attn(x), bias=own_bias, causal=own_bias is None))
        query = self.norm_cross(x)
        x = x + self.dropout(self.cross(query, *cross, bias=cross_bias(self.cross, query, cross[0])))
        return x + self.dropout(self.ff(self.norm_ff(x)))


class _LayerStep(NamedTuple):
    """What one position needs of a layer, see `speechtx.model.one_step`."""

    own: OwnStep
    cross: CrossAttention
    norm_cross: Norm
    q: PackedLinear
    out: PackedLinear
    ff: FeedForwardStep

    @staticmethod
    def of(layer: DecoderLayer) -> _LayerStep:
        cross = layer.cross
        return _LayerStep(
            own=OwnStep.of(layer.norm_attn, layer.attn),
            cross=cross,
            norm_cross=norm_of(layer.norm_cross),
            q=PackedLinear.of(cross.q),
            out=PackedLinear.of(cross.out),
            ff=FeedForwardStep.of(layer.norm_ff, layer.ff),
        )

    def __call__(
        self, x: Tensor, own: Tensor | None, cross: KeyValue, *, position: int, own_bias: Tensor, cross_bias: CrossBias
    ) -> tuple[Tensor, Tensor]:
        """One position.

        Args:
            x: (N, D).
            own, cross: as in `DecoderState`.
            position: of x.
            own_bias: (B, 1 or H, beam, P + beam) for the tokens of `own` and then those of x.
            cross_bias: see `CrossBias`.

        Returns:
            (N, D) and `own` with the keys and values of this position.
        """
        # The hypotheses of an utterance stand where queries stand: (B, beam, ...) against that utterance's tokens and frames.
        batch, heads, beam = len(own_bias), self.own.heads, own_bias.shape[2]
        qkv = self.own.project(x, position).view(batch, beam, 3, heads, -1)
        own = qkv[:, :, 1:] if own is None else torch.cat((own, qkv[:, :, 1:]), dim=1)
        q, (k, v) = qkv[:, :, 0].transpose(1, 2), own.transpose(1, 3).unbind(2)
        x = self.own.add(x, attend(q, k, v, bias=own_bias).transpose(1, 2))
        query = normed(x, self.norm_cross).view(batch, beam, -1)
        q = self.q(query).view(batch, beam, heads, -1).transpose(1, 2)
        found = attend(q, *cross, bias=cross_bias(self.cross, query, cross[0]))
        x = x + self.out(found.transpose(1, 2).reshape(x.shape))
        return self.ff(x), own


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
        self.causal = config.type == "attention"
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
        self.output = Linear(dim, vocab_size)

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
            tokens_in: (B, U) int64, starting with <sos/eos>; not causal: the tokens themselves, <blank> where hidden. Padding may
                be any valid id.
            token_lens: (B,) valid positions of tokens_in. Logits behind them are arbitrary.
            enc_out: (B, S, D).
            enc_lens: (B,).
            ctc_log_probs: (B, S, V), read (and detached) if `needs_ctc`.

        Returns:
            logits (B, U, V); position i scores the token that follows tokens_in[:, i]; not causal: token i itself.
        """
        bias = padding_bias(length_mask(enc_lens, enc_out.shape[1]), dtype=compute_dtype(enc_out))
        cross = tuple(cast(DecoderLayer, layer).cross.project(enc_out) for layer in self.layers)
        count = token_lens - 1 if self.causal else token_lens
        axis = self._start_axis(enc_lens, enc_out.shape[1], ctc_log_probs, beam=1, token_lens=count)
        return self.score(tokens_in, token_lens, DecoderState(0, cross, bias, axis))

    def score(self, tokens_in: Tensor, token_lens: Tensor, state: DecoderState) -> Tensor:
        """Logits of all positions, as `forward`, against the encoder's output that `state` of `start` (beam 1) holds."""
        x = self.position(self.embedding(self._noisy(tokens_in)))
        walk = CrossWalk(self.cross_penalty, tokens_in, state.axis, state.cross_bias)
        own_biases = self.attention_penalty(
            length=x.shape[1],
            # causal, position i sees positions up to i, so that padding reaches none that is valid
            mask=None if self.causal else length_mask(token_lens.clamp(min=1), x.shape[1]),
            device=x.device,
            dtype=compute_dtype(x),
            head_dim=x.shape[-1] // self.config.heads,
            dropout=self.config.attention_dropout if self.training else 0.0,
            causal=self.causal,
        )
        for index, (layer, own_bias) in enumerate(zip(self.layers, own_biases, strict=True)):
            x = layer(x, state.cross[index], own_bias=own_bias, cross_bias=partial(walk.bias, index))
        return self.output(self.norm(x))

    def _noisy(self, tokens_in: Tensor) -> Tensor:
        """The prefixes with some tokens replaced by any others, so that a wrong one in search does not lead astray.

        Scheduled sampling (Bengio et al., NeurIPS 2015) feeds the model's own predictions instead, for a second pass. Neither
        <sos/eos>, which starts every prefix, nor <blank> takes part.
        """
        if not self.training or self.config.input_noise == 0.0:
            return tokens_in
        sos_eos = self.output.out_features - 1
        replaced = torch.rand(tokens_in.shape, device=tokens_in.device) < self.config.input_noise
        return torch.where(replaced & (tokens_in != sos_eos), torch.randint_like(tokens_in, 1, sos_eos), tokens_in)

    def start(self, enc_out: Tensor, enc_lens: Tensor, *, beam: int, ctc_log_probs: Tensor | None = None) -> DecoderState:
        """The state before the first token of `beam` hypotheses for each of the B utterances; arguments as in `forward`."""
        if beam < 1:
            raise ValueError(f"beam {beam} must be at least 1")
        mask = length_mask(enc_lens, enc_out.shape[1])
        bias = None if mask.all() else padding_bias(mask, dtype=compute_dtype(enc_out))
        cross = tuple(cast(DecoderLayer, layer).cross.project(enc_out) for layer in self.layers)
        axis = self._start_axis(enc_lens, enc_out.shape[1], ctc_log_probs, beam=beam, token_lens=None)
        tree = TokenTree.start(len(enc_out), beam, dtype=compute_dtype(enc_out), device=enc_out.device)
        steps = tuple(_LayerStep.of(cast(DecoderLayer, layer)) for layer in self.layers)
        return DecoderState(0, cross, bias, axis, tree=tree, steps=steps)

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
        assert state.tree is not None
        x = self.position(self.embedding(tokens).unsqueeze(1), start=state.position).squeeze(1)
        tree = state.tree.grow(state.position)
        own_biases = self._own_biases(state.position, tree)
        walk = CrossWalk(self.cross_penalty, tokens.unsqueeze(1), state.axis, state.cross_bias)
        cross_biases: list[CrossBias] = [partial(walk.bias, index) for index in range(len(self.layers))]
        watch = _Watch(cross_biases[-1])
        if state.looked is not None:
            cross_biases[-1] = watch
        own: list[Tensor] = []
        for index, layer in enumerate(state.steps):
            x, cache = layer(
                x,
                state.own[index] if state.own else None,
                state.cross[index],
                position=state.position,
                own_bias=own_biases[index],
                cross_bias=cross_biases[index],
            )
            own.append(cache)
        log_probs = F.log_softmax(self.output(self.norm(x)).float(), dim=-1)
        new = replace(state, position=state.position + 1, own=tuple(own), tree=tree, axis=walk.state, looked=watch.weights)
        return log_probs, new

    def _own_biases(self, position: int, tree: TokenTree) -> list[Tensor]:
        """For every layer the bias (B, 1 or H, beam, P) of the tokens in the tree, seen from `position`."""
        biases: list[Tensor] = []
        rows = self.attention_penalty.last_row(position + 1, tree.mask.device, tree.mask.dtype)
        for index, row in enumerate(rows):
            same = next((i for i in range(index) if rows[i] is row), None)
            biases.append(tree.bias(row) if same is None else biases[same])
        return biases


class _Watch:
    """Notes where a layer looks when it asks for its bias.

    Attributes:
        weights: (N, S) attention weights on average over heads; None before.
    """

    def __init__(self, bias: CrossBias) -> None:
        self.bias = bias
        self.weights: Tensor | None = None

    def __call__(self, attn: CrossAttention, query: Tensor, keys: Tensor) -> Tensor | None:
        bias = self.bias(attn, query, keys)
        weights = attention_weights(split_heads(attn.q(query), attn.num_heads), keys, bias=bias)
        self.weights = weights.mean(dim=1).flatten(0, 1)
        return bias
