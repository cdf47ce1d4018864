"""What a transcript is made of. The one definition of "word" and "character" that training and scoring share.

A transcript is scored as it is written: nothing here folds case, composes Unicode or drops punctuation, because a scorer
that quietly repairs text reports the error rate of another text. The only thing undone is the spacing: words are what
stands between ASCII white space, as in Kaldi, so that U+00A0 and U+3000 are characters of a word.
"""

from __future__ import annotations

import re

SPACE_SYMBOL = "<space>"
_ASCII_SPACE = re.compile(r"[ \t\n\v\f\r]+")


def split_words(text: str) -> list[str]:
    """The words of a transcript, in order; an empty transcript has none."""
    return [word for word in _ASCII_SPACE.split(text) if word]


def split_characters(text: str) -> list[str]:
    """The characters of a transcript for the character error rate.

    A character is a Unicode code point. The space between two words is one character too, written `<space>`: joining or
    splitting words is an error that a reader sees, and ESPnet's character error rates count it the same way.
    """
    characters: list[str] = []
    for word in split_words(text):
        if characters:
            characters.append(SPACE_SYMBOL)
        characters.extend(word)
    return characters


def squeeze_spaces(text: str) -> str:
    """The transcript with one plain space between words and none at either end."""
    return " ".join(split_words(text))
