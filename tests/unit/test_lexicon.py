"""Whole words: the tokens' probabilities are exactly the word n-gram's, and no other word comes out of any search."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from speechtx.bin import main as front
from speechtx.config.decode import DecodeConfig
from speechtx.config.errors import ConfigError, DataError
from speechtx.config.lm import LexiconConfig
from speechtx.config.schema import TokenizerConfig
from speechtx.experiment.language_model import load_language_model
from speechtx.model.lexicon import LexiconLM
from speechtx.search.beam import beam_search
from speechtx.search.ctc_beam import ctc_beam_search
from speechtx.search.decode import decode_encoded, why_nothing
from speechtx.search.scorers import Scorers
from speechtx.text.arpa import BOS, EOS, Arpa, read_arpa
from speechtx.text.lexicon import read_lexicon, spell
from speechtx.text.tokenizer import Tokenizer, train_tokenizer
from speechtx.training.lexicon import make_lexicon
from speechtx.training.lm_text import read_text
from speechtx.training.perplexity import Perplexity, perplexity

# A and AN are words and beginnings of words; BANANA repeats itself; É has two bytes.
WORDS = ["A", "AN", "ANT", "ANTS", "BAN", "BANANA", "BANANAS", "NAN", "TAN", "STAB", "CAFÉ"]
LN10 = math.log(10.0)


def sentences(seed: int, count: int) -> list[list[str]]:
    rng = np.random.default_rng(seed)
    table = rng.dirichlet(np.full(len(WORDS), 0.4), size=len(WORDS))
    made = []
    for _ in range(count):
        words = [int(rng.integers(len(WORDS)))]
        while rng.random() < 0.75:
            words.append(int(rng.choice(len(WORDS), p=table[words[-1]])))
        made.append([WORDS[i] for i in words])
    return made


def write(folder: Path, lines: list[list[str]]) -> Path:
    folder.mkdir(parents=True)
    (folder / "text").write_text("".join(f"s-{i:03d} {' '.join(words)}\n" for i, words in enumerate(lines)), encoding="utf-8")
    return folder


class Made:
    """A recipe's texts, a tokenizer, and models of words made with it."""

    def __init__(self, root: Path, kind: str) -> None:
        self.root = root
        self.train, self.dev = write(root / "train", sentences(1, 80)), write(root / "dev", sentences(2, 12))
        texts = [" ".join(words) for words in sentences(1, 80)]
        config = TokenizerConfig(type=kind, vocab_size={"unigram": 20, "bpe": 24}.get(kind, 100))
        self.tokenizer = train_tokenizer(texts, config=config, out_dir=root / "tokenizer")

    def lexicon(self, order: int, **keys: object) -> Path:
        out = self.root / f"order{order}{'x' * len(keys)}"
        config = LexiconConfig(order=order, **keys)  # type: ignore[arg-type]
        make_lexicon(config, train=self.train, dev=self.dev, tokenizer=self.root / "tokenizer", out=out, say=lambda _: None)
        return out

    def open(self, path: Path) -> LexiconLM:
        lm = load_language_model(path, tokens=self.tokenizer.pieces)
        assert isinstance(lm, LexiconLM)
        return lm


