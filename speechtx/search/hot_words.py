"""Hot words: a bonus for every token of the words and phrases that a user expects.

A token string is rewarded for the phrases in it, found from left to right: at each token the longest phrase that starts there
is taken, its tokens count once, and the search for the next goes on behind it (leftmost-longest). While a phrase is being spelled
its tokens are rewarded in advance, so that the beam keeps it; if it breaks off, what did not belong to a whole phrase is taken
back with the next token, or at the end of the sentence.

The automaton is that of Aho and Corasick (1975, "Efficient String Matching: An Aid to Bibliographic Search"), but for its failure
arcs: where the trie of phrases has no arc for the next token, the oldest token of the path is settled, with the longest phrase
that starts there or alone, and the rest of the path is read again. Beams biased in this way: Zhao et al. 2019, "Shallow-Fusion
End-to-End Contextual Biasing".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from speechtx.config.errors import ConfigError, DataError
from speechtx.text.tokenizer import Tokenizer


def encode_hot_words(words: Sequence[str], tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """The tokens of words and phrases, segmented as the tokenizer segments transcripts, which is how models learn to spell them.

    Raises:
        ConfigError: a word that the tokenizer cannot spell, or that is none.
    """
    phrases = []
    for word in words:
        try:
            ids, pieces = tokenizer.encode(word), tokenizer.encode_pieces(word)
        except DataError as err:
            raise ConfigError(f"hot_words: {word!r}: {err}") from None
        if not ids:
            raise ConfigError(f"hot_words: {word!r} is no word")
        unknown = [piece.lstrip("\u2581") for i, piece in zip(ids, pieces, strict=True) if i == tokenizer.unk_id]
        if unknown:
            raise ConfigError(
                f"hot_words: the tokenizer cannot spell {word!r}, it does not know {', '.join(map(repr, unknown))}; "
                "write it as the training transcripts are written (upper or lower case, digits as words)"
            )
        phrases.append(tuple(ids))
    return phrases


@dataclass(frozen=True)
class HotWordState:
    """Where N hypotheses stand in the automaton.

    Attributes:
        node: (N,) int64.
    """

    node: Tensor

    def select(self, rows: Tensor) -> HotWordState:
        """The state whose row i continues hypothesis rows[i]; rows (M,) int64 may repeat, reorder and drop hypotheses."""
        return HotWordState(self.node[rows])

    def put(self, rows: Tensor, other: HotWordState) -> HotWordState:
        """The state in which `rows` (M,) continue the M hypotheses of `other`, and the rest as before."""
        return HotWordState(self.node.index_copy(0, rows, other.node))


class HotWords(nn.Module):
    """Scores tokens by the phrases that they spell, with the interface of a `LanguageModel`.

    The scores of a hypothesis, that of its end among them, sum up to `bonus` times the tokens of the phrases in it; those of an
    unfinished one never exceed `bonus` times its tokens.

    Args:
        phrases: token ids, without <blank> and <sos/eos>; see `encode_hot_words`.
        bonus: for each token.
        vocab_size: V, with <blank> first, which scores 0, and <sos/eos> last, which is fed first and scored as the end.

    Raises:
        ConfigError: an empty phrase, or a token that cannot be in one.
    """

    first: Tensor  # (nodes + 1,): arcs first[i] .. first[i + 1] leave node i, over failure arcs or not; the root's are below
    key: Tensor  # (arcs,) ascending: node * V + token
    score: Tensor  # (arcs,)
    target: Tensor  # (arcs,)
    settle: Tensor  # (nodes,) what the end of the sentence adds to the rewards in advance: never above 0
    start_score: Tensor  # (V,) of a token that starts a phrase, or does not
    start_target: Tensor  # (V,) the node of a token alone

    def __init__(self, phrases: Sequence[Sequence[int]], *, bonus: float, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        for phrase in phrases:
            if not phrase or not all(0 < token < vocab_size - 1 for token in phrase):
                raise ConfigError(f"hot_words: tokens {list(phrase)} are no phrase over {vocab_size} tokens")
        nodes = _automaton(phrases)
        arcs = [
            (number * vocab_size + token, kept + nodes[target].depth - node.depth, target)
            for number, node in enumerate(nodes[1:], start=1)
            for token, (target, kept) in sorted(node.arcs.items())
        ]
        counts = [0, 0, *(len(node.arcs) for node in nodes[1:])]
        start_target = torch.zeros(vocab_size, dtype=torch.int64)
        for token, (target, _) in nodes[0].arcs.items():
            start_target[token] = target
        keys, scores, targets = zip(*arcs, strict=True) if arcs else ((), (), ())
        for name, tensor in (
            ("first", torch.tensor(counts).cumsum(0)),
            ("key", torch.tensor(keys, dtype=torch.int64)),
            ("score", bonus * torch.tensor(scores, dtype=torch.float32)),
            ("target", torch.tensor(targets, dtype=torch.int64)),
            ("settle", bonus * torch.tensor([node.settled - node.depth for node in nodes], dtype=torch.float32)),
            ("start_score", bonus * (start_target > 0).to(torch.float32)),
            ("start_target", start_target),
        ):
            self.register_buffer(name, tensor, persistent=False)

    def start(self, num: int) -> HotWordState:
        """The state of `num` hypotheses before anything was fed; the first token to feed is <sos/eos>."""
        return HotWordState(torch.zeros(num, dtype=torch.int64, device=self.first.device))

    def step(self, tokens: Tensor, state: HotWordState) -> tuple[Tensor, HotWordState]:
        """Feeds one token to each hypothesis.

        Args:
            tokens: (N,) int64; <sos/eos> in the first step.
            state: of `start` or of the step before.

        Returns:
            bonuses (N, V) float32 of the next token, positive and negative, and the new state.
        """
        node = self.start_target[tokens]
        if len(self.key):
            wanted = state.node * self.vocab_size + tokens
            arc = torch.searchsorted(self.key, wanted).clamp_(max=len(self.key) - 1)
            node = torch.where(self.key[arc] == wanted, self.target[arc], node)
        scores = self.start_score + self.settle[node].unsqueeze(1)
        begin, count = self.first[node], self.first[node + 1] - self.first[node]
        row = torch.arange(len(node), device=node.device).repeat_interleave(count)
        arc = (begin - count.cumsum(0) + count)[row] + torch.arange(len(row), device=node.device)
        scores[row, self.key[arc] % self.vocab_size] = self.score[arc]
        scores[:, 0] = 0.0
        return scores, HotWordState(node)


@dataclass
class _Node:
    """A path of the trie.

    Attributes:
        depth: its tokens.
        phrase: tokens of the longest phrase that it begins with.
        arcs: token -> the node that it leads to, over failure arcs or not, and the tokens of whole phrases settled on the way.
            A token without an arc settles the whole path and leads to where the root leads.
        settled: tokens of whole phrases, if nothing of a phrase follows the path.
    """

    depth: int
    phrase: int = 0
    arcs: dict[int, tuple[int, int]] = field(default_factory=dict)
    settled: int = 0


def _automaton(phrases: Sequence[Sequence[int]]) -> list[_Node]:
    """The nodes, the root first."""
    nodes = [_Node(depth=0)]
    paths: list[tuple[int, ...]] = [()]
    for phrase in phrases:
        at = 0
        for token in phrase:
            if token not in nodes[at].arcs:
                nodes[at].arcs[token] = len(nodes), 0
                nodes.append(_Node(depth=nodes[at].depth + 1))
                paths.append((*paths[at], token))
            at = nodes[at].arcs[token][0]
        nodes[at].phrase = len(phrase)
    for at in sorted(range(len(nodes)), key=lambda i: nodes[i].depth):  # what is read again is shorter, so it is there already
        node = nodes[at]
        for child, _ in node.arcs.values():
            nodes[child].phrase = max(nodes[child].phrase, node.phrase)
        if not at:
            continue
        failed, kept = 0, node.phrase
        for token in paths[at][max(node.phrase, 1) :]:
            failed, more = _follow(nodes, failed, token)
            kept += more
        node.settled = kept + nodes[failed].settled
        if failed:
            inherited = {token: (target, kept + more) for token, (target, more) in nodes[failed].arcs.items()}
            node.arcs = inherited | node.arcs
    return nodes


def _follow(nodes: Sequence[_Node], at: int, token: int) -> tuple[int, int]:
    """The node behind a token, and the tokens of whole phrases settled on the way."""
    if token in nodes[at].arcs:
        return nodes[at].arcs[token]
    return nodes[0].arcs.get(token, (0, 0))[0], nodes[at].settled
