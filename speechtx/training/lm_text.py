"""The sentences that a language model is made of, and is measured on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from speechtx.config.errors import ConfigError, DataError
from speechtx.data.kaldi_table import read_table
from speechtx.text.normalize import split_words
from speechtx.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class LmText:
    """Sentences as token ids.

    Attributes:
        name: where they come from, for messages.
        sentences: token ids without <sos/eos>; none is empty.
        word_counts: words of each sentence.
    """

    name: str
    sentences: list[list[int]]
    word_counts: list[int]

    @property
    def words(self) -> int:
        """Of all sentences."""
        return sum(self.word_counts)

    @property
    def unknown(self) -> int:
        """Tokens that are <unk>."""
        return sum(ids.count(Tokenizer.unk_id) for ids in self.sentences)

    @property
    def tokens(self) -> int:
        """Of all sentences, without their ends."""
        return sum(len(sentence) for sentence in self.sentences)

    def only(self, keep: Sequence[bool], *, name: str) -> LmText:
        """The sentences that `keep` is true for, under another name."""
        chosen = [i for i, kept in enumerate(keep) if kept]
        return LmText(name, [self.sentences[i] for i in chosen], [self.word_counts[i] for i in chosen])

    def __str__(self) -> str:
        unknown = f" ({self.unknown} of them <unk>)" if self.unknown else ""
        return f"{self.name}: {len(self.sentences):,} sentences, {self.words:,} words, {self.tokens:,} tokens{unknown}"


def read_text(sources: Sequence[str | Path], tokenizer: Tokenizer) -> LmText:
    """Reads and encodes sentences; empty ones are left out.

    Args:
        sources: data directories, whose `text` is read, and files with one sentence a line and no ids.
        tokenizer: of the recipe.

    Raises:
        ConfigError: a source does not exist, or is a data directory's table, whose ids would be taken for words.
        DataError: not UTF-8, a reserved character, or no sentence at all; file and line are named where there are any.
    """
    sentences: list[list[int]] = []
    word_counts: list[int] = []
    for source in map(Path, sources):
        for where, line in _lines(source):
            try:
                ids = tokenizer.encode(line)
            except DataError as err:
                raise DataError(f"{where}: {err}") from None
            if ids:
                sentences.append(ids)
                word_counts.append(len(split_words(line)))
    name = " ".join(map(str, sources))
    if not sentences:
        raise DataError(f"{name}: no sentence in it")
    return LmText(name, sentences, word_counts)


def read_words(sources: Sequence[str | Path]) -> list[list[str]]:
    """The same sentences as words, without a tokenizer.

    Raises:
        ConfigError, DataError: as `read_text`.
    """
    return [words for source in map(Path, sources) for _, line in _lines(source) if (words := split_words(line))]


def _lines(source: Path) -> Iterator[tuple[str, str]]:
    """(where it stands, sentence)."""
    if source.is_dir():
        for key, text in read_table(source / "text").items():
            yield f"{source}/text: {key}", text
        return
    if not source.is_file():
        raise ConfigError(f"{source}: no such file or data directory")
    if (source.parent / "utt2spk").is_file():
        raise ConfigError(
            f"{source}: a data directory's table, whose utterance ids are no words; name the directory {source.parent}"
        )
    with source.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                yield f"{source}:{number}", line.decode("utf-8")
            except UnicodeDecodeError:
                raise DataError(f"{source}:{number}: not UTF-8") from None
