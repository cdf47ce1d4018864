"""Language models over tokens: what a search asks of any of them, and a causal Transformer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechtx.attention.kernels import attend, padding_bias
from speechtx.attention.multihead import SelfAttention, join_heads
from speechtx.config.lm import TransformerLmConfig
from speechtx.model.dropout import Dropout
from speechtx.model.encoder import FeedForward, length_mask
from speechtx.model.position import SinusoidalPosition

KeyValue = tuple[Tensor, Tensor]


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
    """A scorer of tokens, all hypotheses at once; `TransformerLM` and `ngram.NgramLM` are two. Both are nn.Modules.

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
        position: tokens fed so far, to any hypothesis.
        own: per layer, keys and values (N, H, P, d) with P at least `position`; empty before the first step.
        num: N.
        fed: (N,) tokens fed to each, where they are not as many (and keys and values behind them arbitrary); else None.
    """

    position: int
    own: tuple[KeyValue, ...]
    num: int
    fed: Tensor | None = None

    def select(self, rows: Tensor) -> TransformerLmState:
        """See `LmState.select`."""
        fed = None if self.fed is None else self.fed[rows]
        longest = self.position if fed is None else int(fed.max())
        own = tuple((k[:, :, :longest].index_select(0, rows), v[:, :, :longest].index_select(0, rows)) for k, v in self.own)
        return TransformerLmState(longest, own, len(rows), fed)

    def put(self, rows: Tensor, other: TransformerLmState) -> TransformerLmState:
        """See `LmState.put`; both must have been fed a token."""
        fed = self._fed(rows).index_copy(0, rows, other._fed(rows))
        own = tuple(
            (_put(mine[0], rows, theirs[0]), _put(mine[1], rows, theirs[1]))
            for mine, theirs in zip(self.own, other.own, strict=True)
        )
        return TransformerLmState(max(self.position, other.position), own, self.num, fed)

    def _fed(self, like: Tensor) -> Tensor:
        return like.new_full((self.num,), self.position) if self.fed is None else self.fed


def _put(into: Tensor, rows: Tensor, cache: Tensor) -> Tensor:
    """`into` (N, H, P, d) with the columns of cache (M, H, P', d) in `rows`, in place if they fit, else with room for more."""
    length = cache.shape[2]
    if length > into.shape[2]:
        into = F.pad(into, (0, 0, 0, 2 * length - into.shape[2]))
    into[:, :, :length].index_copy_(0, rows, cache)
    return into


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

    def step(self, x: Tensor, own: KeyValue | None, fed: Tensor | None = None) -> tuple[Tensor, KeyValue]:
        """One position: x (N, 1, D) -> (N, 1, D) and the keys and values with this position's, behind those of the `fed`."""
        q, k, v = self.attn.project(self.norm_attn(x))
        bias = None
        if fed is not None:
            assert own is not None
            k, v = _behind(own[0], fed, k), _behind(own[1], fed, v)
            bias = padding_bias(length_mask(fed + 1, k.shape[2]), dtype=q.dtype)
        elif own is not None:
            k, v = torch.cat((own[0], k), dim=2), torch.cat((own[1], v), dim=2)
        x = x + self.attn.out(join_heads(attend(q, k, v, bias=bias)))
        return x + self.ff(self.norm_ff(x)), (k, v)


def _behind(cache: Tensor, fed: Tensor, new: Tensor) -> Tensor:
    """cache (N, H, P, d) with new (N, H, 1, d) at column fed[i] of row i, (N, H, P + 1, d)."""
    cache = F.pad(cache, (0, 0, 0, 1))
    cache[torch.arange(len(cache), device=fed.device), :, fed] = new.squeeze(2)
    return cache


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
        self.output = nn.Linear(config.dim, vocab_size - 1)  # all but <blank>

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
        return TransformerLmState(0, (), num)

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
        start = state.position if state.fed is None else state.fed
        x = self.position(self.embedding(tokens).unsqueeze(1), start=start)
        own: list[KeyValue] = []
        for index, layer in enumerate(self.layers):
            x, cache = cast(TransformerLmLayer, layer).step(x, state.own[index] if state.own else None, state.fed)
            own.append(cache)
        fed = None if state.fed is None else state.fed + 1
        return self._log_probs(x).squeeze(1), TransformerLmState(state.position + 1, tuple(own), state.num, fed)

    def _log_probs(self, x: Tensor) -> Tensor:
        """(B, U, D) -> (B, U, V) float32."""
        return F.pad(F.log_softmax(self.output(self.norm(x)).float(), dim=-1), (1, 0), value=float("-inf"))
