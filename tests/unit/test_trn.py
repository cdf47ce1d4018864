"""The escaping of words for sclite: safe, reversible, without collisions."""

from __future__ import annotations

import re
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from speechtx.scoring.trn import TokenTable, id_table, speaker_table, write_trn

WORDS = st.text(alphabet=st.characters(exclude_categories=("Cs",)), min_size=1, max_size=30)


@given(words=st.lists(WORDS, max_size=20))
def test_every_word_has_one_safe_token_and_comes_back(words: list[str]) -> None:
    table = TokenTable()
    tokens = [table.token(word) for word in words]
    assert [table.word(token) for token in tokens] == words
    assert len(set(tokens)) == len(set(words))
    assert all(re.fullmatch(r"[A-Za-z0-9'%]+", token) for token in tokens)


def test_words_that_look_like_tokens_do_not_collide_with_them() -> None:
    table = TokenTable()
    words = ["(", "%28", "%2528", "%L3", "x" * 300, "y" * 300, "(" * 100, "é", "e\u0301", "<space>", "A", "a"]
    assert len({table.token(word) for word in words}) == len(words)


def test_plain_english_stays_readable() -> None:
    assert [TokenTable().token(word) for word in ("IT'S", "ok", "42")] == ["IT'S", "ok", "42"]
    assert id_table().token("an251-fash-b.1_2") == "an251-fash-b.1_2"
    assert speaker_table().token("spk-1_a") == "spk%2D1%5Fa"


def test_an_empty_line_keeps_its_id(tmp_path: Path) -> None:
    write_trn(tmp_path / "x.trn", {"all-u1": ["a", "b"], "all-u2": []})
    assert (tmp_path / "x.trn").read_text() == "a b (all-u1)\n (all-u2)\n"
