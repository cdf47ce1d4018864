"""What a search returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """One finished hypothesis of one utterance with the parts of its score.

    Beam search: score = (1 - ctc_weight) * att + ctc_weight * ctc + lm_weight * lm + ngram_weight * ngram + hot_words
    + coverage_weight * coverage + phone_weight * phones + length_bonus, all over (tokens + 1) ** length_normalization. CTC
    greedy: score = ctc, the log-probability of the best path (a lower bound of the text's). A part that the search did not use
    is None.

    Attributes:
        tokens: token ids without blank and without start and end of sentence.
        score: what hypotheses are ranked by, natural logarithm.
        ctc: log P_ctc(tokens | audio).
        att: log P_att(tokens, end | audio).
        length_bonus: the configured bonus times the number of tokens.
        lm: log P_lm(tokens, end).
        ngram: the same of the n-gram language model.
        hot_words: sum of the bonuses for hot words.
        coverage: encoder frames that the decoder attended to.
        phones: log P_ctc(phones of the words | audio) of lower layers.
        text: the tokens as text; empty until `with_text` fills it in.
    """

    tokens: tuple[int, ...]
    score: float
    ctc: float | None = None
    att: float | None = None
    length_bonus: float = 0.0
    lm: float | None = None
    ngram: float | None = None
    hot_words: float | None = None
    coverage: float | None = None
    phones: float | None = None
    text: str = ""

    def with_text(self, decode: Callable[[list[int]], str]) -> Hypothesis:
        """The same hypothesis with its text, through a tokenizer's `decode`."""
        return replace(self, text=decode(list(self.tokens)))

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary, ready for one JSON line."""
        fields = asdict(self)
        return {"text": fields.pop("text"), "tokens": list(fields.pop("tokens")), **fields}

    @staticmethod
    def from_json(fields: dict[str, Any]) -> Hypothesis:
        """The inverse of `to_json`."""
        tokens: Sequence[int] = fields["tokens"]
        return Hypothesis(**{**fields, "tokens": tuple(tokens)})
