"""Hot words: what is rewarded, in any order of asking, and what it does to a beam."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechtx.config.decode import DecodeConfig
from speechtx.config.errors import ConfigError
from speechtx.config.schema import TokenizerConfig
from speechtx.search.ctc_beam import ctc_beam_search
from speechtx.search.hot_words import HotWords, encode_hot_words
from speechtx.search.scorers import Scorers, load_scorers
from speechtx.text.tokenizer import Tokenizer, train_tokenizer

VOCAB, END = 7, 6
PHRASES = st.lists(st.lists(st.integers(1, 2), min_size=1, max_size=5), min_size=1, max_size=4)  # of one kind, so they overlap
TOKENS = st.lists(st.sampled_from([1, 1, 2, 2, 3]), max_size=14)


def rewarded_tokens(phrases: Sequence[Sequence[int]], tokens: Sequence[int]) -> int:
    """Leftmost-longest, read off the page: how many tokens stand in phrases."""
    at = found = 0
    while at < len(tokens):
        lengths = [len(p) for p in phrases if list(tokens[at : at + len(p)]) == list(p)]
        at += max(lengths, default=1)
        found += max(lengths, default=0)
    return found


def walk(hot: HotWords, tokens: Sequence[int]) -> list[float]:
    """Sums of the scores after each token, and after the end."""
    state, sums = hot.start(1), [0.0]
    for fed, scored in zip([END, *tokens], [*tokens, END], strict=True):
        scores, state = hot.step(torch.tensor([fed]), state)
        assert scores.shape == (1, VOCAB) and scores[0, 0] == 0.0, "blank is no token"
        sums.append(sums[-1] + float(scores[0, scored]))
    return sums[1:]


@settings(max_examples=150, deadline=None)
@given(phrases=PHRASES, tokens=TOKENS)
def test_the_bonuses_add_up_to_those_of_the_phrases_in_the_text(phrases, tokens):
    sums = walk(HotWords(phrases, bonus=2.0, vocab_size=VOCAB), tokens)
    assert sums[-1] == pytest.approx(2.0 * rewarded_tokens(phrases, tokens))
    for count, total in enumerate(sums[:-1], start=1):
        assert total <= 2.0 * count + 1e-6, "the bound that lets a search end"
        assert total >= sums[-1] - 2.0 * (len(tokens) - count) - 1e-6


@settings(max_examples=15, deadline=None)
@given(phrases=PHRASES, texts=st.lists(st.lists(st.integers(1, 4), min_size=6, max_size=6), min_size=2, max_size=6))
def test_many_hypotheses_at_once_reordered_and_put_are_each_alone(phrases, texts):
    hot = HotWords(phrases, bonus=1.0, vocab_size=VOCAB)
    order = torch.arange(len(texts))
    state = hot.start(len(texts))
    tokens = torch.tensor([[END, *text] for text in texts])
    for position in range(6):
        scores, state = hot.step(tokens[order, position], state)
        for row, text in zip(scores, order.tolist(), strict=True):
            alone, own = None, hot.start(1)
            for token in tokens[text, : position + 1]:
                alone, own = hot.step(token.view(1), own)
            assert torch.equal(row, alone[0])
        state, order = state.select(order.flip(0)), order[order.flip(0)]
        state = state.put(torch.tensor([0]), state.select(torch.tensor([1])))
        order[0] = order[1]


def test_a_phrase_is_rewarded_while_it_is_spelled_and_loses_it_where_it_breaks_off():
    hot = HotWords([[1, 2, 3], [1, 2]], bonus=1.0, vocab_size=VOCAB)
    assert walk(hot, [1, 2, 3]) == [1, 2, 3, 3]
    assert walk(hot, [1, 2, 4]) == [1, 2, 2, 2], "the shorter phrase is whole, and kept"
    assert walk(hot, [1, 3]) == [1, 0, 0]
    assert walk(hot, [1]) == [1, 0], "taken back at the end"
    assert walk(hot, [1, 1, 2]) == [1, 1, 2, 2], "a new start where the first one breaks off"
    assert walk(hot, [4, 5]) == [0, 0, 0]
    overlapping = HotWords([[1, 1, 3], [1, 2, 1]], bonus=1.0, vocab_size=VOCAB)
    assert walk(overlapping, [1, 1, 2, 1]) == [1, 2, 2, 3, 3], "the rest of a broken path begins another phrase"


@pytest.mark.parametrize("phrase", [[], [0], [END], [1, VOCAB]])
def test_tokens_that_cannot_be_in_a_phrase_are_refused(phrase):
    with pytest.raises(ConfigError, match="are no phrase"):
        HotWords([phrase], bonus=1.0, vocab_size=VOCAB)


# ------------------------------------------------------------------------------------------------ words


@pytest.fixture(scope="module", params=["bpe", "unigram", "char"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    config = TokenizerConfig(type=request.param, vocab_size=22)
    texts = ["NEW YORK IS NEW", "YORK IS OLD", "OLD YORKSHIRE", "WE RENEW IT"] * 3
    return train_tokenizer(texts, config=config, out_dir=tmp_path_factory.mktemp("tokenizer"))


def test_words_are_spelled_as_transcripts_are(tokenizer):
    (phrase,) = encode_hot_words(["NEW YORK"], tokenizer)
    hot = HotWords([phrase], bonus=1.0, vocab_size=tokenizer.vocab_size)
    scorers = load_scorers(DecodeConfig(hot_words=("NEW YORK",)), tokenizer=tokenizer, device="cpu")
    assert isinstance(scorers.hot_words, HotWords) and torch.equal(scorers.hot_words.key, hot.key)
    for text, matched in (("OLD NEW YORK", True), ("NEW OLD YORK", False), ("WE RENEW YORK", False)):
        found = rewarded_tokens([phrase], tokenizer.encode(text))
        assert (found == len(phrase)) == matched


@pytest.mark.parametrize(
    ("word", "named"), [("NEW zoo", "does not know 'zoo'"), ("new", "'new'"), ("\u2581NEW", "U+2581"), (" ", "no word")]
)
def test_a_word_that_cannot_be_spelled_is_named(tokenizer, word, named):
    with pytest.raises(ConfigError) as err:
        encode_hot_words(["NEW", word], tokenizer)
    assert f"hot_words: {word!r}" in str(err.value) or f"spell {word!r}" in str(err.value)
    assert named in str(err.value)


# ------------------------------------------------------------------------------------------------ in a beam


def test_a_hot_word_turns_a_wrong_hypothesis_into_the_right_one():
    """1 2 was said; frame three is a little more like 3."""
    log_probs = torch.full((1, 5, VOCAB), 0.005)
    for frame, likely in enumerate([{1: 0.9}, {0: 0.9}, {2: 0.35, 3: 0.6}, {0: 0.9}, {4: 0.9}]):
        for label, probability in likely.items():
            log_probs[0, frame, label] = probability
    log_probs = (log_probs / log_probs.sum(dim=2, keepdim=True)).log()
    ids = {"blank_id": 0, "sos_eos_id": END}

    def best(phrases, bonus):
        config = DecodeConfig(method="ctc_beam", beam=4, hot_words=("said",), hot_word_bonus=bonus)
        scorers = Scorers(hot_words=HotWords(phrases, bonus=bonus, vocab_size=VOCAB))
        return ctc_beam_search(log_probs, torch.tensor([5]), config, scorers, **ids)[0][0]

    assert best([[1, 2]], 0.0).tokens == (1, 3, 4)
    assert best([[1, 2]], 0.5).tokens == (1, 2, 4)
    assert best([[1, 2]], 0.5).hot_words == pytest.approx(1.0)
    assert best([[2, 2]], 0.5).tokens == (1, 3, 4), "half a phrase is no reason"
    assert best([[2, 2]], 0.5).hot_words == 0.0
