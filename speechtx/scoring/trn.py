"""Transcripts in sclite's trn format, written so that sclite sees opaque tokens only.

sclite gives a meaning to parentheses, braces, `@`, `*`, `;;`, slashes and more, and folds or splits some non-ASCII text.
Every word with anything but ASCII letters, digits and the apostrophe in it is therefore percent-encoded (its UTF-8
bytes), on both sides alike. Different words stay different and each token leads back to its word.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from pathlib import Path

_WORD_SAFE = frozenset(string.ascii_letters + string.digits + "'")
_ID_SAFE = frozenset(string.ascii_letters + string.digits + "-_.")
_SPEAKER_SAFE = frozenset(string.ascii_letters + string.digits + ".")

# sclite overruns a buffer on words of some thousand bytes and loops for ever on a word longer than its line (1000).
_LONGEST_TOKEN = 200


class TokenTable:
    """The two-way table between words (or ids) and the tokens that stand for them in a trn file.

    A token is the word itself where that is safe, else its percent-encoding, else (for a very long word) `%L` and a
    number. `L` is no hexadecimal digit and `%` is never safe, so no two words share a token.
    """

    def __init__(self, *, safe: frozenset[str] = _WORD_SAFE) -> None:
        self._safe = safe
        self._tokens: dict[str, str] = {}
        self._words: dict[str, str] = {}

    def token(self, word: str) -> str:
        """The token of a word; the same word always gets the same one."""
        if word not in self._tokens:
            token = "".join(c if c in self._safe else "".join(f"%{b:02X}" for b in c.encode()) for c in word)
            if len(token) > _LONGEST_TOKEN:
                token = f"%L{len(self._tokens)}"
            self._tokens[word] = token
            self._words[token] = word
        return self._tokens[word]

    def word(self, token: str) -> str:
        """The word that a token of this table stands for; KeyError for any other token."""
        return self._words[token]


def id_table() -> TokenTable:
    """A table for utterance ids."""
    return TokenTable(safe=_ID_SAFE)


def trn_id(speaker: str, utterance: str) -> str:
    """What stands in the parentheses: `speaker-utterance`, both as tokens; sclite splits at the first `-` or `_`."""
    return f"{speaker}-{utterance}"


def speaker_table() -> TokenTable:
    """A table for speaker ids; a `-` or `_` in one would end it for sclite."""
    return TokenTable(safe=_SPEAKER_SAFE)


def write_trn(path: Path, lines: Mapping[str, Sequence[str]]) -> None:
    """Writes one `token token ... (id)` line an utterance, in the order of `lines`; an empty one is ` (id)`."""
    with path.open("w", encoding="ascii", newline="\n") as file:
        for identity, tokens in lines.items():
            file.write(f"{' '.join(tokens)} ({identity})\n")
