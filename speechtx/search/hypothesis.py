"""What a search returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """One finished hypothesis of one utterance with the parts of its score.

    Beam search: score = (1 - ctc_weight) * att + ctc_weight * ctc + length_bonus. CTC greedy: score = ctc, the log-probability of
    the best path (a lower bound of the text's).

    Attributes:
        tokens: token ids without blank and without start and end of sentence.
        score: what hypotheses are ranked by, natural logarithm.
        ctc: log P_ctc(tokens | audio); None where the search did not use CTC.
        att: log P_att(tokens, end | audio); None where the search did not use the decoder.
        length_bonus: the configured bonus times the number of tokens.
        text: the tokens as text; empty until `with_text` fills it in.
    """

    tokens: tuple[int, ...]
    score: float
    ctc: float | None = None
    att: float | None = None
    length_bonus: float = 0.0
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