@pytest.fixture(scope="module", params=["unigram", "bpe", "char"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def chars(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("chars"), "char")


def plain_log_prob(arpa: Arpa, sentence: list[str]) -> float:
    """log P(sentence </s>) by the back-off rule, word by word, from a dictionary of n-grams."""
    table: dict[tuple[str, ...], tuple[float, float]] = {}
    for n, (rows, probs) in enumerate(zip(arpa.ngrams, arpa.log_prob, strict=True)):
        backoffs = arpa.log_backoff[n] if n < len(arpa.log_backoff) else np.zeros(len(rows))
        for row, p, b in zip(rows.tolist(), probs.tolist(), backoffs.tolist(), strict=True):
            table[tuple(arpa.words[i] for i in row)] = p, b

    def log10(context: tuple[str, ...], word: str) -> float:
        if (*context, word) in table:
            return table[(*context, word)][0]
        return table.get(context, (0.0, 0.0))[1] + log10(context[1:], word)

    full = [BOS, *sentence, EOS]
    return LN10 * sum(log10(tuple(full[max(0, i - arpa.order + 1) : i]), full[i]) for i in range(1, len(full)))


def follow(lm: LexiconLM, ids: list[int]) -> tuple[float, list[torch.Tensor]]:
    """The summed log-probability of tokens and of the sentence's end, and the rows of all steps."""
    state, total, rows = lm.start(1), 0.0, []
    for fed, scored in zip([lm.vocab_size - 1, *ids], [*ids, lm.vocab_size - 1], strict=True):
        row, state = lm.step(torch.tensor([fed]), state)
        rows.append(row[0])
        total += float(row[0, scored])
    return total, rows


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_tokens_of_a_sentence_are_as_likely_as_its_words(made: Made, order: int) -> None:
    path = made.lexicon(order)
    lm, arpa = made.open(path), read_arpa(path / "ngram.arpa")
    for words in [*sentences(3, 25), ["CAFÉ"] * 4, ["A", "AN", "A", "ANT", "AN"], []]:
        total, rows = follow(lm, made.tokenizer.encode(" ".join(words)))
        assert total == pytest.approx(plain_log_prob(arpa, words), abs=1e-4), words
        for row in rows:
            assert row.dtype == torch.float32 and row[0] == -torch.inf and row[1] == -torch.inf
            assert float(row.exp().sum()) == pytest.approx(1.0, abs=1e-5)


def test_kenlm_gives_the_same_probabilities_of_words(made: Made) -> None:
    kenlm = pytest.importorskip("kenlm", reason="kenlm is not installed")
    path = made.lexicon(3)
    lm, twin = made.open(path), kenlm.Model(str(path / "ngram.arpa"))
    for words in sentences(4, 20):
        total, _ = follow(lm, made.tokenizer.encode(" ".join(words)))
        assert total == pytest.approx(LN10 * twin.score(" ".join(words)), abs=1e-4)


def test_only_words_of_the_lexicon_can_be_drawn_and_sentences_end_only_behind_a_word(made: Made) -> None:
    lm = made.open(made.lexicon(2))
    generator = torch.Generator().manual_seed(0)
    state, tokens, drawn = lm.start(200), torch.full((200,), lm.vocab_size - 1), []
    for _ in range(30):
        scores, state = lm.step(tokens, state)
        uniform = torch.rand(scores.shape, generator=generator) * (scores > -torch.inf)  # any possible token, likely or not
        tokens = uniform.argmax(dim=1)
        drawn.append(tokens)
    seen = set()
    for row in torch.stack(drawn, dim=1).tolist():
        ids = row[: row.index(lm.vocab_size - 1)] if lm.vocab_size - 1 in row else []
        seen.update(made.tokenizer.decode(ids).split())
        assert made.tokenizer.encode(made.tokenizer.decode(ids)) == ids
    assert seen == set(WORDS)


def test_hypotheses_do_not_depend_on_each_other_and_can_be_reordered(chars: Made) -> None:
    lm = chars.open(chars.lexicon(2))
    texts = [chars.tokenizer.encode(text) for text in ("BANANA", "AN ANTS", "A A TAN")]
    alone = [follow(lm, ids)[1] for ids in texts]
    state, order = lm.start(3), torch.arange(3)
    for position in range(7):
        fed = torch.tensor([lm.vocab_size - 1 if position == 0 else ids[position - 1] for ids in texts])
        rows, state = lm.step(fed[order], state)
        for row, i in zip(rows, order.tolist(), strict=True):
            assert torch.equal(row, alone[i][position])
        if position == 2:
            order = torch.tensor([2, 0, 0, 1])
            state = state.select(order)


def test_little_memory_for_look_ahead_changes_nothing(chars: Made) -> None:
    lm = chars.open(chars.lexicon(3))
    small = LexiconLM(
        words=lm.words,
        spellings={int(lm.words.vocab_size - 1 - i): ids for i, ids in enumerate(sorted(lm.spelled), start=1)},
        tokens=chars.tokenizer.pieces,
        cache_bytes=1,
    )
    big = LexiconLM(
        words=lm.words,
        spellings={int(lm.words.vocab_size - 1 - i): ids for i, ids in enumerate(sorted(lm.spelled), start=1)},
        tokens=chars.tokenizer.pieces,
    )
    fed = [chars.tokenizer.encode(" ".join(words * 9))[:20] for words in sentences(5, 6)]
    states = [small.start(6), big.start(6)]
    tokens = torch.full((6,), lm.vocab_size - 1)
    for position in range(20):
        (a, states[0]), (b, states[1]) = small.step(tokens, states[0]), big.step(tokens, states[1])
        assert torch.equal(a, b)
        tokens = torch.tensor([ids[position] for ids in fed])
    assert small.slots == 1 and len(small.look) <= 12, "contexts of six hypotheses at most, and of the words that end"


def test_a_hypothesis_that_left_the_lexicon_is_dead_until_a_sentence_begins(chars: Made) -> None:
    lm = chars.open(chars.lexicon(2))
    end = lm.vocab_size - 1
    for wrong in (0, 1, chars.tokenizer.pieces.index("S")):
        first, state = lm.step(torch.tensor([end]), lm.start(1))
        rows, state = lm.step(torch.tensor([wrong]), state)
        assert (rows == -torch.inf).all()
        rows, state = lm.step(torch.tensor([2]), state)
        assert (rows == -torch.inf).all()
        assert torch.equal(lm.step(torch.tensor([end]), state)[0], first)


def test_models_opened_in_inference_mode_work_outside_of_it_and_the_other_way_round(chars: Made) -> None:
    path = chars.lexicon(2)
    ids = chars.tokenizer.encode("TAN ANT A")
    with torch.inference_mode():
        lm = chars.open(path)
        inside, _ = follow(lm, ids)
    lm.look = lm.look[:0]
    assert follow(chars.open(path), ids)[0] == inside


# ------------------------------------------------------------------------------------------------ searches


class GivenOutput:
    """A model without a decoder whose encoder's output is what CTC says."""

    decoder = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.blank_id, self.sos_eos_id = tokenizer.blank_id, tokenizer.sos_eos_id

    def ctc_log_probs(self, enc_out: torch.Tensor) -> torch.Tensor:
        return enc_out

    def ctc_outputs(self, enc_out: torch.Tensor) -> list[torch.Tensor]:
        return [enc_out]


def texts_of(chars: Made, method: str, scorers: Scorers, **keys: object) -> list[str]:
    """What a search makes of noise."""
    generator = torch.Generator().manual_seed(0)
    config = DecodeConfig(method=method, beam=6, nbest=6, ngram_weight=0.3 if scorers.ngram else 0.0, **keys)  # type: ignore[arg-type]
    tokenizer = chars.tokenizer
    log_probs = (4 * torch.randn(4, 12, tokenizer.vocab_size, generator=generator)).log_softmax(dim=-1)
    lens = torch.tensor([12, 11, 9, 7])
    if method == "ctc_beam":
        nbests = ctc_beam_search(log_probs, lens, config, scorers, blank_id=tokenizer.blank_id, sos_eos_id=tokenizer.sos_eos_id)
    else:
        nbests = beam_search(GivenOutput(tokenizer), log_probs, lens, config, scorers)  # type: ignore[arg-type]
    assert all(nbests), "every utterance has a hypothesis"
    return [tokenizer.decode(hypothesis.tokens) for nbest in nbests for hypothesis in nbest]


@pytest.mark.parametrize(("method", "keys"), [("beam", {"ctc_weight": 1.0}), ("ctc_beam", {})])
def test_no_search_puts_out_a_word_that_is_not_in_the_lexicon(chars: Made, method: str, keys: dict[str, float]) -> None:
    lm = chars.open(chars.lexicon(2))
    free = {word for text in texts_of(chars, method, Scorers(), **keys) for word in text.split()}
    assert not free <= set(WORDS), "without the lexicon, noise spells anything"
    bound = {word for text in texts_of(chars, method, Scorers(ngram=lm), **keys) for word in text.split()}
    assert bound <= set(WORDS)


@pytest.mark.parametrize(("method", "keys"), [("beam", {"ctc_weight": 1.0}), ("ctc_beam", {})])
def test_speech_that_stops_inside_a_word_has_a_hypothesis_all_the_same(chars: Made, method: str, keys: dict[str, float]) -> None:
    lm, tokenizer = chars.open(chars.lexicon(2)), chars.tokenizer
    ids = tokenizer.encode("BANAN")  # of BANANA
    log_probs = torch.full((2, len(ids), tokenizer.vocab_size), -12.0)
    log_probs[0, range(len(ids)), ids] = 0.0
    log_probs[1] = torch.nan  # nothing will ever come of this one
    lens = torch.tensor([len(ids)] * 2)
    config = DecodeConfig(method=method, beam=1, ngram_weight=0.3, **keys)  # type: ignore[arg-type]
    given = GivenOutput(tokenizer)
    spoken, broken = decode_encoded(given, log_probs.log_softmax(dim=-1), lens, config, Scorers(ngram=lm))  # type: ignore[arg-type]
    assert [tokenizer.decode(hypothesis.tokens) for hypothesis in spoken] in (["BAN"], ["BANANA"])
    assert not broken
    assert "none of 16 hypotheses end" in why_nothing(config)


# ------------------------------------------------------------------------------------------------ making and opening


def test_further_words_are_possible_and_removed_lines_are_not(chars: Made, tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("SNAB\nTAB STAB\n")
    path = chars.lexicon(2, words=(str(tmp_path / "more.txt"),))
    lm = chars.open(path)
    assert math.isfinite(follow(lm, chars.tokenizer.encode("A SNAB TAB"))[0])
    lines = (path / "lexicon.txt").read_text().splitlines(keepends=True)
    (path / "lexicon.txt").write_text("".join(line for line in lines if not line.startswith("SNAB ")))
    lm = chars.open(path)
    assert follow(lm, chars.tokenizer.encode("A SNAB TAB"))[0] == -math.inf
    total, _ = follow(lm, chars.tokenizer.encode("A TAB"))
    assert total == pytest.approx(plain_log_prob(read_arpa(path / "ngram.arpa"), ["A", "TAB"]), abs=1e-4)


def test_words_that_the_tokenizer_cannot_spell_are_left_out_and_named(chars: Made, tmp_path: Path) -> None:
    said: list[str] = []
    train = write(tmp_path / "train", [["A", "QUIZ"], ["AN", "ANT"], ["<s>", "A"]])
    lexicon, impossible = spell(["A", "QUIZ", "<s>"], chars.tokenizer)
    assert list(lexicon) == ["A"] and impossible == ["<s>", "QUIZ"]
    dev = write(tmp_path / "dev", [["BAN", "A"], ["ANT"], ["A", "AN", "NAN"]])

    def make(train: Path, out: Path) -> Perplexity:
        tokenizer = chars.root / "tokenizer"
        return make_lexicon(LexiconConfig(order=1), train=train, dev=dev, tokenizer=tokenizer, out=out, say=said.append)

    with pytest.raises(DataError, match="every sentence has a word that is not in the lexicon"):
        make(write(tmp_path / "tan", [["TAN"]]), tmp_path / "none")
    result = make(train, tmp_path / "lm")
    assert "2 words that the tokenizer cannot spell, and their sentences: <s> QUIZ" in "\n".join(said)
    assert (result.outside_sentences, result.outside_words, result.sentences, result.words) == (2, 2, 1, 1)


def test_perplexity_counts_words_outside_of_the_lexicon_and_leaves_their_sentences_out(made: Made, tmp_path: Path) -> None:
    path = made.lexicon(0)
    known, unknown = ["A", "TAN", "CAFÉ"], ["SAT", "A", "BAT"]
    text = read_text((write(tmp_path / "x", [known, unknown]),), made.tokenizer)
    result = perplexity(made.open(path), text)
    assert (result.sentences, result.words, result.outside_words, result.outside_sentences) == (1, 3, 2, 1)
    assert result.per_word == pytest.approx(len(WORDS) + 1, rel=1e-4), "all words and the end are equally likely"
    assert "left out: 1 sentences with 2 words outside of the lexicon" in str(result)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("A ▁ A\nA ▁ A\n", r"lexicon.txt:2: 'A' stands already in line 1"),
        ("TAN ▁ T A\n", r"lexicon.txt:1: 'TAN' is spelled ▁ T A, but the tokenizer spells it ▁ T A N"),
        ("\nTAN\n", r"lexicon.txt:2: 'TAN' is spelled with no token"),
        ("QUIZ ▁ Q U I Z\n", r"lexicon.txt:1: 'QUIZ' cannot be written with the tokenizer's tokens"),
        ("</s> ▁\n", r"lexicon.txt:1: '</s>' cannot be written"),
        ("\n", "no word in it"),
    ],
)
def test_a_wrong_lexicon_is_refused_by_line(chars: Made, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "lexicon.txt").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_lexicon(tmp_path / "lexicon.txt", chars.tokenizer)


def test_a_lexicon_that_is_no_text_or_not_there_is_refused(chars: Made, tmp_path: Path) -> None:
    (tmp_path / "lexicon.txt").write_bytes(b"A \xff\n")
    with pytest.raises(DataError, match="not UTF-8 at byte 3"):
        read_lexicon(tmp_path / "lexicon.txt", chars.tokenizer)
    with pytest.raises(DataError, match="no such file"):
        read_lexicon(tmp_path / "none.txt", chars.tokenizer)


def test_a_word_without_probability_is_refused(chars: Made, tmp_path: Path) -> None:
    path = chars.lexicon(1)
    (path / "lexicon.txt").write_text((path / "lexicon.txt").read_text() + "BAT ▁ B A T\n")
    with pytest.raises(DataError, match=r"'BAT' is no unigram of .*ngram.arpa"):
        load_language_model(path, tokens=chars.tokenizer.pieces)


def test_the_command_line_makes_and_measures_it(chars: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "lm.yaml").write_text("lexicon: {order: 3}\n")
    arguments = ["--config", str(tmp_path / "lm.yaml"), "--set", "lexicon.order=2", "--train", str(chars.train)]
    arguments += ["--dev", str(chars.dev), "--tokenizer", str(chars.root / "tokenizer"), str(tmp_path / "lm")]
    assert front.main(["lm", "lexicon", *arguments]) == 0
    assert "11 words, modified Kneser-Ney of order 2, of 80 sentences" in capsys.readouterr().out
    stored = json.loads((tmp_path / "lm/perplexity.json").read_text())
    assert stored["sentences"] == 12 and stored["outside_words"] == 0
    assert front.main(["lm", "perplexity", str(tmp_path / "lm"), str(chars.dev)]) == 0
    assert f"{stored['per_word']:.2f} a word" in capsys.readouterr().out


def test_the_recipe_is_told_every_file_that_the_words_come_from(
    chars: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lm.yaml").write_text("lexicon: {words: [more.txt]}\n")
    arguments = ["lm", "texts", "--config", str(tmp_path / "lm.yaml"), "--train", str(chars.train)]
    assert front.main([*arguments, "lexicon"]) == 0
    assert capsys.readouterr().out == f"{chars.train}/text\nmore.txt\n"
    (tmp_path / "lm.yaml").write_text("lexicon: {text: [a.txt]}\n")
    assert front.main([*arguments, "lexicon"]) == 0
    assert capsys.readouterr().out == "a.txt\n"
    assert front.main([*arguments, "ngram"]) == 0 and not capsys.readouterr().out


def test_a_file_of_further_words_that_is_not_there_is_named(chars: Made, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lexicon.words: .*none.txt: no such file"):
        chars.lexicon(1, words=(str(tmp_path / "none.txt"),))
    assert Tokenizer.load(chars.root / "tokenizer").pieces == chars.tokenizer.pieces
