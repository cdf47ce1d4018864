"""Language models over tokens: what a search asks of any of them, and a causal Transformer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechtx.attention.kernels import attend, padding_bias
from speechtx.attention.linear import Linear
from speechtx.attention.multihead import SelfAttention
from speechtx.config.lm import TransformerLmConfig
from speechtx.model.dropout import Dropout
from speechtx.model.encoder import FeedForward, compute_dtype, length_mask
from speechtx.model.one_step import FeedForwardStep, OwnStep
from speechtx.model.position import SinusoidalPosition


class LmState(Protocol):
    """What a language model remembers of N hypotheses between two steps; never changed in place, but by `put`."""

    def select(self, rows: Tensor) -> Self:
        """The state whose row i continues hypothesis rows[i]; rows (M,) int64 may repeat, reorder and drop hypotheses."""
        ...

    def put(self, rows: Tensor, other: Self) -> Self:
        """The state in which rows (M,) int64, none twice, continue the M hypotheses of `other`, and the rest as before.

        They may have been fed more or fewer tokens. May take over memory: afterwards `self` must not be used any more.
        """
        ...


class LanguageModel(Protocol):
    """A scorer of tokens, all hypotheses at once: `TransformerLM`, `ngram.NgramLM`, `lexicon.LexiconLM`, `kenlm_lm.KenlmLM`.

    Each is an nn.Module.

    Attributes:
        vocab_size: V, of the tokenizer that the model was made with.
    """

    vocab_size: int

    def start(self, num: int) -> Any:
        """The `LmState` of `num` hypotheses before anything was fed; the first token to feed is <sos/eos>."""
        ...

    def step(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Feeds tokens (N,) int64; returns log P(next token) (N, V) float32, normalised, -inf for <blank>, and the new state.

        The last column is the end of the sentence.
        """
        ...


@dataclass(frozen=True)
class TransformerLmState:
    """Keys and values of what was fed so far.

    Attributes:
        layers: what each does with one position.
        num: N.
        own: (P, M, layers, 2, H, d) keys and values, P at least `position`.
        position: tokens fed so far, to any hypothesis.
        rows: (N,) which of the M hypotheses in `own` each continues; None if it is itself, and M is N.
        fed: (N,) tokens fed to each, where they are not as many (and keys and values behind them arbitrary); else None.
    """

    layers: tuple[tuple[OwnStep, FeedForwardStep], ...]
    num: int
    own: Tensor
    position: int = 0
    rows: Tensor | None = None
    fed: Tensor | None = None

    def select(self, rows: Tensor) -> TransformerLmState:
        """See `LmState.select`; nothing is copied before the next step, which copies anyway."""
        fed = None if self.fed is None else self.fed[rows]
        longest = self.position if fed is None else int(fed.max())
        rows_of_own = rows if self.rows is None else self.rows[rows]
        return replace(self, num=len(rows), position=longest, rows=rows_of_own, fed=fed)

    def put(self, rows: Tensor, other: TransformerLmState) -> TransformerLmState:
        """See `LmState.put`."""
        fed = self._fed(rows).index_copy(0, rows, other._fed(rows))
        longest = max(self.position, other.position)
        own = self.own if self.rows is None and longest <= len(self.own) else self.past(2 * longest)
        own[: other.position].index_copy_(1, rows, other.past(other.position))
        return replace(self, own=own, position=longest, rows=None, fed=fed)

    def past(self, room: int) -> Tensor:
        """(room, N, layers, 2, H, d): keys and values of the N, copied to where there is room for as many positions."""
        past = self.own.new_empty(room, self.num, *self.own.shape[2:])
        own = self.own[: self.position].detach()  # nobody differentiates a search, and `out` could not
        if self.rows is None:
            past[: self.position] = own
        else:
            torch.index_select(own, 1, self.rows, out=past[: self.position])
        past[self.position :] = 0.0  # what is masked must be finite
        return past

    def _fed(self, like: Tensor) -> Tensor:
        return like.new_full((self.num,), self.position) if self.fed is None else self.fed


