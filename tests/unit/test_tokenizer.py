"""The tokenizer: ids, round trips, reproducibility and its errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from speechtx.config.errors import ConfigError, DataError, ExperimentError
from speechtx.config.schema import TokenizerConfig
from speechtx.text.normalize import split_characters, split_words, squeeze_spaces
from speechtx.text.tokenizer import Tokenizer, report_unknown, train_tokenizer

TEXTS = [
    "ENTER FOUR FIVE",
    "ERASE C Q Q F SEVEN",
    "ONE TWO THREE <noise> ZERO",
    "你好 世界 naïve café",
    "P I T T S B U R G H",
    "מה שלומך 🙂 a\u0301",
    "ﬁne ㎏ Ⅳ",  # compatibility characters that NFKC would rewrite
]


def config(**values: object) -> TokenizerConfig:
    return TokenizerConfig.model_validate({"vocab_size": 90, **values})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(TEXTS, config=config(user_symbols=("<noise>",)), out_dir=tmp_path_factory.mktemp("bpe"))


@pytest.mark.parametrize("kind", ["bpe", "unigram", "char"])
def test_ids_follow_the_architecture_page(kind: str, tmp_path: Path) -> None:
    made = train_tokenizer(TEXTS, config=config(type=kind, vocab_size=54), out_dir=tmp_path)
    assert made.pieces[:2] == ["<blank>", "<unk>"]
    assert made.pieces[-1] == "<sos/eos>"
    assert (made.blank_id, made.unk_id, made.sos_eos_id) == (0, 1, made.vocab_size - 1)
    assert made.vocab_size == len(made.pieces) == len(set(made.pieces))
    if kind != "char":
        assert made.vocab_size == 54 + 2
    sp = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "bpe.model"))
    assert made.encode(TEXTS[1]) == [i + 1 for i in sp.encode(TEXTS[1])]
    assert [line.rsplit(" ", 1) for line in (tmp_path / "tokens.txt").read_text(encoding="utf-8").splitlines()] == [
        [piece, str(i)] for i, piece in enumerate(made.pieces)
    ]


@pytest.mark.parametrize("kind", ["bpe", "unigram", "char"])
def test_training_text_comes_back_exactly_without_unicode_being_rewritten(kind: str, tmp_path: Path) -> None:
    made = train_tokenizer(TEXTS, config=config(type=kind, vocab_size=54), out_dir=tmp_path)
    for text in TEXTS:
        ids = made.encode(text)
        assert made.unk_id not in ids
        assert made.decode(ids) == text


@given(text=st.text(alphabet=[*sorted(set("".join(TEXTS))), "\t"], max_size=30))
def test_any_text_of_known_characters_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    if tokenizer.unk_id not in ids:  # a character seen only inside <noise> is not known alone
        assert tokenizer.decode(ids) == squeeze_spaces(text)
    assert all(1 <= i < tokenizer.sos_eos_id for i in ids)


def test_user_symbols_are_one_token(tokenizer: Tokenizer) -> None:
    pieces = tokenizer.encode_pieces("ONE <noise> TWO")
    assert "<noise>" in pieces
    assert tokenizer.decode(tokenizer.encode("ONE <noise> TWO")) == "ONE <noise> TWO"


@pytest.mark.parametrize("kind", ["bpe", "unigram", "char"])
def test_the_same_text_gives_the_same_bytes(kind: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        train_tokenizer(TEXTS, config=config(type=kind, vocab_size=54), out_dir=tmp_path / name)
    for file in ("bpe.model", "tokens.txt"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_vocabulary_too_large_names_the_largest_that_works(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"vocab_size 9000 .* largest possible is (\d+)") as caught:
        train_tokenizer(TEXTS, config=config(type=kind, vocab_size=9000), out_dir=tmp_path)
    largest = int(str(caught.value).rsplit("vocab_size=", 1)[1].split()[0])
    assert not (tmp_path / "bpe.model").exists()
    made = train_tokenizer(TEXTS, config=config(type=kind, vocab_size=largest), out_dir=tmp_path)
    assert made.vocab_size == largest + 2


def test_a_vocabulary_too_small_names_the_smallest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"smallest possible is (\d+)"):
        train_tokenizer(TEXTS, config=config(vocab_size=5), out_dir=tmp_path)
    with pytest.raises(ConfigError, match="byte_fallback alone takes 256"):
        train_tokenizer(TEXTS, config=config(vocab_size=100, byte_fallback=True), out_dir=tmp_path)


def test_byte_fallback_spells_the_unknown(tmp_path: Path) -> None:
    made = train_tokenizer(TEXTS, config=config(vocab_size=330, byte_fallback=True), out_dir=tmp_path)
    assert made.decode(made.encode("ONE жук")) == "ONE жук"


def test_no_long_line_is_left_out_of_training(tmp_path: Path) -> None:
    made = train_tokenizer(["A B", "C D " * 5000 + "Ω"], config=config(type="char"), out_dir=tmp_path)
    assert "Ω" in made.pieces


def test_training_says_nothing_on_the_screen(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train_tokenizer(TEXTS, config=config(), out_dir=tmp_path)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert (tmp_path / "sentencepiece.log").stat().st_size > 0


@pytest.mark.parametrize("symbol", ["", "two words", "<unk>", "<blank>", "<s>", "a\u2581"])
def test_impossible_user_symbols_are_refused(symbol: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="user_symbols"):
        train_tokenizer(TEXTS, config=config(user_symbols=(symbol,)), out_dir=tmp_path)


def test_a_user_symbol_listed_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="listed twice"):
        train_tokenizer(TEXTS, config=config(user_symbols=("<n>", "<n>")), out_dir=tmp_path)


@pytest.mark.parametrize("text", ["A \u2581 B", "A\u2585", "A\x00B", "A\udc80"])
def test_characters_that_sentencepiece_would_swallow_are_errors(tokenizer: Tokenizer, text: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"U\+"):
        train_tokenizer([*TEXTS, text], config=config(), out_dir=tmp_path)
    with pytest.raises(DataError, match=r"U\+"):
        tokenizer.encode(text)


def test_no_text_is_an_error(tmp_path: Path) -> None:
    for texts in ([], ["", "  "]):
        with pytest.raises(DataError, match="empty"):
            train_tokenizer(texts, config=config(), out_dir=tmp_path)


def test_unknown_characters_are_counted_and_named(tokenizer: Tokenizer) -> None:
    report = report_unknown(tokenizer, {"u1": "ENTER жук", "u2": "ONE", "u3": "Ж ONE жTWOж"})
    assert report.unknown_utterances == ["u1", "u3"]
    assert (report.utterances, report.words, report.unknown_words) == (3, 6, 3)
    assert report.unknown_tokens == 4
    assert "u1 u3" in str(report)
    assert "<unk>" in tokenizer.decode(tokenizer.encode("ENTERж"))
    assert len(tokenizer.decode(tokenizer.encode("TWOжTWO")).split()) == 1


def test_known_text_reports_no_unknown(tokenizer: Tokenizer) -> None:
    report = report_unknown(tokenizer, {str(i): text for i, text in enumerate(TEXTS)})
    assert report.unknown_tokens == 0
    assert str(report).endswith("0 <unk>")


def test_decode_skips_blank_and_eos_and_refuses_ids_outside(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ONE TWO")
    assert tokenizer.decode([0, *ids, tokenizer.sos_eos_id]) == "ONE TWO"
    assert tokenizer.decode([]) == ""
    for bad in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            tokenizer.decode([bad])


def test_loading_finds_files_that_do_not_belong_together(tmp_path: Path) -> None:
    made = train_tokenizer(TEXTS, config=config(), out_dir=tmp_path)
    assert Tokenizer.load(tmp_path).pieces == made.pieces
    tokens = (tmp_path / "tokens.txt").read_text(encoding="utf-8")
    (tmp_path / "tokens.txt").write_text(tokens.replace("<unk> 1", "<unknown> 1"), encoding="utf-8")
    with pytest.raises(ExperimentError, match=r"tokens.txt:2"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokens.txt").write_text(tokens + "extra 99\n", encoding="utf-8")
    with pytest.raises(ExperimentError, match="93 tokens"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokens.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ExperimentError):
        Tokenizer.load(tmp_path)


def test_loading_refuses_missing_damaged_and_foreign_models(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match="no such file"):
        Tokenizer.load(tmp_path)
    train_tokenizer(TEXTS, config=config(), out_dir=tmp_path)
    (tmp_path / "bpe.model").write_bytes(b"import os")
    with pytest.raises(ExperimentError, match="not a sentencepiece model"):
        Tokenizer.load(tmp_path)
    with (tmp_path / "bpe.model").open("wb") as file:  # sentencepiece's defaults: bos 1, eos 2
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXTS), model_writer=file, vocab_size=54, minloglevel=2)
    with pytest.raises(ExperimentError, match="was not made by"):
        Tokenizer.load(tmp_path)


def test_words_are_split_at_ascii_space_only() -> None:
    assert split_words(" A\tB  C\u00a0D\u3000E ") == ["A", "B", "C\u00a0D\u3000E"]
    assert split_characters(" AB  C ") == ["A", "B", "<space>", "C"]
    assert split_characters("") == []
