"""N-grams: estimated as Chen & Goodman define them, and scored all hypotheses at once as KenLM scores one word after another."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from speechtx.config.errors import DataError
from speechtx.model.ngram import NgramLM
from speechtx.text.arpa import Arpa, read_arpa, write_arpa
from speechtx.text.kneser_ney import estimate_ngram

PIECES = ["<blank>", "<unk>", *"abcdefgh", "<sos/eos>"]
END = len(PIECES) - 1
HAND = """\
\\data\\
ngram 1=5
ngram 2=4
ngram 3=2

\\1-grams:
-99\t<s>\t-0.5
-0.8\t<unk>\t-0.1
-0.7\ta\t-0.25
-0.6\tb\t-0.125
-0.4\t</s>

\\2-grams:
-0.3\t<s> a\t-0.75
-0.2\ta b\t-0.0625
-0.9\tb </s>
-0.35\tb a

\\3-grams:
-0.15\t<s> a b
-0.05\ta b </s>

\\end\\
"""


def text(seed: int, *, sentences: int = 300) -> list[list[int]]:
    """Sentences in which what follows depends on what came before, without the last piece."""
    rng = np.random.default_rng(seed)
    table = rng.dirichlet(np.full(len(PIECES) - 3, 0.3), size=(len(PIECES), len(PIECES)))
    made = []
    for _ in range(sentences):
        ids = [2, 2]
        for _ in range(rng.integers(0, 9)):
            ids.append(int(rng.choice(len(PIECES) - 3, p=table[ids[-2], ids[-1]])) + 2)
        made.append(ids[2:])
    return made


def model(arpa: Arpa) -> NgramLM:
    return NgramLM(arpa=arpa, tokens=PIECES)


def scores(lm: NgramLM, fed: list[int]) -> torch.Tensor:
    """log P(next | <s> fed), (V,)."""
    state = lm.start(1)
    row = torch.zeros(0)
    for token in [END, *fed]:
        row, state = lm.step(torch.tensor([token]), state)
    return row[0]


@pytest.fixture
def hand(tmp_path: Path) -> NgramLM:
    (tmp_path / "hand.arpa").write_text(HAND)
    pieces = ["<blank>", "<unk>", "a", "b", "c", "<sos/eos>"]
    return NgramLM(arpa=read_arpa(tmp_path / "hand.arpa"), tokens=pieces)


@pytest.mark.parametrize(
    ("fed", "token", "log10"),
    [
        ([], 2, -0.3),  # <s> a
        ([], 3, -0.5 - 0.6),  # back-off of <s>, b
        ([2], 3, -0.15),  # <s> a b
        ([2], 2, -0.75 - 0.25 - 0.7),  # back-off of <s> a, of a, then a
        ([2, 3], 5, -0.05),  # a b </s>
        ([2, 3], 2, -0.0625 - 0.35),  # back-off of a b, then b a
        ([3, 2], 3, -0.2),  # b a is in the file and has no back-off weight: 0; then a b
        ([3, 2], 5, -0.25 - 0.4),
        ([4], 2, -0.1 - 0.7),  # c is not listed: context <unk>
        ([2], 4, -0.75 - 0.25 - 0.8),  # and is scored as <unk>
        ([2], 1, -0.75 - 0.25 - 0.8),
    ],
)
def test_scores_follow_the_back_off_that_a_person_computes(hand: NgramLM, fed: list[int], token: int, log10: float) -> None:
    state = hand.start(1)
    row = torch.zeros(0)
    for previous in [5, *fed]:
        row, state = hand.step(torch.tensor([previous]), state)
    assert row[0, token].item() == pytest.approx(log10 * math.log(10), abs=1e-6)
    assert row[0, 0] == -torch.inf, "<blank> is never predicted"


@pytest.mark.parametrize("order", [1, 2, 3, 4, 6])
def test_probabilities_sum_to_one_after_any_context(order: int) -> None:
    lm = model(estimate_ngram(text(1), pieces=PIECES, order=order).arpa)
    rng = torch.Generator().manual_seed(0)
    state, tokens = lm.start(50), torch.full((50,), END)
    for _ in range(8):
        log_probs, state = lm.step(tokens, state)
        assert log_probs.shape == (50, len(PIECES)) and log_probs.dtype == torch.float32
        assert torch.allclose(log_probs.exp().sum(dim=1), torch.ones(50), atol=1e-5)
        assert (log_probs[:, 1:] > -torch.inf).all(), "a token that the text lacks is unlikely, not impossible"
        tokens = torch.randint(1, END, (50,), generator=rng)


def test_hypotheses_can_be_reordered_repeated_and_dropped() -> None:
    lm = model(estimate_ngram(text(1), pieces=PIECES, order=3).arpa)
    state = lm.start(3)
    _, state = lm.step(torch.full((3,), END), state)
    _, state = lm.step(torch.tensor([2, 3, 4]), state)
    rows, _ = lm.step(torch.tensor([5, 5]), state.select(torch.tensor([2, 0])))
    assert torch.equal(rows[0], scores(lm, [4, 5])) and torch.equal(rows[1], scores(lm, [2, 5]))


@pytest.mark.parametrize("listed", [PIECES, [*PIECES[:-2], PIECES[-1]]], ids=["all tokens", "one token as <unk>"])
def test_a_model_too_large_for_tables_scores_the_same(listed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    sentences = [[token for token in sentence if token < len(listed) - 1] for sentence in text(1)]
    arpa = estimate_ngram(sentences, pieces=listed, order=4).arpa
    small = model(arpa)
    monkeypatch.setattr("speechtx.model.ngram._TABLE", 0)
    large = model(arpa)
    assert len(small.all_nodes) == len(small.all_scores) > 0 and len(large.all_nodes) == len(large.all_scores) == 0
    assert small.has_aliases == (listed != PIECES)
    draw = torch.Generator().manual_seed(0)
    tokens, states = torch.full((50,), END), [small.start(50), large.start(50)]
    for _ in range(8):
        (a, states[0]), (b, states[1]) = small.step(tokens, states[0]), large.step(tokens, states[1])
        assert torch.equal(a, b) and torch.equal(states[0].node, states[1].node)
        tokens = torch.randint(1, END, (50,), generator=draw)


def test_an_ended_hypothesis_that_is_still_fed_harms_nobody() -> None:
    lm = model(estimate_ngram(text(1), pieces=PIECES, order=3).arpa)
    _, state = lm.step(torch.full((2,), END), lm.start(2))
    _, state = lm.step(torch.tensor([END, 3]), state)
    rows, _ = lm.step(torch.tensor([0, 4]), state)
    assert torch.equal(rows[1], scores(lm, [3, 4])) and not rows[0].isnan().any()


# ------------------------------------------------------------------------------------------------ estimation


def plain_kneser_ney(sentences: list[list[int]], order: int, words: int) -> dict[tuple[int, ...], float]:
    """P(last | others) of every n-gram in the text, by the recursion as it stands in the paper; <s> is -1."""
    counts: list[Counter[tuple[int, ...]]] = [Counter() for _ in range(order + 1)]
    for sentence in sentences:
        full = [-1, *sentence, END]
        for n in range(1, order + 1):
            for i in range(len(full) - n + 1):
                counts[n][tuple(full[i : i + n])] += 1
    adjusted: list[dict[tuple[int, ...], int]] = [{} for _ in range(order + 1)]
    for n in range(1, order + 1):
        left = Counter(g[1:] for g in counts[n + 1]) if n < order else Counter()
        adjusted[n] = {g: c if n == order or g[0] == -1 else left[g] for g, c in counts[n].items() if g != (-1,)}
    discounts = [[0.0, 0.0, 0.0, 0.0]]
    for n in range(1, order + 1):
        times = Counter(adjusted[n].values())
        if any(times[k] == 0 for k in (1, 2, 3, 4)):
            discounts.append([0.0, 0.5, 1.0, 1.5])
            continue
        y = times[1] / (times[1] + 2 * times[2])
        values = [0.0, *(k - (k + 1) * y * times[k + 1] / times[k] for k in (1, 2, 3))]
        discounts.append(values if all(0 <= values[k] <= k for k in (1, 2, 3)) else [0.0, 0.5, 1.0, 1.5])

    def prob(g: tuple[int, ...]) -> float:
        if not g:
            return 1 / words
        n = len(g)
        followers = [c for f, c in adjusted[n].items() if f[:-1] == g[:-1]]
        if not followers:
            return prob(g[1:])
        own = adjusted[n].get(g, 0)
        gamma = sum(discounts[n][min(c, 3)] for c in followers)
        return (own - discounts[n][min(own, 3)] + gamma * prob(g[1:])) / sum(followers)

    return {g: prob(g) for n in range(1, order + 1) for g in adjusted[n]}


@pytest.mark.parametrize(("order", "seed", "sentences"), [(2, 1, 40), (3, 2, 40), (3, 3, 5), (4, 4, 25)])
def test_the_estimate_is_modified_kneser_ney_as_the_paper_defines_it(order: int, seed: int, sentences: int) -> None:
    sample = text(seed, sentences=sentences)
    arpa = estimate_ngram(sample, pieces=PIECES, order=order).arpa
    wanted = plain_kneser_ney(sample, order, len(PIECES) - 1)
    number = {0: -1} | {i: i for i in range(1, len(PIECES))}
    found = {
        tuple(number[i] for i in row): 10**p
        for rows, probs in zip(arpa.ngrams, arpa.log_prob, strict=True)
        for row, p in zip(rows.tolist(), probs.tolist(), strict=True)
    }
    assert wanted.keys() <= found.keys()
    assert {g for g in found.keys() - wanted.keys() if len(g) > 1} == set()
    for ngram, probability in wanted.items():
        assert found[ngram] == pytest.approx(probability, rel=1e-9), ngram


def test_too_little_text_for_discounts_is_told_and_takes_fixed_ones() -> None:
    estimate = estimate_ngram([[2, 3], [2, 3], [2]], pieces=PIECES, order=3)
    assert estimate.fallback == (1, 2, 3)
    assert estimate.discounts[0] == (0.5, 1.0, 1.5)


def test_no_text_and_an_order_beyond_every_sentence_are_refused() -> None:
    with pytest.raises(DataError, match="there is no sentence"):
        estimate_ngram([], pieces=PIECES, order=3)
    with pytest.raises(DataError, match=r"order 6 is more than the longest sentence \(3 tokens and its two ends\)"):
        estimate_ngram([[2, 3, 4], [2]], pieces=PIECES, order=6)


def test_words_that_are_no_tokens_and_tokens_that_the_model_cannot_score_are_refused(tmp_path: Path) -> None:
    (tmp_path / "hand.arpa").write_text(HAND)
    arpa = read_arpa(tmp_path / "hand.arpa")
    with pytest.raises(DataError, match=r"lm\.arpa: 1 words are no tokens of the tokenizer, for example 'b'"):
        NgramLM(arpa=arpa, tokens=["<blank>", "<unk>", "a", "<sos/eos>"], source="lm.arpa")
    closed = HAND.replace("-0.8\t<unk>\t-0.1\n", "").replace("1=5", "1=4")
    (tmp_path / "closed.arpa").write_text(closed)
    with pytest.raises(DataError, match=r"lm\.arpa: knows neither 'c' nor <unk>"):
        NgramLM(arpa=read_arpa(tmp_path / "closed.arpa"), tokens=["<blank>", "<unk>", *"abc", "<sos/eos>"], source="lm.arpa")


# ------------------------------------------------------------------------------------------------ KenLM


@pytest.mark.parametrize("order", [2, 3, 5])
def test_scores_and_perplexity_are_those_of_kenlm(tmp_path: Path, order: int) -> None:
    kenlm = pytest.importorskip("kenlm", reason="KenLM (extra `lm`) is not installed")
    path = tmp_path / "lm.arpa"
    write_arpa(estimate_ngram(text(1), pieces=PIECES, order=order).arpa, path)
    twin, lm = kenlm.Model(str(path)), model(read_arpa(path, vocabulary=PIECES[1:-1]))
    unseen = [[int(i) for i in np.random.default_rng(seed).integers(1, END, size=seed)] for seed in range(1, 8)]
    total, reference, count = 0.0, 0.0, 0
    for sentence in text(9, sentences=30) + unseen:
        words = " ".join(PIECES[i] for i in sentence)
        wanted = [score * math.log(10) for score, _, _ in twin.full_scores(words)]
        state, found = lm.start(1), []
        for fed, scored in zip([END, *sentence], [*sentence, END], strict=True):
            row, state = lm.step(torch.tensor([fed]), state)
            found.append(row[0, scored].item())
        assert found == pytest.approx(wanted, abs=1e-5), words
        total, reference, count = total + sum(found), reference + sum(wanted), count + len(found)
    assert math.exp(-total / count) == pytest.approx(math.exp(-reference / count), rel=1e-6)
