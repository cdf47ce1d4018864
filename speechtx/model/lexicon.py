"""A word n-gram as a scorer of tokens: only words of the lexicon can come out, each as likely as the n-gram says.

The spellings of all words form a tree whose arcs are tokens. A hypothesis is where it stands, (h, x): the n-gram's context h
of finished words and the node x of the tree that the tokens of the word so far led to. The probability of a word is handed
out on the way to its end by looking ahead: with

    S(h, x) = sum of P(w | h) over the words w below x, or ending there

    P(token | h, x) = S(h, child of x) / S(h, x)                                     the word goes on
                    = P(w | h) / S(h, x) * S(h w, child of the root)                 w ends in x, and another word begins
                    = P(w | h) / S(h, x) * P(</s> | h w)                             w ends in x, and so does the sentence

(before the first word: S(<s>, child of the root) and P(</s> | <s>)). Steps multiply to the n-gram's probability of the
sentence exactly, whatever the tree looks like, and the probabilities of all tokens sum to 1 in every step, because a
word's first token begins with U+2581 and no other does, so that it is always clear whether a word went on or ended. (They sum
to less if the n-gram knows words that the lexicon does not: those are impossible.) The look-ahead is the sum and not the
greatest word below, as in some decoders, because only the sum is a probability: a hypothesis in the middle of a word is then
comparable with one at its end.

S(h, .) is computed for a context when a search first meets it, one row of tree nodes and words for each, and kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechtx.model.ngram import NgramLM

_CACHE_BYTES = 1 << 28  # of rows S(h, .); beyond it they are computed anew
_ROWS_AT_ONCE = 32
_TINY = 1e-300  # of a word that back-off weights next to zero made impossible: -inf would make a share of it NaN
_WORD_START = "\u2581"


@dataclass(frozen=True)
class LexiconState:
    """Where N hypotheses stand.

    Attributes:
        history: (N,) int64, the word n-gram's context.
        node: (N,) int64, of the tree.
    """

    history: Tensor
    node: Tensor

    def select(self, rows: Tensor) -> LexiconState:
        """The state whose row i continues hypothesis rows[i]; rows (M,) int64 may repeat, reorder and drop hypotheses."""
        return LexiconState(self.history[rows], self.node[rows])

    def put(self, rows: Tensor, other: LexiconState) -> LexiconState:
        """The state in which `rows` (M,) continue the M hypotheses of `other`, and the rest as before."""
        return LexiconState(self.history.index_copy(0, rows, other.history), self.node.index_copy(0, rows, other.node))


class LexiconLM(nn.Module):
    """Scores tokens with a word n-gram and a lexicon; a `speechtx.model.language_model.LanguageModel`.

    Whatever follows <sos/eos> starts a new sentence. A hypothesis that left the tree has no next token any more.

    Args:
        words: the word n-gram, over `<blank>`, `<unk>`, words and `<sos/eos>` in the place of tokens.
        spellings: for every word of the lexicon its number in `words` and its token ids, all different; the first
            token begins with U+2581, no other does.
        tokens: the tokenizer's tokens, `<blank>` first and `<sos/eos>` last.
        cache_bytes: memory for look-ahead.

    Raises:
        ValueError: a spelling that does not start as it should, or that stands twice.
    """

    first: Tensor  # (nodes + 2,): arcs first[i] .. first[i + 1] leave node i; the last node is where impossible tokens lead
    key: Tensor  # (arcs,) ascending: node * V + token
    target: Tensor  # (arcs,) node
    word: Tensor  # (nodes + 1,) number in `words` of the word that ends in a node, -1 where none does
    ending: Tensor  # (nodes + 1,) column of S(h, .) that holds P(that word | h)
    member: Tensor  # (pairs,) S(h, column) is the sum of P(member | h) over member[begin[column]] .. member[begin[column + 1]]
    begin: Tensor  # (columns,)
    slot: Tensor  # (contexts,) row of `look` that holds S(h, .), -1 if it was not asked for yet
    look: Tensor  # (slots, columns) log S(h, .) of nodes, of the ends of words, and of the sentence's end

    def __init__(
        self,
        *,
        words: NgramLM,
        spellings: Mapping[int, Sequence[int]],
        tokens: Sequence[str],
        cache_bytes: int = _CACHE_BYTES,
    ) -> None:
        super().__init__()
        self.words = words
        self.vocab_size = len(tokens)
        self.starts_word = [token.startswith(_WORD_START) for token in tokens]
        self.spelled = {tuple(ids) for ids in spellings.values()}
        tree = _Tree(spellings, self.starts_word)
        nodes, ends = tree.num_nodes, tree.num_nodes + len(spellings)
        self.dead, self.end_column = nodes, ends
        key = np.array(sorted(node * self.vocab_size + token for node, token in tree.child), dtype=np.int64)
        target = np.array([tree.child[int(k) // self.vocab_size, int(k) % self.vocab_size] for k in key], dtype=np.int64)
        word, ending = np.full(nodes + 1, -1), np.full(nodes + 1, ends)
        for i, (node, number) in enumerate(tree.word.items()):
            word[node], ending[node] = number, nodes + i
        pairs = np.array(
            [
                *tree.members,
                *((int(ending[node]), number) for node, number in tree.word.items()),
                (ends, words.vocab_size - 1),
            ]
        )
        pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]
        for name, array in (
            ("first", np.searchsorted(key // self.vocab_size, np.arange(nodes + 2))),
            ("key", key),
            ("target", target),
            ("word", word),
            ("ending", ending),
            ("member", pairs[:, 1]),
            ("begin", np.searchsorted(pairs[:, 0], np.arange(ends + 1))),
            ("slot", np.full(len(words.backoff), -1)),
        ):
            self.register_buffer(name, torch.as_tensor(array, dtype=torch.int64), persistent=False)
        self.slots = min(max(1, cache_bytes // (4 * (ends + 1))), len(words.backoff))
        self.register_buffer("look", torch.empty(0, ends + 1), persistent=False)
        self.used = 0

    def start(self, num: int) -> LexiconState:
        """The state of `num` hypotheses before anything was fed; the first token to feed is <sos/eos>."""
        dead = torch.full((num,), self.dead, device=self.key.device)
        return LexiconState(torch.zeros_like(dead), dead)

    def step(self, tokens: Tensor, state: LexiconState) -> tuple[Tensor, LexiconState]:
        """Feeds one token to each hypothesis.

        Args:
            tokens: (N,) int64; <sos/eos> in the first step.
            state: of `start` or of the step before.

        Returns:
            log-probabilities (N, V) float32 of the next token, -inf for whatever leads to no word, and the new state.
        """
        begun, after = self._child(torch.zeros_like(tokens), tokens), self._history_after(state)
        inside = self._child(state.node, tokens)
        new_word = (inside == self.dead) & (self.word[state.node] >= 0)
        node = torch.where(new_word, begun, inside)
        history = torch.where(new_word, after, state.history)
        ended = tokens == self.vocab_size - 1
        node = node.masked_fill(ended, 0)
        history = torch.where(ended, self.words.after[-1], history)
        state = LexiconState(history, node)
        return self._scores(state), state

    def outside(self, sentence: Sequence[int]) -> int:
        """How many words of a sentence, given as tokens, are not in the lexicon."""
        begins = [i for i, token in enumerate(sentence) if i == 0 or self.starts_word[token]]
        words = (tuple(sentence[a:b]) for a, b in zip(begins, [*begins[1:], len(sentence)], strict=True))
        return sum(word not in self.spelled for word in words)

    def _child(self, node: Tensor, tokens: Tensor) -> Tensor:
        """(N,) nodes that `tokens` lead to from `node`."""
        wanted = node * self.vocab_size + tokens
        arc = torch.searchsorted(self.key, wanted).clamp_(max=len(self.key) - 1)
        return torch.where((self.key[arc] == wanted) & (node != self.dead), self.target[arc], self.dead)

    def _history_after(self, state: LexiconState) -> Tensor:
        """(N,) contexts once the word that ends in the node has ended; nothing to rely on where none does."""
        return self.words.advance(state.history, self.word[state.node].clamp(min=0))

    def _scores(self, state: LexiconState) -> Tensor:
        """(N, V) log-probabilities of what follows."""
        history, node = state.history, state.node
        scores = torch.full((len(node), self.vocab_size), -torch.inf, device=node.device)
        at_start = node == 0
        before = torch.where(at_start, history, self._history_after(state))  # the context of a word that would begin here
        here, there = self._rows(torch.cat((history, before))).view(2, -1)
        mass = self.look[here, node.clamp(max=self.dead - 1)].masked_fill(at_start, 0.0)
        row, arc = self._arcs(torch.where(at_start, self.dead, node))
        scores[row, self.key[arc] % self.vocab_size] = self.look[here[row], self.target[arc]] - mass[row]

        done = torch.where(at_start, 0.0, self.look[here, self.ending[node]] - mass)  # log of the share of the word that ends
        row = (at_start | (self.word[node] >= 0)).nonzero().squeeze(1)
        roots = int(self.first[1])  # arcs 0 .. roots - 1 leave the root
        scores[row.unsqueeze(1), self.key[:roots]] = (
            done[row].unsqueeze(1) + self.look[there[row].unsqueeze(1), self.target[:roots]]
        )
        scores[row, -1] = done[row] + self.look[there[row], self.end_column]
        return scores

    def _arcs(self, node: Tensor) -> tuple[Tensor, Tensor]:
        """All arcs that leave `node` (N,): the rows that they belong to and their numbers."""
        start, stop = self.first[node], self.first[node + 1]
        count = stop - start
        row = torch.arange(len(node), device=node.device).repeat_interleave(count)
        return row, (stop - count.cumsum(0))[row] + torch.arange(len(row), device=node.device)

    def _rows(self, histories: Tensor) -> Tensor:
        """The rows of `look` for contexts (K,), computing those that are not there."""
        rows = self.slot[histories]
        if bool((rows >= 0).all()):
            return rows
        needed = histories.unique()
        missing = needed[self.slot[needed] < 0]
        if self.used + len(missing) > len(self.look):
            missing = self._make_room(needed, missing)
        for some in missing.split(_ROWS_AT_ONCE):
            self.look[self.used : self.used + len(some)] = self._look_ahead(some)
            self.slot[some] = torch.arange(self.used, self.used + len(some), device=some.device)
            self.used += len(some)
        return self.slot[histories]

    def _make_room(self, needed: Tensor, missing: Tensor) -> Tensor:
        """Enlarges `look` up to its limit, else forgets everything; returns the contexts that are missing then."""
        wanted = min(max(2 * len(self.look), self.used + len(missing), 64), self.slots)
        if wanted < self.used + len(missing):
            self.slot.fill_(-1)
            self.used, missing, wanted = 0, needed, max(len(needed), self.slots)
        if wanted > len(self.look):
            with torch.inference_mode(False):  # or later calls outside of inference mode could not write to it
                larger = self.look.new_empty(wanted, self.look.shape[1])
                larger[: self.used] = self.look[: self.used]
                self.look = larger
        return missing

    def _look_ahead(self, histories: Tensor) -> Tensor:
        """log S(h, .) (K, columns) of contexts (K,)."""
        prob = self.words.scores(histories).double().exp().T.contiguous()  # (words, K)
        total = F.embedding_bag(self.member, prob, self.begin, mode="sum")  # (columns, K)
        return total.clamp_(min=_TINY).log_().float().T


class _Tree:
    """The tree of all spellings, node 0 its root.

    Attributes:
        child: (node, token) -> node.
        word: node -> number of the word that ends there.
        members: (node, number of a word below it or ending there), for all nodes but the root.
    """

    def __init__(self, spellings: Mapping[int, Sequence[int]], starts_word: Sequence[bool]) -> None:
        self.child: dict[tuple[int, int], int] = {}
        self.word: dict[int, int] = {}
        self.members: list[tuple[int, int]] = []
        for number, ids in spellings.items():
            if [starts_word[token] for token in ids] != [True] + [False] * (len(ids) - 1):
                raise ValueError(f"spelling {list(ids)}: the first token must begin with U+2581, and no other")
            node = 0
            for token in ids:
                node = self.child.setdefault((node, token), len(self.child) + 1)
                self.members.append((node, number))
            if node in self.word:
                raise ValueError(f"spelling {list(ids)} stands twice")
            self.word[node] = number

    @property
    def num_nodes(self) -> int:
        return len(self.child) + 1
