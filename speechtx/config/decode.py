"""The schema of `conf/decode.yaml`: one way from the model's output to text, and the weights of what scores it."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from speechtx.config.section import Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section

Method = Literal["beam", "ctc_beam", "attention_rescoring", "ctc_greedy", "mask_ctc"]

# What adds to scores or forbids tokens, and the methods that do it. Asked of another method it is an error, never ignored. The
# other keys (beam, ctc_weight, max_len_ratio, mask_*) say how wide a search is and how it weighs; a method passes over those it
# has no use for, so that the file of one method serves another with `--set method=...`.
_DONE_BY: dict[str, tuple[Method, ...]] = {
    "nbest": ("beam", "ctc_beam", "attention_rescoring"),
    "lm_weight": ("beam", "ctc_beam", "attention_rescoring"),
    "ngram_weight": ("beam", "ctc_beam", "attention_rescoring"),
    "phone_weight": ("beam", "ctc_beam", "attention_rescoring"),
    "length_bonus": ("beam", "ctc_beam", "attention_rescoring"),
    "hot_words": ("beam", "ctc_beam", "attention_rescoring"),
    "length_normalization": ("beam",),
    "min_len_ratio": ("beam",),
    "coverage_weight": ("beam",),
    "max_repeats": ("beam",),
    "end_detection": ("beam",),
}


class DecodeConfig(Section):
    """The whole of `conf/decode.yaml`.

    A hypothesis of the beam search scores (1 - ctc_weight) * attention + ctc_weight * CTC + lm_weight * language model
    + ngram_weight * n-gram + length_bonus * tokens + hot words + coverage, all natural logarithms; at the end
    + phone_weight * phones, of which hypotheses outside of the lexicon have none: they come last.
    """

    # beam: joint CTC/attention, label by label; ctc_beam: CTC prefix beam search, frame by frame; attention_rescoring: the n best
    # of ctc_beam, scored again by the decoder; ctc_greedy: best label of every frame; mask_ctc: non-autoregressive
    method: Method = "beam"
    beam: Positive = 10
    nbest: Positive = 1
    ctc_weight: Fraction = 0.3  # 1.0: CTC prefix scores only; 0.0: attention only
    lm_weight: NonNegativeFloat = 0.0  # of the Transformer language model (--lm)
    ngram_weight: NonNegativeFloat = 0.0  # of the n-gram language model (--ngram)
    phone_weight: NonNegativeFloat = 0.0  # of the phones that lower layers hear (intermediate_ctc.lexicon); ranks the beam anew
    length_bonus: float = 0.0  # added per token
    length_normalization: Fraction = 0.0  # finished hypotheses are ranked by score / (tokens + 1) ** this; 1.0: mean per token
    min_len_ratio: NonNegativeFloat = 0.0  # no end of sentence before this many tokens per encoder frame
    max_len_ratio: PositiveFloat = 1.0  # hypotheses hold at most this many tokens per encoder frame
    # exact: until no live hypothesis can win; recent: until three lengths in a row are far below the best (Watanabe et al. 2017)
    end_detection: Literal["exact", "recent"] = "exact"
    coverage_weight: NonNegativeFloat = 0.0  # per encoder frame that the decoder attended to (Chorowski & Jaitly 2017)
    coverage_threshold: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 0.5  # summed attention from which a frame counts
    max_repeats: NonNegative = 0  # times that any run of tokens may stand in a row; 0: no limit
    hot_words: Annotated[tuple[str, ...], Field(strict=False)] = ()  # words and phrases to prefer
    hot_word_bonus: NonNegativeFloat = 1.0  # per token of a hot word
    mask_threshold: Fraction = 0.99  # tokens that CTC is less sure of are masked and predicted anew
    mask_iterations: Positive = 10
    frames_per_batch: Positive = 8000

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.nbest > self.beam:
            raise ValueError(f"nbest {self.nbest} exceeds beam {self.beam}; raise beam, or ask for fewer hypotheses")
        if self.min_len_ratio > self.max_len_ratio:
            raise ValueError(f"min_len_ratio {self.min_len_ratio} exceeds max_len_ratio {self.max_len_ratio}")
        if self.coverage_weight and self.ctc_weight == 1.0:
            raise ValueError("coverage_weight counts frames that the decoder attended to; ctc_weight 1.0 leaves the decoder out")
        if self.method == "attention_rescoring" and self.ctc_weight == 1.0:
            raise ValueError("attention_rescoring with ctc_weight 1.0 leaves the decoder out; use method ctc_beam")
        for key, methods in _DONE_BY.items():
            if getattr(self, key) != type(self).model_fields[key].default and self.method not in methods:
                raise ValueError(f"method {self.method} has no {key}, which is for method {' and '.join(methods)}")
        return self
