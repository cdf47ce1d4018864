"""The list of words that may come out of a search, each spelled with the tokenizer's tokens: `lexicon.txt`.

One word a line with its tokens behind it, as in Kaldi's lexicons (`SEVEN  ▁SE VEN`). A word has one spelling, the
tokenizer's: a model is trained on that one, so that another would only add a second, less likely way to write the same
word, and take a place of its own in the beam. Words are spelled one by one, which gives what the tokenizer makes of them
in a sentence, because no token reaches over a space: a word's first token begins with U+2581, and no other does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from speechtx.config.atomic import replacing
from speechtx.config.errors import DataError
from speechtx.text.arpa import BOS, EOS
from speechtx.text.normalize import split_words
from speechtx.text.tokenizer import BLANK, SOS_EOS, UNK, Tokenizer

Lexicon = dict[str, tuple[int, ...]]  # word -> token ids

_SPECIAL = {BLANK, UNK, SOS_EOS, BOS, EOS}


def spell(words: Iterable[str], tokenizer: Tokenizer) -> tuple[Lexicon, list[str]]:
    """The words that the tokenizer can spell, in C order, and those that need <unk>, or are names of special tokens."""
    lexicon, impossible = {}, []
    for word in sorted(set(words), key=str.encode):
        ids = tuple(tokenizer.encode(word))
        if word in _SPECIAL or tokenizer.unk_id in ids:
            impossible.append(word)
        else:
            lexicon[word] = ids
    return lexicon, impossible


def write_lexicon(lexicon: Lexicon, tokenizer: Tokenizer, path: str | Path) -> None:
    """Writes the file whole or not at all."""
    with replacing(path) as stream:
        for word, ids in lexicon.items():
            stream.write(" ".join([word, *(tokenizer.pieces[i] for i in ids)]) + "\n")


def lexicon_lines(path: Path) -> Iterator[tuple[int, str, list[str]]]:
    """Line number, word and what stands behind it, of every line that is not empty.

    Raises:
        DataError: no such file, or not UTF-8.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except UnicodeDecodeError as err:
        raise DataError(f"{path}: not UTF-8 at byte {err.start + 1}") from None
    for number, line in enumerate(text.split("\n"), start=1):
        fields = split_words(line)
        if fields:
            yield number, fields[0], fields[1:]


def read_lexicon(path: str | Path, tokenizer: Tokenizer) -> Lexicon:
    """Reads a lexicon; lines may have been removed or added by hand.

    Raises:
        DataError: no such file, not UTF-8, no word in it, a word that stands twice, that the tokenizer cannot spell, or that is
            spelled otherwise than the tokenizer does; file and line are named.
    """
    path = Path(path)
    lexicon: Lexicon = {}
    lines: dict[str, int] = {}
    for number, word, pieces in lexicon_lines(path):
        if word in lines:
            raise DataError(f"{path}:{number}: {word!r} stands already in line {lines[word]}")
        lines[word] = number
        spelled, impossible = spell([word], tokenizer)
        if impossible:
            raise DataError(f"{path}:{number}: {word!r} cannot be written with the tokenizer's tokens; remove the line")
        own = [tokenizer.pieces[i] for i in spelled[word]]
        if pieces != own:
            raise DataError(
                f"{path}:{number}: {word!r} is spelled {' '.join(pieces) or 'with no token'}, "
                f"but the tokenizer spells it {' '.join(own)}, and that is what models are trained on"
            )
        lexicon |= spelled
    if not lexicon:
        raise DataError(f"{path}: no word in it")
    return lexicon
