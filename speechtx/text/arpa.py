"""ARPA files of n-gram language models: a strict reader, which names the line of whatever is wrong, and a writer.

The format is that of SRILM (ngram-format(5)) and KenLM: a section `\\data\\` with the number of n-grams of each order, then for
each order a section of lines `log10-probability TAB words [TAB log10-back-off]`, then `\\end\\`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from speechtx.config.atomic import replacing
from speechtx.config.errors import DataError

BOS, EOS, UNK = "<s>", "</s>", "<unk>"
NEVER = -99.0  # log10 of the probability of what is never predicted, as SRILM and others write it for <s>
KENLM_MAGIC = b"mmap lm http://kheafield.com/code"  # how its binary files begin
_SPACES = re.compile(r"[ \t]+")  # not str.split(): U+00A0 and U+3000 may be tokens
_COUNT = re.compile(r"ngram +(\d+) *= *(\d+)")


@dataclass(frozen=True)
class Arpa:
    """An n-gram model as tables; words are numbered by the order of the unigrams.

    Attributes:
        words: the vocabulary, with <s> and </s>.
        ngrams: for n = 1, 2, ... the word numbers (count, n) int64, oldest word first; every n-gram once.
        log_prob: for every n, log10 P(last word | the others) (count,) float64.
        log_backoff: for every n below the order, log10 of the back-off weight (count,) float64.
    """

    words: list[str]
    ngrams: list[np.ndarray]
    log_prob: list[np.ndarray]
    log_backoff: list[np.ndarray]

    @property
    def order(self) -> int:
        return len(self.ngrams)

    @property
    def counts(self) -> list[int]:
        return [len(rows) for rows in self.ngrams]


def write_arpa(arpa: Arpa, path: str | Path) -> None:
    """Writes the file whole or not at all."""
    with replacing(path) as stream:
        stream.write("\\data\\\n")
        stream.writelines(f"ngram {n}={count}\n" for n, count in enumerate(arpa.counts, start=1))
        for n, (rows, log_prob) in enumerate(zip(arpa.ngrams, arpa.log_prob, strict=True), start=1):
            stream.write(f"\n\\{n}-grams:\n")
            texts = (" ".join([arpa.words[i] for i in row]) for row in rows.tolist())
            if n == arpa.order:
                stream.writelines(f"{p:.7g}\t{text}\n" for p, text in zip(log_prob.tolist(), texts, strict=True))
            else:
                columns = zip(log_prob.tolist(), texts, arpa.log_backoff[n - 1].tolist(), strict=True)
                stream.writelines(f"{p:.7g}\t{text}\t{backoff:.7g}\n" for p, text, backoff in columns)
        stream.write("\n\\end\\\n")


def read_arpa(path: str | Path, *, vocabulary: Iterable[str] | None = None) -> Arpa:
    """Reads an ARPA file and believes nothing.

    Args:
        path: the file.
        vocabulary: the words it may have besides <s>, </s> and <unk>; None: any.

    Raises:
        DataError: the file is not UTF-8, a section is missing or out of order, a count is wrong, a number is no logarithm of a
            probability, an n-gram stands twice, has a word that is no unigram or not in the vocabulary, or lacks its context
            as an n-gram one shorter; file and line are named.
    """
    return _Reader(path=Path(path), vocabulary=None if vocabulary is None else {*vocabulary, BOS, EOS, UNK}).read()


class _Reader:
    """One pass over the lines of one file."""

    def __init__(self, *, path: Path, vocabulary: set[str] | None) -> None:
        self.path = path
        self.vocabulary = vocabulary
        self.number = 0  # of the current line
        self.index: dict[str, int] = {}  # unigram -> word number
        self.lines = self._lines()

    def fail(self, problem: str) -> DataError:
        return DataError(f"{self.path}:{self.number}: {problem}")

    def read(self) -> Arpa:
        sizes = self._header()
        ngrams, log_prob, log_backoff = [], [], []
        seen: dict[tuple[int, ...], int] = {}
        line = self._next(r"\1-grams:")
        for n, size in enumerate(sizes, start=1):
            if line != f"\\{n}-grams:":
                raise self.fail(f"expected \\{n}-grams:, found {line[:60]!r}")
            seen, probs, backoffs, line = self._section(n, size, last=n == len(sizes), shorter=seen)
            ngrams.append(np.array(list(seen), dtype=np.int64).reshape(size, n))
            log_prob.append(np.array(probs))
            if n < len(sizes):
                log_backoff.append(np.array(backoffs))
            if n == 1:
                self._check_unigrams()
        if line != "\\end\\":
            raise self.fail(f"expected \\end\\, found {line[:60]!r}")
        for line in self.lines:
            raise self.fail(f"text after \\end\\: {line[:60]!r}")
        return Arpa(list(self.index), ngrams, log_prob, log_backoff)

    def _lines(self) -> Iterator[str]:
        """The lines that are not empty, without white space at their ends."""
        try:
            stream = self.path.open("rb")
        except FileNotFoundError:
            raise DataError(f"{self.path}: no such file") from None
        with stream:
            for self.number, raw in enumerate(stream, start=1):
                if self.number == 1 and raw.startswith(KENLM_MAGIC):
                    raise self.fail("a binary file of KenLM; give the ARPA file that it was made from")
                try:
                    line = raw.decode("utf-8")
                except UnicodeDecodeError as err:
                    raise self.fail(f"not UTF-8: byte 0x{raw[err.start]:02x} at column {err.start + 1}") from None
                if line := line.strip(" \t\r\n"):
                    yield line

    def _next(self, wanted: str) -> str:
        line = next(self.lines, None)
        if line is None:
            raise self.fail(f"the file ends, but {wanted} was still to come")
        return line

    def _header(self) -> list[int]:
        for line in self.lines:  # the format allows any text before it
            if line == "\\data\\":
                break
        else:
            raise self.fail("no line \\data\\ in the file: not an ARPA file")
        sizes: list[int] = []
        for line in self.lines:
            if (match := _COUNT.fullmatch(line)) is None:
                if not sizes:
                    raise self.fail(f"expected `ngram 1=COUNT` after \\data\\, found {line[:60]!r}")
                self.lines = _chain(line, self.lines)
                break
            if int(match[1]) != len(sizes) + 1:
                raise self.fail(f"expected the count of {len(sizes) + 1}-grams, found {line!r}")
            sizes.append(int(match[2]))
        if not sizes:
            raise self.fail("the file ends after \\data\\")
        return sizes

    def _section(
        self, n: int, size: int, *, last: bool, shorter: dict[tuple[int, ...], int]
    ) -> tuple[dict[tuple[int, ...], int], list[float], list[float], str]:
        """The n-grams (with their line numbers), two columns of numbers and the line behind the section."""
        seen: dict[tuple[int, ...], int] = {}
        probs: list[float] = []
        backoffs: list[float] = []
        wanted = "\\end\\" if last else f"\\{n + 1}-grams:"
        while not (line := self._next(wanted)).startswith("\\"):
            fields = _SPACES.split(line)
            if not n + 1 <= len(fields) <= n + 1 + (not last):
                optional = "" if last else ", and at most a back-off weight"
                raise self.fail(f"expected a log-probability and {n} word(s){optional}, found {len(fields)} fields")
            words = self._words(fields[1 : n + 1], n)
            if words in seen:
                raise self.fail(f"{' '.join(fields[1 : n + 1])!r} stands already in line {seen[words]}")
            if n > 1 and words[:-1] not in shorter:
                raise self.fail(
                    f"{' '.join(fields[1 : n + 1])!r} lacks its context {' '.join(fields[1:n])!r} among the {n - 1}-grams"
                )
            seen[words] = self.number
            probs.append(self._log_prob(fields[0]))
            backoffs.append(self._log_backoff(fields[n + 1]) if len(fields) == n + 2 else 0.0)
        if len(seen) != size:
            raise self.fail(f"the section of {n}-grams ends after {len(seen)} of them, but the header counts {size}")
        return seen, probs, backoffs, line

    def _words(self, words: Sequence[str], n: int) -> tuple[int, ...]:
        if n == 1:
            word = words[0]
            if self.vocabulary is not None and word not in self.vocabulary:
                raise self.fail(f"{word!r} is no token of the tokenizer; the model was made for another one, or over words")
            return (self.index.setdefault(word, len(self.index)),)
        for position, word in enumerate(words):
            if word not in self.index:
                raise self.fail(f"{word!r} is no unigram of this file")
            if (word == BOS and position > 0) or (word == EOS and position < n - 1):
                raise self.fail(f"{word} inside the n-gram {' '.join(words)!r}")
        return tuple(self.index[word] for word in words)

    def _log_prob(self, text: str) -> float:
        value = self._number(text, "log-probability")
        if not value <= 0.0:
            raise self.fail(f"log-probability {text} is not the logarithm of a probability")
        return max(value, NEVER)  # -inf, as some tools write it

    def _log_backoff(self, text: str) -> float:
        value = self._number(text, "back-off weight")
        if not math.isfinite(value):
            raise self.fail(f"back-off weight {text} is not finite")
        return value

    def _number(self, text: str, what: str) -> float:
        try:
            return float(text)
        except ValueError:
            raise self.fail(f"{what} {text!r} is not a number") from None

    def _check_unigrams(self) -> None:
        for word in (BOS, EOS):
            if word not in self.index:
                raise self.fail(f"the unigrams lack {word}: this model knows no beginning and end of sentences")


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest
