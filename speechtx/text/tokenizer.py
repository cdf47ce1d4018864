"""From words to token ids and back, through a sentencepiece model.

Ids: 0 `<blank>` (CTC), 1 `<unk>`, then the sentencepiece pieces in their order, last `<sos/eos>`. A sentencepiece id is
ours minus one. The model does not normalise text (see text/normalize.py), and the same text gives the same bytes.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sentencepiece

from speechtx.config.atomic import replacing, write_text
from speechtx.config.errors import ConfigError, DataError, ExperimentError
from speechtx.config.schema import TokenizerConfig
from speechtx.text.normalize import split_words, squeeze_spaces

BLANK = "<blank>"
UNK = "<unk>"
SOS_EOS = "<sos/eos>"
MODEL_FILE = "bpe.model"
TOKENS_FILE = "tokens.txt"
LOG_FILE = "sentencepiece.log"

# Characters sentencepiece gives a meaning of its own: the word boundary, its internal unknown, and the end of a C string.
_RESERVED = re.compile("[\u2581\u2585\x00]")
_NOT_UTF8 = re.compile("[\ud800-\udfff]")


class Tokenizer:
    """A trained tokenizer; make one with `Tokenizer.load` or `train_tokenizer`."""

    blank_id = 0
    unk_id = 1

    def __init__(self, *, model_proto: bytes, source: str = "<bytes>") -> None:
        """Wraps a serialised sentencepiece model. `source` is the name that errors show.

        Raises:
            ExperimentError: the bytes are not a sentencepiece model, or one that numbers its pieces otherwise.
        """
        try:
            self._sp = sentencepiece.SentencePieceProcessor(model_proto=model_proto)
        except RuntimeError:
            raise ExperimentError(f"{source}: not a sentencepiece model (damaged, or another kind of file)") from None
        specials = (self._sp.unk_id(), self._sp.bos_id(), self._sp.eos_id(), self._sp.pad_id())
        if specials != (0, -1, -1, -1):
            raise ExperimentError(
                f"{source}: unk, bos, eos, pad ids are {specials}, expected (0, -1, -1, -1): "
                "the model was not made by `speechtx tokenizer`; train it with that"
            )
        self.model_proto = model_proto
        pieces = [self._sp.id_to_piece(i) for i in range(1, self._sp.get_piece_size())]
        self.pieces: list[str] = [BLANK, UNK, *pieces, SOS_EOS]
        self.vocab_size = len(self.pieces)
        self.sos_eos_id = self.vocab_size - 1

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer:
        """Opens a tokenizer directory and checks that its two files belong together. Runs nothing that lies in it.

        Raises:
            ExperimentError: a file is missing or damaged, or `tokens.txt` disagrees with `bpe.model`.
        """
        directory = Path(directory)
        model_path, tokens_path = directory / MODEL_FILE, directory / TOKENS_FILE
        for path in (model_path, tokens_path):
            if not path.is_file():
                raise ExperimentError(f"{path}: no such file; make the tokenizer with `speechtx tokenizer` (stage 3)")
        tokenizer = cls(model_proto=model_path.read_bytes(), source=str(model_path))
        found = tokens_path.read_bytes().decode("utf-8", "replace").splitlines()
        wanted = tokenizer.tokens_text().splitlines()
        if len(found) != len(wanted):
            raise ExperimentError(f"{tokens_path}: {len(found)} tokens, but {model_path} makes {len(wanted)}")
        for number, (line, expected) in enumerate(zip(found, wanted, strict=True), start=1):
            if line != expected:
                raise ExperimentError(f"{tokens_path}:{number}: {line!r}, but {model_path} has {expected!r}")
        return tokenizer

    def save(self, directory: str | Path) -> None:
        """Writes `bpe.model` and `tokens.txt` (one `piece id` a line, a Kaldi symbol table) into the directory."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        with replacing(directory / MODEL_FILE, "wb") as stream:
            stream.write(self.model_proto)
        write_text(directory / TOKENS_FILE, self.tokens_text())

    def tokens_text(self) -> str:
        """What `tokens.txt` holds."""
        return "".join(f"{piece} {i}\n" for i, piece in enumerate(self.pieces))

    def encode(self, text: str) -> list[int]:
        """Token ids of a transcript, without `<sos/eos>`; what the training text did not contain becomes `<unk>`.

        Raises:
            DataError: the text has a character that sentencepiece gives a meaning of its own.
        """
        _check_characters(text)
        return [i + 1 for i in self._sp.encode(squeeze_spaces(text))]

    def encode_pieces(self, text: str) -> list[str]:
        """The same tokens as text; an unknown stretch is shown as it is written. TER counts these."""
        _check_characters(text)
        return list(self._sp.encode(squeeze_spaces(text), out_type=str))

    def decode(self, ids: Sequence[int]) -> str:
        """The transcript that token ids spell. `<blank>` and `<sos/eos>` spell nothing, `<unk>` spells `<unk>`.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"token id {i} is outside the vocabulary of {self.vocab_size}")
        return squeeze_spaces(self._sp.decode([int(i) - 1 for i in ids if i not in (self.blank_id, self.sos_eos_id)]))


def train_tokenizer(texts: Iterable[str], *, config: TokenizerConfig, out_dir: Path) -> Tokenizer:
    """Trains a sentencepiece model on transcripts and writes it to `out_dir`.

    Args:
        texts: the training transcripts, without utterance ids.
        config: kind, size and user symbols.
        out_dir: gets `bpe.model`, `tokens.txt` and sentencepiece's own talk in `sentencepiece.log`.

    Raises:
        ConfigError: the vocabulary is too large or too small for the text, or a user symbol cannot be one.
        DataError: no text at all, or a character that sentencepiece gives a meaning of its own.
    """
    _check_user_symbols(config.user_symbols)
    lines = [squeeze_spaces(text) for text in texts]
    for line in lines:
        _check_characters(line)
    lines = [line for line in lines if line]
    if not lines:
        raise DataError("the tokenizer's training text is empty")
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    with _stderr_to(out_dir / LOG_FILE):
        model_proto = _train_sentencepiece(lines, config)
    tokenizer = Tokenizer(model_proto=model_proto)
    tokenizer.save(out_dir)
    return tokenizer


def _train_sentencepiece(lines: list[str], config: TokenizerConfig) -> bytes:
    model = io.BytesIO()
    # For characters the size follows from the text, so every one of them is taken.
    size: dict[str, Any] = {"use_all_vocab": True} if config.type == "char" else {"vocab_size": config.vocab_size}
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type=config.type,
            character_coverage=config.character_coverage,
            byte_fallback=config.byte_fallback,
            user_defined_symbols=list(config.user_symbols),
            hard_vocab_limit=True,
            normalization_rule_name="identity",
            unk_surface=UNK,  # its default, " ⁇ ", would split a word in three
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            num_threads=1,  # with the order kept, the same text gives the same bytes
            shuffle_input_sentence=False,
            max_sentence_length=1 << 30,  # its default drops long lines without a word
            **size,
        )
    except RuntimeError as err:
        raise _explain(str(err), config) from None
    return model.getvalue()


@contextlib.contextmanager
def _stderr_to(path: Path) -> Iterator[None]:
    """Sends what C++ writes to file descriptor 2 into a file (sys.stderr may be something that has no descriptor)."""
    saved = os.dup(2)
    try:
        with path.open("wb") as log:
            os.dup2(log.fileno(), 2)
            yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def _explain(message: str, config: TokenizerConfig) -> ConfigError:
    """Turns sentencepiece's complaint about the vocabulary size into one that says what to write instead."""
    what = f"tokenizer.vocab_size {config.vocab_size} (type {config.type})"
    if too_high := re.search(r"set it to a value <= (\d+)", message):
        return ConfigError(
            f"{what} is more than the training text has to offer; the largest possible is {too_high[1]}: "
            f"use --set tokenizer.vocab_size={too_high[1]} or less"
        )
    if too_low := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return ConfigError(
            f"{what} cannot hold every character of the training text; the smallest possible is {too_low[1]}"
            + (" (byte_fallback alone takes 256)" if config.byte_fallback else "")
            + ", or lower tokenizer.character_coverage and accept <unk>"
        )
    return ConfigError(f"sentencepiece cannot train this tokenizer ({what}): {message}")


