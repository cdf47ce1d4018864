"""Estimates n-grams over tokens or words: interpolated modified Kneser-Ney (Chen & Goodman 1998, section 3; as KenLM's lmplz).

With a(g) the count of an n-gram g at the highest order, and below it the number of different tokens seen before g (or g's
count if it starts with <s>, which nothing can precede):

    P(w | h) = (a(h w) - D(a(h w))) / sum_x a(h x) + gamma(h) P(w | h')      h' is h without its oldest token
    gamma(h) = sum_x D(a(h x)) / sum_x a(h x)

and below the unigrams stands the uniform distribution over the whole vocabulary, so that no token is impossible.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from speechtx.config.errors import DataError
from speechtx.text.arpa import BOS, EOS, NEVER, UNK, Arpa

_FALLBACK = np.array([0.0, 0.5, 1.0, 1.5])  # lmplz --discount_fallback


@dataclass(frozen=True)
class Estimate:
    """An estimated model and how its discounts came about.

    Attributes:
        arpa: the model; its unigrams are the whole vocabulary.
        discounts: for every order D(1), D(2), D(3 and more).
        fallback: the orders whose counts of counts say nothing (there is no n-gram seen once, for example), so that fixed
            discounts were taken; the rule for the few tokens of the unigrams.
    """

    arpa: Arpa
    discounts: list[tuple[float, float, float]]
    fallback: tuple[int, ...]


@dataclass(frozen=True)
class _Order:
    """The n-grams of one order in lexicographic order; `prefix` and `suffix` are rows of the order below."""

    rows: np.ndarray
    count: np.ndarray
    prefix: np.ndarray
    suffix: np.ndarray


def estimate_ngram(sentences: Sequence[Sequence[int]], *, pieces: Sequence[str], order: int) -> Estimate:
    """Estimates a model of token sequences.

    Args:
        sentences: token ids without <sos/eos>.
        pieces: the tokenizer's tokens, `<blank>` first and `<sos/eos>` last; all but `<blank>` get a probability.
        order: n.

    Raises:
        DataError: there is no sentence, or none is long enough for a single n-gram of the highest order.
    """
    # <blank> is in no text: its number, 0, is free for <s>; <sos/eos> is </s>.
    return estimate_over(sentences, words=[BOS, UNK, *pieces[2:-1], EOS], order=order)


def estimate_over(sentences: Sequence[Sequence[int]], *, words: Sequence[str], order: int) -> Estimate:
    """Estimates a model over any vocabulary; without <unk> in it, it is closed: all probability goes to its words and </s>.

    Args:
        sentences: numbers in `words`, without <s> and </s>.
        words: the vocabulary, <s> first and </s> last.
        order: n; 0 for the uniform distribution alone.

    Raises:
        DataError: there is no sentence, or none is long enough for a single n-gram of the highest order.
    """
    words = list(words)
    if order == 0:
        return Estimate(_uniform(words), [], ())
    if not sentences:
        raise DataError("there is no sentence to estimate an n-gram from")
    orders = _count(sentences, vocab=len(words), order=order)
    if not len(orders[-1].rows):
        longest = max(len(sentence) for sentence in sentences)
        raise DataError(
            f"order {order} is more than the longest sentence ({longest} tokens and its two ends): there is no n-gram"
        )
    discounts, fallback, log_prob, log_backoff = [], [], [], []
    lower = np.full(1, 1.0 / (len(words) - 1))  # uniform over all but <s>
    for n, this in enumerate(orders, start=1):
        adjusted = _adjusted_counts(this, orders[n] if n < order else None)
        discount, fixed = _discounts(adjusted)
        discounts.append((float(discount[1]), float(discount[2]), float(discount[3])))
        fallback += [n] if fixed else []
        taken = discount[np.minimum(adjusted, 3)]
        contexts = len(orders[n - 2].rows) if n > 1 else 1
        total = np.maximum(np.bincount(this.prefix, weights=adjusted, minlength=contexts), 1.0)  # without n-grams: back-off 1
        gamma = np.bincount(this.prefix, weights=taken, minlength=contexts) / total
        prob = (adjusted - taken) / total[this.prefix] + gamma[this.prefix] * lower[this.suffix]
        if n == 1:
            prob[0] = 0.0  # <s> is given, never predicted
        else:
            seen = np.bincount(this.prefix, minlength=contexts) > 0
            log_backoff.append(np.where(seen, _log10(gamma), 0.0))
        log_prob.append(_log10(prob))
        lower = prob
    return Estimate(Arpa(words, [o.rows for o in orders], log_prob, log_backoff), discounts, tuple(fallback))


def _uniform(words: list[str]) -> Arpa:
    """Every word and </s> equally likely."""
    log_prob = np.full(len(words), -np.log10(len(words) - 1))
    log_prob[0] = NEVER
    return Arpa(words, [np.arange(len(words))[:, None]], [log_prob], [])


def _count(sentences: Sequence[Sequence[int]], *, vocab: int, order: int) -> list[_Order]:
    """Counts all n-grams: each is named by its last token and the n-gram before that, so sorting integers is all it takes."""
    lengths = np.array([len(sentence) + 2 for sentence in sentences])
    tokens = np.concatenate([np.array([0, *sentence, vocab - 1], dtype=np.int64) for sentence in sentences])
    depth = np.arange(len(tokens)) - np.repeat(np.cumsum(lengths) - lengths, lengths)  # position in the sentence
    ends = np.arange(len(tokens))  # positions where an n-gram ends
    identity = tokens  # row of the n-gram that ends at a position, where there is one
    everything = np.arange(vocab)
    nowhere = np.zeros(vocab, dtype=np.int64)
    orders = [_Order(everything[:, None], np.bincount(tokens, minlength=vocab), nowhere, nowhere)]
    for n in range(2, order + 1):
        ends = ends[depth[ends] >= n - 1]
        key, first, inverse, count = np.unique(
            identity[ends - 1] * vocab + tokens[ends], return_index=True, return_inverse=True, return_counts=True
        )
        prefix = key // vocab
        rows = np.concatenate([orders[-1].rows[prefix], (key % vocab)[:, None]], axis=1)
        orders.append(_Order(rows, count, prefix, identity[ends[first]]))
        identity = np.full(len(tokens), -1, dtype=np.int64)
        identity[ends] = inverse
    return orders


def _adjusted_counts(this: _Order, above: _Order | None) -> np.ndarray:
    """a(g) of every n-gram, from the n-grams one longer; <s> itself counts nothing, since it is not predicted."""
    if above is None:
        adjusted = this.count.copy()
    else:
        different = np.bincount(above.suffix, minlength=len(this.rows))
        adjusted = np.where(this.rows[:, 0] == 0, this.count, different)
    if this.rows.shape[1] == 1:
        adjusted[0] = 0
    return adjusted


def _discounts(adjusted: np.ndarray) -> tuple[np.ndarray, bool]:
    """D(0) = 0, D(1), D(2), D(3+) of Chen & Goodman's equation 26, and whether fixed ones had to be taken."""
    times = np.bincount(np.minimum(adjusted, 5), minlength=6).astype(np.float64)  # times[k]: n-grams with a = k
    if (times[1:5] == 0).any():
        return _FALLBACK, True
    y = times[1] / (times[1] + 2 * times[2])
    k = np.arange(1, 4)
    discount = k - (k + 1) * y * times[2:5] / times[1:4]
    if (discount < 0).any() or (discount > k).any():
        return _FALLBACK, True
    return np.concatenate([[0.0], discount]), False


def _log10(x: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.maximum(np.log10(x), NEVER)
