"""An n-gram model as tensors: the next token's distribution over the whole vocabulary, for all hypotheses at once.

Every n-gram below the highest order is a node of a tree, the empty one its root; a node's arcs are the n-grams that
extend it by one token. A context h is stored as its longest suffix that is a node, which is all the model can see of it,
because an n-gram's context is an n-gram too. With h_0 that suffix, h_1 the longest suffix of it that is a node, ... down
to the root,

    log P(w | h) = log p(h_k w) + sum over j < k of backoff(h_j)      for the first k for which h_k w is in the model,

so that the rows of all hypotheses start as the unigrams' and are overwritten along the arcs of ever longer contexts: work for the
n-grams that exist, none for those that do not. The rows of all contexts together are kept where they are few: then a step is a
look into two tables.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from speechtx.config.errors import DataError
from speechtx.text.arpa import BOS, EOS, NEVER, UNK, Arpa

_LN10 = math.log(10.0)
_TABLE = 2**19  # contexts times tokens up to which the tables are made: 6 MiB, a tenth of a second


@dataclass(frozen=True)
class NgramState:
    """The contexts of N hypotheses.

    Attributes:
        node: (N,) int64.
    """

    node: Tensor

    def select(self, rows: Tensor) -> NgramState:
        """The state whose row i continues hypothesis rows[i]; rows (M,) int64 may repeat, reorder and drop hypotheses."""
        return NgramState(self.node[rows])

    def put(self, rows: Tensor, other: NgramState) -> NgramState:
        """The state in which `rows` (M,) continue the M hypotheses of `other`, and the rest as before."""
        return NgramState(self.node.index_copy(0, rows, other.node))


class NgramLM(nn.Module):
    """Scores tokens with an n-gram model.

    `<sos/eos>` stands for <s> when it is fed and for </s> when it is scored; `<blank>` is never predicted. Tokens that the
    model does not list are scored, and seen as context, as <unk>; <unk> itself, if it is not listed, is next to impossible.

    Args:
        arpa: the model.
        tokens: the tokenizer's tokens, `<blank>` first and `<sos/eos>` last.
        source: the name that errors show.

    Raises:
        DataError: the model has words that are no tokens, or lacks tokens and <unk> as well.
    """

    first: Tensor  # (nodes + 1,): arcs first[i] .. first[i + 1] leave node i; none leave the root, whose row is `unigram`
    key: Tensor  # (arcs,) ascending: node * width + token
    score: Tensor  # (arcs,) natural logarithm
    target: Tensor  # (arcs,) the node that is the context once the token was taken
    chain: Tensor  # (nodes, order - 1): a node, its longest suffix that is a node, the longest of that, ...; ends in roots
    backoff: Tensor  # (nodes,) natural logarithm; the root has none
    unigram: Tensor  # (V,) log P(token)
    after: Tensor  # (V,) the node of a token alone
    alias: Tensor  # (V,) the token that a token is scored as: itself, or <unk>
    all_scores: Tensor  # (nodes, V) of `scores`, or (0, V) where that were too many
    all_nodes: Tensor  # (nodes, V) of `advance`, or (0, V)

    def __init__(self, *, arpa: Arpa, tokens: Sequence[str], source: str = "n-gram model") -> None:
        super().__init__()
        self.vocab_size = len(tokens)
        self.order = arpa.order
        number, missing = _token_numbers(arpa, tokens, source)
        tree = _Tree(arpa, number, width=len(tokens) + 1)
        self.width = tree.width
        end, bos = len(tokens) - 1, len(tokens)

        unigram = np.full(tree.width, -np.inf)
        unigram[1] = NEVER * _LN10  # unless the model knows <unk>
        unigram[number[arpa.ngrams[0][:, 0]]] = arpa.log_prob[0] * _LN10
        after = np.zeros(tree.width, dtype=np.int64)
        after[number[arpa.ngrams[0][:, 0]]] = tree.target[: arpa.counts[0]]
        after[end] = after[bos]  # whatever follows an end of sentence starts a new one
        alias = np.arange(len(tokens))
        alias[missing] = 1
        self.has_aliases = bool(missing)

        deep = tree.parent > 0
        order = np.argsort(tree.keys[deep], kind="stable")
        parent = tree.parent[deep][order]
        for name, array, dtype in (
            ("first", np.searchsorted(parent, np.arange(tree.num_nodes + 1)), torch.int64),
            ("key", tree.keys[deep][order], torch.int64),
            ("score", tree.log_prob[deep][order] * _LN10, torch.float32),
            ("target", tree.target[deep][order], torch.int64),
            ("chain", tree.chain, torch.int64),
            ("backoff", tree.log_backoff * _LN10, torch.float32),
            ("unigram", unigram[:bos], torch.float32),
            ("after", after[:bos], torch.int64),
            ("alias", alias, torch.int64),
        ):
            self.register_buffer(name, torch.from_numpy(np.ascontiguousarray(array)).to(dtype), persistent=False)
        nodes = torch.arange(tree.num_nodes if tree.num_nodes * self.vocab_size <= _TABLE else 0)
        tokens_of = torch.arange(self.vocab_size).repeat(len(nodes))
        following = self._advance(nodes.repeat_interleave(self.vocab_size), self.alias[tokens_of])
        self.register_buffer("all_scores", self._scores(nodes), persistent=False)
        self.register_buffer("all_nodes", following.view(-1, self.vocab_size), persistent=False)

    def start(self, num: int) -> NgramState:
        """The state of `num` hypotheses before anything was fed; the first token to feed is <sos/eos>."""
        return NgramState(torch.zeros(num, dtype=torch.int64, device=self.backoff.device))

    def step(self, tokens: Tensor, state: NgramState) -> tuple[Tensor, NgramState]:
        """Feeds one token to each hypothesis.

        Args:
            tokens: (N,) int64; <sos/eos> in the first step.
            state: of `start` or of the step before.

        Returns:
            log-probabilities (N, V) float32 of the next token, -inf for <blank>, and the new state.
        """
        node = self.advance(state.node, tokens)
        return self.scores(node), NgramState(node)

    def advance(self, node: Tensor, tokens: Tensor) -> Tensor:
        """(N,) nodes of the contexts after `tokens` (N,) follow the contexts `node` (N,)."""
        if len(self.all_nodes):
            return self.all_nodes[node, tokens]
        return self._advance(node, self.alias[tokens] if self.has_aliases else tokens)

    def scores(self, node: Tensor) -> Tensor:
        """(N, V) log-probabilities after the contexts `node` (N,)."""
        return self.all_scores[node] if len(self.all_scores) else self._scores(node)

    def _advance(self, node: Tensor, tokens: Tensor) -> Tensor:
        """The target of the longest suffix's arc, or the token's own node."""
        alone = self.after[tokens]
        if not len(self.key):
            return alone
        wanted = self.chain[node] * self.width + tokens.unsqueeze(1)  # (N, order - 1), longest suffix first
        arc = torch.searchsorted(self.key, wanted).clamp_(max=len(self.key) - 1)
        found = self.key[arc] == wanted
        longest = found.to(torch.int8).argmax(dim=1, keepdim=True)
        hit = found.gather(1, longest).squeeze(1) & (tokens != self.vocab_size - 1)
        return torch.where(hit, self.target[arc.gather(1, longest).squeeze(1)], alone)

    def _scores(self, node: Tensor) -> Tensor:
        """Unigrams, overwritten along the arcs of ever longer contexts."""
        chain = self.chain[node]
        # behind[:, k]: the back-off weights of all contexts longer than h_k
        behind = torch.nn.functional.pad(self.backoff[chain].cumsum(dim=1), (1, 0))
        scores = self.unigram + behind[:, -1:]
        rows = torch.arange(len(node), device=node.device)
        for k in reversed(range(chain.shape[1])):
            start, stop = self.first[chain[:, k]], self.first[chain[:, k] + 1]
            count = stop - start
            row = rows.repeat_interleave(count)
            total = count.cumsum(0)
            arc = (start - total + count)[row] + torch.arange(len(row), device=node.device)
            scores[row, self.key[arc] % self.width] = self.score[arc] + behind[row, k]
        return scores[:, self.alias] if self.has_aliases else scores


def _token_numbers(arpa: Arpa, tokens: Sequence[str], source: str) -> tuple[np.ndarray, list[int]]:
    """For every word of the model its token id (<s>: V), and the ids of the tokens that it lacks."""
    ids = {piece: i for i, piece in enumerate(tokens)} | {UNK: 1, EOS: len(tokens) - 1, BOS: len(tokens)}
    unknown = [word for word in arpa.words if word not in ids or ids[word] == 0]
    if unknown:
        raise DataError(f"{source}: {len(unknown)} words are no tokens of the tokenizer, for example {unknown[0]!r}")
    known = set(arpa.words)
    missing = [i for i, piece in enumerate(tokens[2:-1], start=2) if piece not in known]
    if missing and UNK not in known:
        raise DataError(f"{source}: knows neither {tokens[missing[0]]!r} nor <unk>; estimate it with <unk>, or with every token")
    return np.array([ids[word] for word in arpa.words], dtype=np.int64), missing


class _Tree:
    """The nodes and arcs of a model, node 0 the root, then every n-gram below the highest order, order by order.

    Attributes:
        parent, keys, log_prob, target: (all n-grams,) of the arc that an n-gram is.
        log_backoff, chain: (nodes, ...) as in `NgramLM`.
    """

    def __init__(self, arpa: Arpa, number: np.ndarray, *, width: int) -> None:
        self.width = width
        rows = [number[ngrams] for ngrams in arpa.ngrams]
        self.offsets = np.cumsum([1, *arpa.counts])  # the first node of each order
        self.num_nodes = int(self.offsets[arpa.order - 1])
        self._sorted: list[tuple[np.ndarray, np.ndarray]] = []  # for each order: keys, ascending, and their n-grams' nodes
        parents = []
        for n, tokens in enumerate(rows, start=1):
            parents.append(self._walk(tokens[:, :-1]))
            keys = parents[-1] * width + tokens[:, -1]
            order = np.argsort(keys)
            self._sorted.append((keys[order], self.nodes_of(n)[order]))
        self.parent = np.concatenate(parents)
        self.keys = self.parent * width + np.concatenate([tokens[:, -1] for tokens in rows])
        self.log_prob = np.concatenate(arpa.log_prob)
        self.log_backoff = np.concatenate([[0.0], *arpa.log_backoff])
        suffix = np.concatenate([[0], *(self._longest_suffix(tokens) for tokens in rows)])
        # An n-gram of the highest order is no node: what stays visible of it is its longest suffix.
        nodes = np.arange(1, len(suffix))
        self.target = np.where(nodes < self.num_nodes, nodes, suffix[1:])
        links = [np.arange(self.num_nodes)]
        for _ in range(max(arpa.order - 2, 0)):
            links.append(suffix[links[-1]])
        self.chain = np.stack(links, axis=1)

    def nodes_of(self, n: int) -> np.ndarray:
        return np.arange(self.offsets[n - 1], self.offsets[n])

    def _walk(self, tokens: np.ndarray) -> np.ndarray:
        """The nodes of n-grams (count, n), -1 where there is none; `_sorted` must hold the orders up to n."""
        node = np.zeros(len(tokens), dtype=np.int64)
        for n in range(tokens.shape[1]):
            keys, nodes = self._sorted[n]
            wanted = node * self.width + tokens[:, n]
            if not len(keys):
                return np.full(len(tokens), -1)
            place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
            node = np.where((node >= 0) & (keys[place] == wanted), nodes[place], -1)
        return node

    def _longest_suffix(self, tokens: np.ndarray) -> np.ndarray:
        """The node of the longest proper suffix of n-grams (count, n) that is a node."""
        found = np.zeros(len(tokens), dtype=np.int64)
        for start in reversed(range(1, tokens.shape[1])):
            node = self._walk(tokens[:, start:])
            found = np.where(node > 0, node, found)
        return found
