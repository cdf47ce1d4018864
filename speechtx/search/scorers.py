"""What scores tokens beside the model itself: language models and hot words, all with the one interface of a `LanguageModel`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from speechtx.config.decode import DecodeConfig
from speechtx.config.errors import ConfigError
from speechtx.experiment.language_model import load_language_model
from speechtx.model.language_model import LanguageModel
from speechtx.search.hot_words import HotWords, encode_hot_words
from speechtx.search.phones import Pronouncer
from speechtx.text.tokenizer import Tokenizer


class Weighted(NamedTuple):
    """A scorer that takes part in a search.

    Attributes:
        name: the field of `Hypothesis` that its sum goes to: lm, ngram or hot_words.
        weight: of its sum in the score, above 0.
        scorer: asked once a step for all live hypotheses.
    """

    name: str
    weight: float
    scorer: LanguageModel


@dataclass(frozen=True)
class Scorers:
    """What scores tokens beside the model; see `load_scorers`.

    Attributes:
        lm: a language model, weighed by `lm_weight`.
        ngram: another, weighed by `ngram_weight`.
        hot_words: bonuses instead of log-probabilities, with their weight in them.
        pronounce: what `phone_weight` needs.
    """

    lm: LanguageModel | None = None
    ngram: LanguageModel | None = None
    hot_words: LanguageModel | None = None
    pronounce: Pronouncer | None = None

    def weighted(self, config: DecodeConfig, *, vocab_size: int) -> tuple[Weighted, ...]:
        """Those that the configuration gives a weight; one of weight 0 is never asked.

        Args:
            config: the weights.
            vocab_size: V of the acoustic model.

        Raises:
            ConfigError: a weight without its scorer, or a scorer of another vocabulary.
        """
        wanted = {"lm": config.lm_weight, "ngram": config.ngram_weight, "hot_words": 1.0 if config.hot_words else 0.0}
        found = []
        for name, weight in wanted.items():
            if weight == 0.0:
                continue
            scorer: LanguageModel | None = getattr(self, name)
            if scorer is None:
                raise ConfigError(_missing(name, config))
            if scorer.vocab_size != vocab_size:
                raise ConfigError(
                    f"{name}: made for {scorer.vocab_size} tokens, but the model has {vocab_size}; give one of its own tokenizer"
                )
            found.append(Weighted(name, weight, scorer))
        return tuple(found)


NO_SCORERS = Scorers()


def load_scorers(
    config: DecodeConfig, *, tokenizer: Tokenizer, lm: Path | None = None, ngram: Path | None = None, device: str | torch.device
) -> Scorers:
    """Opens what the configuration gives a weight; what has weight 0 is not even read.

    Args:
        config: weights and hot words.
        tokenizer: of the acoustic model.
        lm: a language model's directory or ARPA file, see `load_language_model`.
        ngram: the same.
        device: where the search runs.

    Raises:
        ConfigError: a weight above 0 without its model; a hot word that the tokenizer cannot spell.
        ExperimentError: no language model there, or one that was made with another tokenizer.
        DataError: a wrong ARPA file.
    """
    found: dict[str, LanguageModel] = {}
    for name, path, weight in (("lm", lm, config.lm_weight), ("ngram", ngram, config.ngram_weight)):
        if weight == 0.0:
            continue
        if path is None:
            raise ConfigError(_missing(name, config))
        found[name] = load_language_model(path, tokens=tokenizer.pieces, device=device)
    if config.hot_words:
        phrases = encode_hot_words(config.hot_words, tokenizer)
        found["hot_words"] = HotWords(phrases, bonus=config.hot_word_bonus, vocab_size=tokenizer.vocab_size).to(device)
    return Scorers(lm=found.get("lm"), ngram=found.get("ngram"), hot_words=found.get("hot_words"))


def _missing(name: str, config: DecodeConfig) -> str:
    if name == "hot_words":
        return "hot_words are configured, but the search was given no scorer for them; make it with `load_scorers`"
    weight = getattr(config, f"{name}_weight")
    return (
        f"{name}_weight {weight} needs a language model: give its directory with --{name} (in Python {name}=), "
        f"or set {name}_weight: 0.0"
    )
