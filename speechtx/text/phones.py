"""How words are pronounced: Kaldi's `lexicon.txt`, a word and its phones a line.

A word may stand there several times, the pronunciation that counts is the first: the usual one, as in most dictionaries.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from speechtx.config.errors import DataError
from speechtx.text.lexicon import lexicon_lines
from speechtx.text.normalize import split_words

_NUMBER = re.compile(r"[0-9]*\.[0-9]+|1")  # of Kaldi's lexiconp.txt


class Phones:
    """The phones of texts, numbered from 1 in C order; 0 is left for CTC's blank.

    Args:
        pronunciations: phones of each word.
        source: the name that errors show.
    """

    def __init__(self, pronunciations: Mapping[str, Sequence[str]], *, source: str = "the lexicon") -> None:
        self.source = source
        self.names = sorted({phone for phones in pronunciations.values() for phone in phones}, key=str.encode)
        number = {phone: i for i, phone in enumerate(self.names, start=1)}
        self._ids = {word: [number[phone] for phone in phones] for word, phones in pronunciations.items()}

    def __len__(self) -> int:
        """How many phones there are, without the blank."""
        return len(self.names)

    @classmethod
    def load(cls, path: str | Path) -> Phones:
        """Reads a lexicon in Kaldi's format.

        Raises:
            DataError: no such file, not UTF-8, no word in it, a word without phones, or probabilities; file and line are named.
        """
        path = Path(path)
        pronunciations: dict[str, list[str]] = {}
        for number, word, phones in lexicon_lines(path):
            if not phones:
                raise DataError(
                    f"{path}:{number}: {word} has no phones; a line is a word and its phones, as in `SEVEN S EH V AH N`"
                )
            if _NUMBER.fullmatch(phones[0]):
                raise DataError(
                    f"{path}:{number}: {phones[0]} is no phone; a lexicon without probabilities is wanted (lexicon.txt)"
                )
            pronunciations.setdefault(word, phones)
        if not pronunciations:
            raise DataError(f"{path}: holds no word")
        return cls(pronunciations, source=str(path))

    def require(self, texts: Mapping[str, str]) -> None:
        """Checks that every word of some transcripts, by utterance id, has a pronunciation.

        Raises:
            DataError: some have none; the first are named, each with an utterance.
        """
        missing: dict[str, str] = {}
        for key, text in texts.items():
            for word in split_words(text):
                if word not in self._ids:
                    missing.setdefault(word, key)
        if missing:
            shown = ", ".join(f"{word} (utterance {key})" for word, key in list(missing.items())[:5])
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise DataError(f"{self.source}: no pronunciation of {shown}{more}; add a line with its phones for each")

    def knows(self, text: str) -> bool:
        """Whether every word has a pronunciation."""
        return all(word in self._ids for word in split_words(text))

    def encode(self, text: str) -> list[int]:
        """The phones of a transcript, word after word; every word has a pronunciation (`require`)."""
        return [phone for word in split_words(text) for phone in self._ids[word]]
