"""What joins the beam search beside decoder and CTC, and what bounds it, against the plain search that knows only definitions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_beam import assert_same, ctc_only, encode, sharp_model

from speechtx.config.decode import DecodeConfig
from speechtx.config.errors import ConfigError, ExperimentError
from speechtx.config.lm import TransformerLmConfig
from speechtx.model.language_model import TransformerLM
from speechtx.model.ngram import NgramLM
from speechtx.model.recognizer import Recognizer
from speechtx.search.beam import beam_search
from speechtx.search.hypothesis import Hypothesis
from speechtx.search.reference import reference_search
from speechtx.search.repeats import Repeats
from speechtx.search.scorers import Scorers, load_scorers
from speechtx.text.kneser_ney import estimate_ngram
from speechtx.text.tokenizer import Tokenizer

VOCAB = 9  # of `sharp_model`
TOKENS = ["<blank>", "<unk>", *"abcdef", "<sos/eos>"]


def transformer(seed: int = 0) -> TransformerLM:
    torch.manual_seed(seed)
    lm = TransformerLM(config=TransformerLmConfig(layers=1, dim=16, heads=2, ff_dim=32), vocab_size=VOCAB).eval()
    with torch.no_grad():
        lm.output.weight.mul_(6)
    return lm


def ngram(seed: int = 0) -> NgramLM:
    rng = np.random.default_rng(seed)
    sentences = [list(rng.choice(6, p=[0.4, 0.3, 0.1, 0.1, 0.05, 0.05], size=rng.integers(1, 8)) + 2) for _ in range(60)]
    return NgramLM(arpa=estimate_ngram(sentences, pieces=TOKENS, order=3).arpa, tokens=TOKENS)


@dataclass(frozen=True)
class Last:
    """State of `Bonuses`: the last token."""

    token: torch.Tensor

    def select(self, rows: torch.Tensor) -> Last:
        return Last(self.token[rows])


class Bonuses:
    """Rewards some pairs of tokens, as hot words do: more than zero, and zero for <blank>."""

    def __init__(self, seed: int = 0, *, bonus: float = 1.0, vocab_size: int = VOCAB) -> None:
        self.vocab_size = vocab_size
        hot = torch.rand(vocab_size, vocab_size, generator=torch.Generator().manual_seed(seed)) < 0.2
        self.table = bonus * hot.float()
        self.table[:, [0, -1]] = 0.0

    def start(self, num: int) -> Last:
        return Last(torch.zeros(num, dtype=torch.int64))

    def step(self, tokens: torch.Tensor, state: Last) -> tuple[torch.Tensor, Last]:
        assert len(tokens) == len(state.token)
        return self.table[tokens], Last(tokens)


SCORERS = Scorers(lm=transformer(), ngram=ngram(), hot_words=Bonuses())

OPTIONS: dict[str, dict[str, Any]] = {
    "lm": {"lm_weight": 0.5},
    "ngram": {"ngram_weight": 0.8},
    "hot words": {"hot_words": ("x",)},
    "all scorers": {"lm_weight": 0.3, "ngram_weight": 0.4, "hot_words": ("x",), "length_bonus": 0.7},
    "lm beside ctc alone": {"ctc_weight": 1.0, "lm_weight": 0.5, "length_bonus": 0.5},
    "lm beside attention alone": {"ctc_weight": 0.0, "lm_weight": 0.5, "ngram_weight": 0.2},
    "coverage": {"coverage_weight": 0.9, "coverage_threshold": 0.3},
    "coverage without ctc": {"ctc_weight": 0.0, "coverage_weight": 2.0, "coverage_threshold": 0.15},
    "no repeats": {"max_repeats": 1, "length_bonus": 1.0},
    "two repeats": {"max_repeats": 2, "length_bonus": 2.0, "ctc_weight": 0.0},
    "normalised": {"length_normalization": 1.0},
    "half normalised, sums above zero": {"length_normalization": 0.5, "length_bonus": 3.0},
    "at least": {"min_len_ratio": 0.5},
    "exactly": {"min_len_ratio": 0.7, "max_len_ratio": 0.7},
    "beam one": {"beam": 1, "nbest": 1, "lm_weight": 0.5},
    "beam larger than the vocabulary": {"beam": 12, "nbest": 12, "lm_weight": 0.5, "max_len_ratio": 0.5},
    "everything": {
        "lm_weight": 0.3,
        "ngram_weight": 0.4,
        "hot_words": ("x",),
        "length_bonus": 0.7,
        "coverage_weight": 0.5,
        "max_repeats": 1,
        "length_normalization": 0.8,
        "min_len_ratio": 0.3,
    },
}


def configured(name: str) -> DecodeConfig:
    return DecodeConfig(**{"beam": 4, "nbest": 3, "max_len_ratio": 0.8, **OPTIONS[name]})


@pytest.fixture(scope="module")
def model() -> Recognizer:
    return sharp_model(1)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_searches_like_the_plain_twin_and_each_utterance_as_if_alone(model, name):
    config = configured(name)
    enc_out, enc_lens = encode(model, [36, 9, 27], seed=3)  # the second has one frame and leaves the batch first
    together = beam_search(model, enc_out, enc_lens, config, SCORERS)
    for row, length in enumerate(enc_lens.tolist()):
        assert_same(together[row], reference_search(model, enc_out[row, :length], config, SCORERS))
        (alone,) = beam_search(model, enc_out[row : row + 1, :length], enc_lens[row : row + 1], config, SCORERS)
        assert_same(together[row], alone)


@pytest.mark.parametrize("name", sorted(set(OPTIONS) - {"beam one", "at least"}))
def test_every_option_changes_what_is_found(model, name):
    enc_out, enc_lens = encode(model, [36, 9, 27], seed=3)
    config = configured(name)
    plain = config.model_copy(
        update={
            key: DecodeConfig.model_fields[key].default for key in OPTIONS[name] if key not in ("ctc_weight", "beam", "nbest")
        }
    )
    if name == "beam larger than the vocabulary":
        plain = plain.model_copy(update={"max_len_ratio": 0.5, "lm_weight": 0.0})
    with_it, without = (beam_search(model, enc_out, enc_lens, c, SCORERS) for c in (config, plain))
    assert [[h.score for h in nbest] for nbest in with_it] != [[h.score for h in nbest] for nbest in without]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    ctc=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    lm=st.sampled_from([0.0, 0.4]),
    ngram_weight=st.sampled_from([0.0, 0.5]),
    bonus=st.sampled_from([-0.5, 0.0, 1.0]),
    coverage=st.sampled_from([0.0, 0.5]),
    power=st.sampled_from([0.0, 0.6, 1.0]),
)
def test_the_score_is_the_weighted_sum_of_the_parts_whatever_takes_part(seed, ctc, lm, ngram_weight, bonus, coverage, power):
    model = sharp_model(2)
    enc_out, enc_lens = encode(model, [40, 23], seed)
    config = DecodeConfig(
        beam=3,
        nbest=3,
        ctc_weight=ctc,
        lm_weight=lm,
        ngram_weight=ngram_weight,
        length_bonus=bonus,
        coverage_weight=coverage if ctc < 1 else 0.0,
        length_normalization=power,
        hot_words=("x",),
    )
    for nbest in beam_search(model, enc_out, enc_lens, config, SCORERS):
        assert nbest and [h.score for h in nbest] == sorted((h.score for h in nbest), reverse=True)
        for h in nbest:
            assert h.score == pytest.approx(weighted_sum(h, config), abs=1e-9)
            assert (h.lm is None) == (lm == 0) and (h.ngram is None) == (ngram_weight == 0) and h.hot_words is not None
            assert h.coverage is None if config.coverage_weight == 0 else 0 <= h.coverage <= enc_out.shape[1]


def weighted_sum(h: Hypothesis, config: DecodeConfig) -> float:
    total = h.length_bonus + (h.hot_words or 0.0) + config.coverage_weight * (h.coverage or 0.0)
    total += (1 - config.ctc_weight) * (h.att or 0.0) + config.ctc_weight * (h.ctc or 0.0)
    total += config.lm_weight * (h.lm or 0.0) + config.ngram_weight * (h.ngram or 0.0)
    return total / (len(h.tokens) + 1) ** config.length_normalization


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    bonus=st.sampled_from([-0.5, 0.0, 0.7, 2.0]),
    power=st.sampled_from([0.0, 0.5, 1.0]),
    hot=st.sampled_from([0.0, 0.5, 3.0]),
)
def test_the_search_never_stops_before_a_better_hypothesis_could_end(seed, bonus, power, hot):
    """The plain search never stops early; bonuses and normalisation tempt the fast one to."""
    generator = torch.Generator().manual_seed(seed)
    log_probs = (3 * torch.randn(1, 6, 5, generator=generator)).log_softmax(-1)
    config = DecodeConfig(
        beam=3,
        ctc_weight=1.0,
        length_bonus=bonus,
        length_normalization=power,
        hot_words=("x",) if hot else (),
        hot_word_bonus=hot,
    )
    scorers = Scorers(hot_words=Bonuses(seed, bonus=hot, vocab_size=5))
    model: Any = ctc_only(log_probs)
    (fast,) = beam_search(model, log_probs, torch.tensor([6]), config, scorers)
    assert_same(fast, reference_search(model, log_probs[0], config, scorers))


@pytest.mark.parametrize("seed", range(4))
def test_recent_end_detection_stops_sooner_and_finds_the_same_text_where_hypotheses_end_clearly(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, 60, 8, generator=generator)
    logits[:, :, 0] += 6
    logits[0, ::4].scatter_(1, torch.randint(1, 7, (15, 1), generator=generator), 12.0)
    log_probs = logits.log_softmax(-1)
    model: Any = ctc_only(log_probs)
    steps = {}
    found = {}
    for end_detection in ("exact", "recent"):
        lm = Counting(8)
        config = DecodeConfig(beam=5, ctc_weight=1.0, lm_weight=1.0, length_bonus=3.0, end_detection=end_detection)
        (found[end_detection],) = beam_search(model, log_probs, torch.tensor([60]), config, Scorers(lm=lm))
        steps[end_detection] = lm.calls
    assert steps["recent"] < steps["exact"] and len(found["exact"][0].tokens) >= 15
    assert_same(found["recent"], found["exact"])


class Counting(Bonuses):
    """Every token is as likely as any other, and every question is counted."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size=vocab_size)
        self.table = torch.full((vocab_size, vocab_size), -float(np.log(vocab_size - 1)))
        self.calls = 0

    def step(self, tokens: torch.Tensor, state: Last) -> tuple[torch.Tensor, Last]:
        self.calls += 1
        return super().step(tokens, state)


