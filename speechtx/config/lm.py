"""The schema of `conf/lm.yaml`: the language models that a recipe estimates and trains on text alone."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from speechtx.config.schema import OptimizerConfig, ScheduleConfig
from speechtx.config.section import NonNegative, Positive, PositiveFloat, Probability, Section

# Where sentences come from: data directories, whose `text` is read, and files with one sentence a line and no ids.
# None given: the transcripts of the training set.
Texts = Annotated[tuple[str, ...], Field(strict=False)]


class NgramConfig(Section):
    """An n-gram over the recipe's tokens, interpolated modified Kneser-Ney (Chen & Goodman 1998)."""

    order: Annotated[int, Field(ge=2, le=10)] = 3  # KenLM reads none below 2
    text: Texts = ()


class LexiconConfig(Section):
    """Whole words: an n-gram over a closed list of words, which are spelled with the recipe's tokens. No other word comes out."""

    order: Annotated[int, Field(ge=0, le=10)] = 2  # of words, modified Kneser-Ney; 0: every word equally likely, always
    text: Texts = ()  # its words are the list
    words: Annotated[tuple[str, ...], Field(strict=False)] = ()  # files with further words, separated by white space


class TransformerLmConfig(Section):
    """A causal Transformer (pre-norm) over the recipe's tokens."""

    layers: Positive = 2
    dim: Positive = 128
    heads: Positive = 4
    ff_dim: Positive = 512
    dropout: Probability = 0.2
    text: Texts = ()
    seed: NonNegative = 1
    epochs: Positive = 20
    patience: NonNegative = 5  # training stops after so many epochs without a better dev perplexity; 0: never early
    tokens_per_batch: Positive = 4000  # tokens including padding, of one optimiser step
    max_tokens: Positive = 1000  # longer sentences are left out and counted
    grad_clip: PositiveFloat = 1.0  # global L2 norm
    max_nonfinite_steps: NonNegative = 10  # steps skipped for NaN/Inf before training stops with an error
    checkpoint_minutes: PositiveFloat = 5.0  # a resumable checkpoint at least this often, and at every epoch's end
    optimizer: OptimizerConfig = OptimizerConfig(lr=2e-3, weight_decay=1e-2)
    schedule: ScheduleConfig = ScheduleConfig(warmup_steps=100)

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not divisible by heads {self.heads}")
        if self.dim % 2:
            raise ValueError(f"dim {self.dim} must be even for sinusoidal positions")
        if self.tokens_per_batch <= self.max_tokens:
            raise ValueError(
                f"tokens_per_batch {self.tokens_per_batch} cannot hold a sentence of max_tokens {self.max_tokens} and its end"
            )
        return self


class LmConfig(Section):
    """The whole of `conf/lm.yaml`; a section that is absent makes no such model."""

    ngram: NgramConfig | None = None
    lexicon: LexiconConfig | None = None
    transformer: TransformerLmConfig | None = None
