"""Utterances that nobody said: runs of words cut out of a speaker's recordings and joined anew in every epoch.

After the aligned data augmentation of Lam, Ohta, Schamoni and Riezler (Interspeech 2021), which replaces words of an utterance. A
small corpus has few sequences of words, and a model learns them by heart: joined, words are the same but their company is new.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from speechtx.config.errors import DataError
from speechtx.config.schema import JoinConfig
from speechtx.data.kaldi_table import read_segments, read_table
from speechtx.data.loader import Corpus, rows_of
from speechtx.data.manifest import Utterance
from speechtx.text.normalize import split_words, squeeze_spaces

JOIN = 7  # number of the random stream, beside those in speechtx.data.loader
MORE_WORDS = (0, 0, 1, 2)  # than the utterance has whose length a joined one takes as a pattern


@dataclass(frozen=True)
class Piece:
    """A run of words: frames `start` to `end` of the utterance at place `source` of the corpus."""

    source: int
    start: int
    end: int
    text: str


def read_pieces(directory: str | Path, utterances: Sequence[Utterance], frame_shift_ms: float) -> list[Piece]:
    """Reads what `speechtx align` found in these utterances; what it found in others is not theirs.

    Raises:
        DataError: a table is missing or malformed, a run ends behind its utterance or is not in its transcript, or no run is in
            any of these utterances.
    """
    directory = Path(directory)
    if not (directory / "segments").is_file():
        raise DataError(
            f"{directory}: no words to join (training.join.words); make them with `speechtx align --out {directory}`, or give "
            "the recipe a conf/align.yaml, from which stage train makes them"
        )
    places = {utterance.id: place for place, utterance in enumerate(utterances)}
    text = read_table(directory / "text")
    pieces = []
    for key, segment in read_segments(directory / "segments").items():
        if segment.recording not in places:
            continue
        place = places[segment.recording]
        frames = utterances[place].num_frames
        start = round(segment.start * 1000 / frame_shift_ms)
        end = frames if segment.end is None else round(segment.end * 1000 / frame_shift_ms)
        what = "no words in text" if key not in text else f"frames {start} to {end} of {frames}"
        fits = 0 <= start < end <= frames and key in text
        if fits and f" {text[key]} " not in f" {squeeze_spaces(utterances[place].text)} ":
            fits, what = False, f"{text[key]!r} is not in its transcript {utterances[place].text!r}"
        if not fits:
            raise DataError(f"{directory / 'segments'}: {key}: {what}; run `speechtx align` again on the training set")
        pieces.append(Piece(place, start, end, text[key]))
    if not pieces:
        raise DataError(f"{directory / 'segments'}: nothing was cut out of the training set's utterances; align that set")
    return pieces


class JoinedCorpus(Corpus):
    """A corpus with as many joined utterances behind the recorded ones as the configuration says, others in every epoch.

    A joined utterance reads the whole of each recording that it takes words from: cheap for a small corpus, which it is for.

    Args:
        pieces: of the recorded utterances.
        join: how many utterances to join, and how long.
        encode: tokens of a text.
        encode_phones: phones of a text, if the model predicts them.
        span: the fewest and the most frames of an utterance at another tempo, from its frames, tokens and phones.
        max_frames: of a joined utterance.
        corpus: what `Corpus` takes.

    Raises:
        DataError: no speaker has two pieces.
    """

    def __init__(
        self,
        *,
        pieces: Sequence[Piece],
        join: JoinConfig,
        encode: Callable[[str], list[int]],
        encode_phones: Callable[[str], list[int]] | None,
        span: Callable[[int, Sequence[int], Sequence[int]], tuple[int, int]],
        max_frames: int,
        **corpus: Any,
    ) -> None:
        super().__init__(**corpus)
        self.join, self.encode, self.encode_phones, self.span, self.max_frames = join, encode, encode_phones, span, max_frames
        self.recorded = list(self.utterances), list(self.tokens), list(self.phones), list(self.spans)
        self.by_speaker: dict[str, list[Piece]] = {}
        for piece in pieces:
            if piece.end - piece.start <= max_frames:
                self.by_speaker.setdefault(self.utterances[piece.source].speaker, []).append(piece)
        self.patterns = [u for u in self.utterances if len(self.by_speaker.get(u.speaker, ())) > 1]
        if not self.patterns:
            raise DataError("training.join: no speaker has two runs of words that could be joined; align the training set")
        self.joined: list[list[Piece]] = []
        self._draw()

    @property
    def num_recorded(self) -> int:
        return len(self.recorded[0])

    def rows(self) -> list[tuple]:
        """See `Corpus.rows`: what was recorded, and its pieces."""
        utterances, tokens, phones, _ = self.recorded
        pieces = [(p.source, p.start, p.end, p.text) for choice in self.by_speaker.values() for p in choice]
        return rows_of(utterances, tokens, phones) + pieces

    def at_epoch(self, epoch: int) -> Corpus:
        """This corpus with the joined utterances and masks of the given epoch."""
        if epoch != self.epoch:
            self.epoch = epoch
            self._draw()
        return self

    def read(self, index: int) -> np.ndarray:
        """The features of a recorded or joined utterance, (T, F), as they are stored."""
        if index < self.num_recorded:
            return super().read(index)
        return np.concatenate([super(JoinedCorpus, self).read(p.source)[p.start : p.end] for p in self._pieces(index)])

    def _pieces(self, index: int) -> list[Piece]:
        return self.joined[index - self.num_recorded]

    def _draw(self) -> None:
        """Joins anew: one utterance after the other, each by a random stream of its own."""
        utterances, tokens, phones, spans = self.recorded[0][:], self.recorded[1][:], self.recorded[2][:], self.recorded[3][:]
        self.joined = []
        for index in range(self.num_recorded, self.num_recorded + round(self.join.ratio * self.num_recorded)):
            speaker, pieces = self._choose(self._generator(index, JOIN))
            text = " ".join(piece.text for piece in pieces)
            frames = sum(piece.end - piece.start for piece in pieces)
            self.joined.append(pieces)
            utterances.append(Utterance(f"{speaker}-join{index}", "", frames, text, speaker))
            tokens.append(self.encode(text))
            if self.encode_phones is not None:
                phones.append(self.encode_phones(text))
            spans.append(self.span(frames, tokens[-1], phones[-1] if phones else ()))
        self.utterances, self.tokens, self.phones, self.spans = utterances, tokens, phones, spans

    def _choose(self, rng: np.random.Generator) -> tuple[str, list[Piece]]:
        """A speaker, and pieces of as many words as an utterance of that speaker has, or a few more."""
        pattern = self.patterns[int(rng.integers(len(self.patterns)))]
        wanted = min(len(split_words(pattern.text)) + int(rng.choice(MORE_WORDS)), self.join.max_words)
        choice = self.by_speaker[pattern.speaker]
        chosen: list[Piece] = []
        words = frames = 0
        while words < wanted:
            piece = choice[int(rng.integers(len(choice)))]
            more = len(split_words(piece.text))
            too_many = words + more > self.join.max_words or frames + piece.end - piece.start > self.max_frames
            if chosen and too_many:
                break
            chosen.append(piece)
            words += more
            frames += piece.end - piece.start
        return pattern.speaker, chosen
