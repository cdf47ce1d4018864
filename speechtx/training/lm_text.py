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
        words: of all sentences.
        unknown: tokens that are <unk>.
    """

    name: str
    sentences: list[list[int]]
    words: int
    unknown: int

    @property
    def tokens(self) -> int:
        """Of all sentences, without their ends."""
        return sum(len(sentence) for sentence in self.sentences)

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
    words = 0
    for source in map(Path, sources):
        for where, line in _lines(source):
            try:
                ids = tokenizer.encode(line)
            except DataError as err:
                raise DataError(f"{where}: {err}") from None
            if ids:
                sentences.append(ids)
                words += len(split_words(line))
    name = " ".join(map(str, sources))
    if not sentences:
        raise DataError(f"{name}: no sentence in it")
    return LmText(name, sentences, words, sum(ids.count(tokenizer.unk_id) for ids in sentences))


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
