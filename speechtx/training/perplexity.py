"""How well a language model predicts a text, per token and per word.

Each sentence's end is predicted like a token. The perplexity per word, exp(-log P / (words + sentences)) as in SRILM's `ppl`,
compares models over different tokens, as long as none of the text is <unk>.

To a model of whole words a sentence with a word that is not in its lexicon is impossible. Such sentences are left out and
their words counted, so that its perplexity compares with others on the same sentences only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from speechtx.config.atomic import write_text
from speechtx.config.errors import DataError
from speechtx.experiment.language_model import load_language_model
from speechtx.model.language_model import LanguageModel
from speechtx.model.lexicon import LexiconLM
from speechtx.training.lm_text import LmText

_SENTENCES_PER_BATCH = 256


@dataclass(frozen=True)
class Perplexity:
    """The counts of a text and its log-probability in nats.

    Attributes:
        outside_words: that are not in the lexicon of a model of whole words.
        outside_sentences: that hold such words; they are counted nowhere else.
    """

    text: str
    sentences: int
    words: int
    tokens: int
    unknown_tokens: int
    log_prob: float
    outside_words: int = 0
    outside_sentences: int = 0

    @property
    def per_token(self) -> float:
        return _exp(-self.log_prob / (self.tokens + self.sentences))

    @property
    def per_word(self) -> float:
        return _exp(-self.log_prob / (self.words + self.sentences))

    def write(self, path: Path) -> None:
        """A small JSON with everything."""
        values = {**asdict(self), "per_token": self.per_token, "per_word": self.per_word}
        write_text(path, json.dumps(values, indent=1, ensure_ascii=False) + "\n")

    def __str__(self) -> str:
        unknown = f", {self.unknown_tokens} <unk>" if self.unknown_tokens else ""
        outside = (
            f"; left out: {self.outside_sentences:,} sentences with {self.outside_words:,} words outside of the lexicon"
            if self.outside_words
            else ""
        )
        return (
            f"{self.text}: perplexity {self.per_token:.2f} a token, {self.per_word:.2f} a word "
            f"({self.sentences:,} sentences, {self.words:,} words, {self.tokens:,} tokens{unknown}{outside})"
        )


@torch.inference_mode()
def perplexity(model: LanguageModel, text: LmText, *, device: str | torch.device = "cpu") -> Perplexity:
    """Scores every sentence, a token a step, the way a search does.

    Raises:
        DataError: every sentence has a word that is not in the model's lexicon.
    """
    outside = [model.outside(ids) if isinstance(model, LexiconLM) else 0 for ids in text.sentences]
    text = text.only([count == 0 for count in outside], name=text.name)
    if not text.sentences:
        raise DataError(f"{text.name}: every sentence has a word that is not in the lexicon, {sum(outside):,} in all")
    end = model.vocab_size - 1
    sentences = sorted(text.sentences, key=len, reverse=True)  # those that end leave the batch from its end
    log_prob = 0.0
    for first in range(0, len(sentences), _SENTENCES_PER_BATCH):
        batch = sentences[first : first + _SENTENCES_PER_BATCH]
        lengths = torch.tensor([len(ids) for ids in batch])
        targets = torch.full((len(batch), int(lengths.max()) + 1), end)
        for row, ids in enumerate(batch):
            targets[row, : len(ids)] = torch.tensor(ids)
        targets = targets.to(device)
        state = model.start(len(batch))
        last = targets.new_full((len(batch),), end)
        for position in range(targets.shape[1]):
            alive = int((lengths >= position).sum())
            if alive < len(last):
                state, last = state.select(torch.arange(alive, device=device)), last[:alive]
            scores, state = model.step(last, state)
            last = targets[:alive, position]
            log_prob += float(scores.gather(1, last.unsqueeze(1)).double().sum())
    left_out = sum(outside), sum(map(bool, outside))
    return Perplexity(text.name, len(sentences), text.words, text.tokens, text.unknown, log_prob, *left_out)


def measure(
    out: Path, text: LmText, *, tokens: Sequence[str], say: Callable[[str], None], device: str | torch.device = "cpu"
) -> Perplexity:
    """What a language model's directory makes of a text, read from its files as a search will; said, and kept beside it."""
    result = perplexity(load_language_model(out, tokens=tokens, device=device), text, device=device)
    result.write(out / "perplexity.json")
    say(str(result))
    return result


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