class TransformerLmLayer(nn.Module):
    """Pre-norm causal self-attention and feed-forward, each with a residual connection."""

    def __init__(self, *, config: TransformerLmConfig) -> None:
        super().__init__()
        self.norm_attn = nn.LayerNorm(config.dim)
        self.attn = SelfAttention(dim=config.dim, num_heads=config.heads)
        self.norm_ff = nn.LayerNorm(config.dim)
        self.ff = FeedForward(dim=config.dim, ff_dim=config.ff_dim, dropout=config.dropout)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, U, D) -> (B, U, D)"""
        x = x + self.dropout(self.attn(self.norm_attn(x), causal=True))
        return x + self.dropout(self.ff(self.norm_ff(x)))


class TransformerLM(nn.Module):
    """A causal Transformer over tokens.

    Args:
        config: its shape.
        vocab_size: V, with `<blank>` first, which is never predicted, and `<sos/eos>` last, which is fed first.
    """

    def __init__(self, *, config: TransformerLmConfig, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.embedding = nn.Embedding(vocab_size, config.dim)
        nn.init.normal_(self.embedding.weight, std=config.dim**-0.5)  # the position layer multiplies by sqrt(D)
        self.position = SinusoidalPosition(dim=config.dim, dropout=config.dropout)
        self.layers = nn.ModuleList(TransformerLmLayer(config=config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dim)
        self.output = Linear(config.dim, vocab_size - 1)  # all but <blank>

    def forward(self, tokens_in: Tensor) -> Tensor:
        """Teacher forcing: tokens_in (B, U) int64, starting with <sos/eos>, to log-probabilities (B, U, V) float32.

        Position i scores the token that follows tokens_in[:, i]; padding at the end cannot reach a position before it.
        """
        x = self.position(self.embedding(tokens_in))
        for layer in self.layers:
            x = layer(x)
        return self._log_probs(x)

    def start(self, num: int) -> TransformerLmState:
        """The state of `num` hypotheses before anything was fed; the first token to feed is <sos/eos>."""
        layers = [cast(TransformerLmLayer, layer) for layer in self.layers]
        weight, heads = self.embedding.weight, layers[0].attn.num_heads
        own = weight.new_empty(0, num, len(layers), 2, heads, weight.shape[1] // heads, dtype=compute_dtype(weight))
        steps = ((OwnStep.of(layer.norm_attn, layer.attn), FeedForwardStep.of(layer.norm_ff, layer.ff)) for layer in layers)
        return TransformerLmState(tuple(steps), num, own)

    def step(self, tokens: Tensor, state: TransformerLmState) -> tuple[Tensor, TransformerLmState]:
        """Feeds one token to each hypothesis; dropout must be off (eval mode).

        Args:
            tokens: (N,) int64; <sos/eos> in the first step.
            state: of `start` or of the step before.

        Returns:
            log-probabilities (N, V) float32 of the next token, -inf for <blank>, and the new state.
        """
        if len(tokens) != state.num:
            raise ValueError(f"{len(tokens)} tokens for the state of {state.num} hypotheses")
        fed = state.fed
        start = state.position if fed is None else fed
        x = self.position(self.embedding(tokens).unsqueeze(1), start=start).squeeze(1)
        own = state.past(state.position + 1)
        bias = None if fed is None else padding_bias(length_mask(fed + 1, len(own)), dtype=own.dtype)
        for index, (attention, feed_forward) in enumerate(state.layers):
            qkv = attention.project(x)
            if fed is None:
                own[state.position, :, index] = qkv[:, 1:]
            else:
                own[fed, torch.arange(len(x), device=fed.device), index] = qkv[:, 1:]
            k, v = own[:, :, index].permute(2, 1, 3, 0, 4)  # (N, H, P, d) each
            x = feed_forward(attention.add(x, attend(qkv[:, 0].unsqueeze(2), k, v, bias=bias)))
        new = replace(state, own=own, position=state.position + 1, rows=None, fed=None if fed is None else fed + 1)
        return self._log_probs(x), new

    def _log_probs(self, x: Tensor) -> Tensor:
        """(B, U, D) -> (B, U, V) float32."""
        return F.pad(F.log_softmax(self.output(self.norm(x)).float(), dim=-1), (1, 0), value=float("-inf"))