def _check_user_symbols(symbols: Sequence[str]) -> None:
    for symbol in symbols:
        problem = ""
        if not symbol or split_words(symbol) != [symbol]:
            problem = "must be one word without white space"
        elif symbol in (BLANK, UNK, SOS_EOS, "<s>", "</s>", "<pad>"):
            problem = "has a meaning already"
        elif _RESERVED.search(symbol):
            problem = "has a character that sentencepiece reserves"
        elif symbols.count(symbol) > 1:
            problem = "is listed twice"
        if problem:
            raise ConfigError(f"tokenizer.user_symbols: {symbol!r} {problem}")


def _check_characters(text: str) -> None:
    if bad := _RESERVED.search(text):
        raise DataError(f"character U+{ord(bad[0]):04X} is reserved by sentencepiece; remove it from transcript {text[:80]!r}")
    if bad := _NOT_UTF8.search(text):
        raise DataError(f"surrogate U+{ord(bad[0]):04X} is not text; the transcript was not read as UTF-8: {text[:80]!r}")


# ---------------------------------------------------------------------------------------------------- unknown tokens


@dataclass
class UnknownReport:
    """What of some transcripts the tokenizer does not know."""

    utterances: int = 0
    words: int = 0
    tokens: int = 0
    unknown_tokens: int = 0
    unknown_words: int = 0
    unknown_utterances: list[str] = field(default_factory=list)
    unknown_pieces: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        rate = self.tokens / self.words if self.words else 0.0
        line = f"{self.utterances} utterances, {self.words} words, {self.tokens} tokens ({rate:.2f} a word), "
        line += f"{self.unknown_tokens} <unk>"
        if not self.unknown_tokens:
            return line
        pieces = ", ".join(f"{piece!r} x{count}" for piece, count in self.unknown_pieces.most_common(10))
        utterances = " ".join(self.unknown_utterances[:5])
        more = len(self.unknown_utterances) - 5
        return (
            f"{line} in {self.unknown_words} words of {len(self.unknown_utterances)} utterances: {pieces}"
            f" (first: {utterances}{f' and {more} more' if more > 0 else ''})"
        )


def report_unknown(tokenizer: Tokenizer, transcripts: dict[str, str]) -> UnknownReport:
    """Counts `<unk>` in transcripts keyed by utterance id: no model can ever write the words they stand in."""
    report = UnknownReport()
    for utterance, text in transcripts.items():
        words = split_words(text)
        ids, pieces = tokenizer.encode(text), tokenizer.encode_pieces(text)
        unknown = [piece.lstrip("\u2581") for i, piece in zip(ids, pieces, strict=True) if i == tokenizer.unk_id]
        report.utterances += 1
        report.words += len(words)
        report.tokens += len(ids)
        if unknown:
            report.unknown_tokens += len(unknown)
            report.unknown_pieces.update(unknown)
            report.unknown_words += sum(tokenizer.unk_id in tokenizer.encode(word) for word in words)
            report.unknown_utterances.append(utterance)
    return report
