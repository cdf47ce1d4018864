"""What the decoder remembers between two steps of a search.

The hypotheses of an utterance share most of their history, so their tokens are kept as the tree that they are: each token's keys
and values once, and for every hypothesis a mask over the tokens of its utterance that says which are its own. Reordering
hypotheses then copies rows of that mask instead of their keys and values, and tokens that no hypothesis has any more are dropped
now and then. Only the hypotheses of one utterance attend to its tokens, as queries side by side.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from speechtx.model.axis import AxisState

KeyValue = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class TokenTree:
    """Which of the P tokens that an utterance keeps each of its K hypotheses consists of.

    Attributes:
        mask: (B, K, P) 0 for a hypothesis' own tokens, -inf for others.
        depth: (B, P) at which position each token stands; arbitrary for tokens that nobody has.
        newest: (K, K) the mask of K tokens of which each hypothesis has one.
        room: P at which to look for tokens that nobody has.
    """

    mask: Tensor
    depth: Tensor
    newest: Tensor
    room: int

    @staticmethod
    def start(batch: int, beam: int, *, dtype: torch.dtype, device: torch.device) -> TokenTree:
        """Of `batch` times `beam` empty hypotheses."""
        own = torch.eye(beam, dtype=torch.bool, device=device)
        newest = torch.zeros(beam, beam, dtype=dtype, device=device).masked_fill_(~own, -torch.inf)
        depth = torch.zeros(batch, 0, dtype=torch.int64, device=device)
        return TokenTree(newest.new_zeros(batch, beam, 0), depth, newest, room=_room(0, beam))

    def grow(self, position: int) -> TokenTree:
        """Every hypothesis took a token, its `position`th; they stand behind those that were there."""
        batch, beam, _ = self.mask.shape
        mask = torch.cat((self.mask, self.newest.expand(batch, -1, -1)), dim=2)
        depth = torch.cat((self.depth, self.depth.new_full((batch, beam), position)), dim=1)
        return replace(self, mask=mask, depth=depth)

    def select(self, rows: Tensor) -> TokenTree:
        """Reorders the hypotheses, rows (B * K,) into the flat B * K, within their utterances."""
        return replace(self, mask=self.mask.flatten(0, 1).index_select(0, rows).view_as(self.mask))

    def keep(self, utterances: Tensor) -> TokenTree:
        """Of some utterances (int64 indices into B)."""
        return replace(self, mask=self.mask[utterances], depth=self.depth[utterances])

    def bias(self, row: Tensor | None) -> Tensor:
        """(B, 1 or H, K, P) bias of the attention to the tokens; row (1, 1 or H, 1, U): what it costs to look at position u."""
        mask = self.mask.unsqueeze(1)
        return mask if row is None else mask + row[0, :, 0, self.depth].transpose(0, 1).unsqueeze(2)

    def pruned(self) -> tuple[TokenTree, Tensor | None]:
        """The tree without tokens that nobody has, if it is time for that, and which (B, P') are left; else None."""
        beam, count = self.mask.shape[1:]
        if count < self.room:
            return self, None
        alive = (self.mask == 0.0).any(dim=1)
        most = int(alive.sum(dim=1).max())
        left = alive.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]  # where fewer live, some dead stay
        mask = self.mask.gather(2, left.unsqueeze(1).expand(-1, beam, -1))
        return replace(self, mask=mask, depth=self.depth.gather(1, left), room=_room(most, beam)), left


def _room(count: int, beam: int) -> int:
    """Tokens kept at most until the next pruning: half as many again, so that pruning costs little for each of them."""
    return count + max(count // 2, 4 * beam)


@dataclass(frozen=True)
class DecoderState:
    """What the decoder remembers between two steps of N = B * beam hypotheses; never changed in place.

    Attributes:
        position: tokens fed so far.
        cross: per layer, cross-attention keys and values (B, H, S, d), shared by the hypotheses of an utterance.
        cross_bias: (B, 1, 1, S), masks the encoder's padding; None where there is none.
        axis: where the hypotheses stand, if cross-attention pays for distance.
        own: per layer, self-attention keys and values (B, P, 2, H, d) of the tokens in `tree`; empty before the first step.
        tree: whose tokens they are; None where nothing is fed step by step.
        steps: what each layer does with one position, for `Decoder.step`.
        looked: (N, S) attention weights of the last step on average over the heads of the last layer; None unless `watched`.
    """

    position: int
    cross: tuple[KeyValue, ...]
    cross_bias: Tensor | None
    axis: AxisState | None = None
    own: tuple[Tensor, ...] = ()
    tree: TokenTree | None = None
    steps: tuple[Any, ...] = ()
    looked: Tensor | None = None

    def watched(self) -> DecoderState:
        """The state with `looked`, which steps from here on will fill in."""
        assert self.tree is not None
        batch, beam, _ = self.tree.mask.shape
        return replace(self, looked=self.tree.mask.new_zeros(batch * beam, self.cross[0][0].shape[2]))

    def select(self, rows: Tensor) -> DecoderState:
        """The state with its hypotheses reordered.

        Args:
            rows: (N,) int64 into the flat N hypotheses; row n of the result continues hypothesis rows[n], which must belong
                to the same utterance.
        """
        assert self.tree is not None
        tree, left = self.tree.select(rows).pruned()
        own = self.own if left is None else tuple(_at(layer, left) for layer in self.own)
        looked = None if self.looked is None else self.looked[rows]
        return replace(self, own=own, tree=tree, axis=None if self.axis is None else self.axis.select(rows), looked=looked)

    def keep(self, utterances: Tensor) -> DecoderState:
        """The state of some utterances (int64 indices into B), each with all its hypotheses; for dropping finished ones."""
        batch = len(self.cross[0][0])
        looked = None if self.looked is None else self.looked.unflatten(0, (batch, -1))[utterances].flatten(0, 1)
        return replace(
            self,
            cross=tuple((k[utterances], v[utterances]) for k, v in self.cross),
            cross_bias=None if self.cross_bias is None else self.cross_bias[utterances],
            axis=None if self.axis is None else self.axis.keep(utterances),
            own=tuple(layer[utterances] for layer in self.own),
            tree=None if self.tree is None else self.tree.keep(utterances),
            looked=looked,
        )


def _at(x: Tensor, places: Tensor) -> Tensor:
    """x (B, P, ...) at places (B, P') -> (B, P', ...)"""
    return x[torch.arange(len(x), device=x.device).unsqueeze(1), places]