@pytest.mark.parametrize("seed", range(6))
def test_recent_end_detection_does_not_end_a_search_whose_live_hypotheses_are_better(seed):
    """A poor hypothesis that ends at once must not end the search three tokens later."""
    log_probs = torch.full((1, 30, 6), -8.0)
    for t in range(30):
        log_probs[0, t, [0, 1 + (t // 2 + seed) % 4][t % 2]] = 0.0
    log_probs = log_probs.log_softmax(-1)
    model: Any = ctc_only(log_probs)
    config = DecodeConfig(beam=10, ctc_weight=1.0, end_detection="recent")
    ((best,),) = beam_search(model, log_probs, torch.tensor([30]), config)
    assert len(best.tokens) == 15


@pytest.mark.parametrize("end_detection", ["exact", "recent"])
def test_a_scorer_of_weight_zero_is_never_asked(model, end_detection):
    enc_out, enc_lens = encode(model, [20])
    lm = Counting(VOCAB)
    config = DecodeConfig(beam=3, end_detection=end_detection)
    with_it = beam_search(model, enc_out, enc_lens, config, Scorers(lm=lm, ngram=lm, hot_words=lm))
    assert lm.calls == 0 and with_it == beam_search(model, enc_out, enc_lens, config)


def test_what_a_language_model_excludes_is_never_found_and_its_nan_harms_no_neighbour(model):
    enc_out, enc_lens = encode(model, [40, 40])
    without_a = Counting(VOCAB)
    without_a.table[:, 2] = -torch.inf
    config = DecodeConfig(beam=4, nbest=4, lm_weight=0.2, length_bonus=1.0)
    nbests = beam_search(model, enc_out, enc_lens, config, Scorers(lm=without_a))
    assert nbests[0] and not any(2 in h.tokens for nbest in nbests for h in nbest)
    broken = Counting(VOCAB)
    broken.table[3] = torch.nan  # after token 3 it answers nonsense
    nbests = beam_search(model, enc_out, enc_lens, config, Scorers(lm=broken))
    assert nbests[0] and not any(3 in h.tokens for nbest in nbests for h in nbest)
    broken.table[:] = torch.nan
    assert beam_search(model, enc_out, enc_lens, config, Scorers(lm=broken)) == [[], []]


def test_tokens_stand_no_more_often_in_a_row_than_allowed():
    state = Repeats.start(1, limit=2, device=torch.device("cpu"))
    forbidden = []
    for label in (1, 1, 2, 1, 2, 1, 1, 3):
        total = torch.zeros(1, 5)
        state.forbid(total)
        forbidden.append([int(i) for i in (total[0] == -torch.inf).nonzero()])
        state = state.append(torch.tensor([label]))
    # 11 may not become 111, nor 12121 the third 12
    assert forbidden == [[], [], [1], [], [], [], [2], [1]]


@settings(max_examples=200, deadline=None)
@given(tokens=st.lists(st.integers(1, 2), max_size=14), limit=st.integers(1, 3))
def test_what_is_forbidden_is_what_would_repeat(tokens, limit):
    state = Repeats.start(1, limit=limit, device=torch.device("cpu"))
    for label in tokens:
        state = state.append(torch.tensor([label]))
    total = torch.zeros(1, 3)
    state.forbid(total)
    for token in (1, 2):
        longer = [*tokens, token]
        periods = range(1, len(longer) // (limit + 1) + 1)
        repeats = any(longer[-p * (limit + 1) :] == longer[-p:] * (limit + 1) for p in periods)
        assert (float(total[0, token]) == -np.inf) == repeats


@pytest.mark.parametrize("key", ["lm", "ngram"])
def test_a_weight_without_its_model_or_with_one_of_another_vocabulary_is_refused(model, key):
    enc_out, enc_lens = encode(model, [20])
    config = DecodeConfig(**{f"{key}_weight": 0.5})
    with pytest.raises(ConfigError, match=rf"{key}_weight 0\.5 needs a language model: give its directory with --{key}"):
        beam_search(model, enc_out, enc_lens, config)
    with pytest.raises(ConfigError, match=r"made for 5 tokens, but the model has 9"):
        beam_search(model, enc_out, enc_lens, config, Scorers(**{key: Counting(5)}))
    with pytest.raises(ConfigError, match="no scorer for them"):
        beam_search(model, enc_out, enc_lens, DecodeConfig(hot_words=("x",)))


def test_scorers_are_loaded_for_their_weights_only(tmp_path):
    tokenizer: Any = Tokenizer.__new__(Tokenizer)
    tokenizer.pieces = TOKENS
    nowhere = tmp_path / "nowhere"
    assert load_scorers(DecodeConfig(), tokenizer=tokenizer, lm=nowhere, ngram=nowhere, device="cpu") == Scorers()
    with pytest.raises(ExperimentError, match="nowhere: no language model"):
        load_scorers(DecodeConfig(lm_weight=0.1), tokenizer=tokenizer, lm=nowhere, device="cpu")
    with pytest.raises(ConfigError, match=r"ngram_weight 0\.1 needs a language model"):
        load_scorers(DecodeConfig(ngram_weight=0.1), tokenizer=tokenizer, lm=nowhere, device="cpu")
    arpa = tmp_path / "a.arpa"
    arpa.write_text("\\data\\\nngram 1=4\n\n\\1-grams:\n-99\t<s>\n-0.5\ta\n-0.5\t<unk>\n-0.5\t</s>\n\n\\end\\\n")
    loaded = load_scorers(DecodeConfig(ngram_weight=0.1), tokenizer=tokenizer, ngram=arpa, device="cpu")
    assert loaded.lm is None and loaded.ngram is not None and loaded.ngram.vocab_size == VOCAB


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"coverage_weight": 0.5, "ctc_weight": 1.0}, "leaves the decoder out"),
        ({"method": "attention_rescoring", "ctc_weight": 1.0}, "leaves the decoder out; use method ctc_beam"),
        ({"method": "ctc_greedy", "nbest": 5}, "method ctc_greedy has no nbest"),
        ({"method": "ctc_beam", "end_detection": "recent"}, "method ctc_beam has no end_detection"),
        ({"min_len_ratio": 2.0}, "exceeds max_len_ratio"),
    ],
)
def test_keys_that_would_do_nothing_are_refused(keys, words):
    with pytest.raises(ValueError, match=words):
        DecodeConfig(**keys)
