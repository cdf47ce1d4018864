"""ARPA files: what is written is read back, and whatever is wrong in a file is named by its line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from speechtx.config.errors import DataError
from speechtx.text.arpa import read_arpa, write_arpa

GOOD = """\
made by hand

\\data\\
ngram 1=4
ngram 2=3

\\1-grams:
-99\t<s>\t-0.5
-0.6\t<unk>
-0.7\tA\t-0.25
-0.4\t</s>

\\2-grams:
-0.3\t<s> A
-0.2\tA A
-0.9 A  </s>

\\end\\
"""


def written(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_file_by_hand_is_read_as_it_stands(tmp_path: Path) -> None:
    arpa = read_arpa(written(tmp_path / "a.arpa", GOOD), vocabulary=["A"])
    assert arpa.words == ["<s>", "<unk>", "A", "</s>"]
    assert arpa.counts == [4, 3] and arpa.order == 2
    assert arpa.ngrams[1].tolist() == [[0, 2], [2, 2], [2, 3]]
    assert arpa.log_prob[1].tolist() == [-0.3, -0.2, -0.9]
    assert arpa.log_backoff[0].tolist() == [-0.5, 0.0, -0.25, 0.0]


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    arpa = read_arpa(written(tmp_path / "a.arpa", GOOD))
    write_arpa(arpa, tmp_path / "b.arpa")
    again = read_arpa(tmp_path / "b.arpa")
    assert again.words == arpa.words
    for name in ("ngrams", "log_prob", "log_backoff"):
        assert all(np.array_equal(a, b) for a, b in zip(getattr(again, name), getattr(arpa, name), strict=True))


def test_tokens_with_white_space_that_is_not_ascii_stay_whole(tmp_path: Path) -> None:
    arpa = read_arpa(written(tmp_path / "a.arpa", GOOD.replace("A", "\u3000\u00a0\u2028")))
    assert "\u3000\u00a0\u2028" in arpa.words


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("\\data\\", "data", r":18: no line \\data\\ in the file"),
        ("ngram 1=4\nngram 2=3\n", "", r":5: expected `ngram 1=COUNT` after \\data\\, found '\\\\1-grams:'"),
        ("ngram 2=3", "ngram 3=3", r":5: expected the count of 2-grams, found 'ngram 3=3'"),
        ("ngram 1=4", "ngram 1=5", r":13: the section of 1-grams ends after 4 of them, but the header counts 5"),
        ("ngram 2=3", "ngram 2=2", r":18: the section of 2-grams ends after 3 of them, but the header counts 2"),
        ("\\2-grams:", "\\3-grams:", r":13: expected \\2-grams:, found '\\\\3-grams:'"),
        ("\\end\\", "", r":18: the file ends, but \\end\\ was still to come"),
        ("\\end\\\n", "\\end\\\nmore\n", r":19: text after \\end\\: 'more'"),
        ("-0.7\tA", "nan\tA", r":10: log-probability nan is not the logarithm of a probability"),
        ("-0.7\tA", "0.7\tA", r":10: log-probability 0.7 is not the logarithm of a probability"),
        ("-0.7\tA", "-O.7\tA", r":10: log-probability '-O.7' is not a number"),
        ("\t-0.25", "\tinf", r":10: back-off weight inf is not finite"),
        ("-0.2\tA A", "-0.2\tA A\t-0.1", r":15: expected a log-probability and 2 word\(s\), found 4 fields"),
        ("-0.2\tA A", "-0.2\tA", r":15: expected a log-probability and 2 word\(s\), found 2 fields"),
        ("-0.2\tA A", "-0.2\tA B", r":15: 'B' is no unigram of this file"),
        ("-0.2\tA A", "-0.2\t<s> A", r":15: '<s> A' stands already in line 14"),
        ("-0.2\tA A", "-0.2\tA <s>", r":15: <s> inside the n-gram 'A <s>'"),
        ("-0.2\tA A", "-0.2\t</s> A", r":15: </s> inside the n-gram '</s> A'"),
        ("-0.4\t</s>", "-0.4\tB", r":11: 'B' is no token of the tokenizer"),
    ],
)
def test_whatever_is_wrong_is_named_with_its_line(tmp_path: Path, old: str, new: str, problem: str) -> None:
    assert GOOD.count(old) == 1
    with pytest.raises(DataError, match=r"bad\.arpa" + problem):
        read_arpa(written(tmp_path / "bad.arpa", GOOD.replace(old, new)), vocabulary=["A"])


def test_a_model_without_ends_of_sentences_is_refused(tmp_path: Path) -> None:
    text = GOOD.replace("-0.4\t</s>\n", "").replace("-0.9 A  </s>\n", "").replace("1=4", "1=3").replace("2=3", "2=2")
    with pytest.raises(DataError, match="the unigrams lack </s>"):
        read_arpa(written(tmp_path / "a.arpa", text))


def test_an_ngram_without_its_context_is_refused(tmp_path: Path) -> None:
    text = GOOD.replace("ngram 2=3\n", "ngram 2=3\nngram 3=1\n").replace("\\end\\", "\\3-grams:\n-0.1\t<unk> A A\n\n\\end\\")
    with pytest.raises(DataError, match=r":20: '<unk> A A' lacks its context '<unk> A' among the 2-grams"):
        read_arpa(written(tmp_path / "a.arpa", text))


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.arpa:10: not UTF-8: byte 0xff at column 6"):
        read_arpa(written(tmp_path / "a.arpa", GOOD.encode().replace(b"-0.7\tA", b"-0.7\t\xff")))


def test_other_kinds_of_files_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a binary file of KenLM; give the ARPA file"):
        read_arpa(written(tmp_path / "a.bin", b"mmap lm http://kheafield.com/code format version 5\n\0\xff"))
    with pytest.raises(DataError, match="not an ARPA file"):
        read_arpa(written(tmp_path / "empty.arpa", ""))
    with pytest.raises(DataError, match="no such file"):
        read_arpa(tmp_path / "none.arpa")
