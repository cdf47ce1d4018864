"""From a batch of features to hypotheses: encoder, then the configured search."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from speechtx.config.decode import DecodeConfig
from speechtx.config.errors import ConfigError
from speechtx.model.recognizer import Recognizer
from speechtx.search.beam import beam_search, check_weights
from speechtx.search.ctc_beam import ctc_beam_search
from speechtx.search.greedy import ctc_greedy
from speechtx.search.hypothesis import Hypothesis
from speechtx.search.mask_ctc import mask_ctc
from speechtx.search.phones import add_phone_scores
from speechtx.search.rescoring import rescore
from speechtx.search.scorers import NO_SCORERS, Scorers

_WIDER = (4, 16)  # times the configured beam


def decode_batch(
    model: Recognizer, feats: Tensor, feat_lens: Tensor, config: DecodeConfig, scorers: Scorers = NO_SCORERS
) -> list[list[Hypothesis]]:
    """Recognises a batch of normalised features.

    Args:
        model: in evaluation mode.
        feats: (B, T, F) on the model's device.
        feat_lens: (B,) frames, each enough for at least one subsampled frame.
        config: `conf/decode.yaml`.
        scorers: what has a weight there, see `load_scorers`.

    Returns:
        For every utterance its n best without text, best first (greedy: one); none for the reasons of `why_nothing`.

    Raises:
        ConfigError: the model has no decoder, and the search needs one; a weight without its scorer.
    """
    with torch.inference_mode():
        phones: list[Tensor] | None = [] if config.phone_weight else None
        enc_out, enc_lens = model.encode(feats, feat_lens, phones=phones)
        return decode_encoded(model, enc_out, enc_lens, config, scorers, phones=phones or ())


def decode_encoded(
    model: Recognizer,
    enc_out: Tensor,
    enc_lens: Tensor,
    config: DecodeConfig,
    scorers: Scorers = NO_SCORERS,
    *,
    phones: Sequence[Tensor] = (),
) -> list[list[Hypothesis]]:
    """The search alone, from the encoder's output (B, S, D), lengths (B,) and, for `phone_weight`, phones; see `decode_batch`.

    A language model that forbids tokens, such as a lexicon inside a word, may leave a narrow beam without any hypothesis
    that can end. Those utterances are searched again with a beam four, then sixteen times as wide.
    """
    check_method(model, config)
    check_weights(model, config)
    if config.phone_weight:
        if scorers.pronounce is None or not phones:
            raise ConfigError("phone_weight needs the phones that the encoder hears, and their lexicon; see `System.load`")
        wide = config.model_copy(update={"phone_weight": 0.0, "nbest": config.beam})
        nbests = decode_encoded(model, enc_out, enc_lens, wide, scorers)
        return add_phone_scores(nbests, phones, enc_lens, scorers.pronounce, config)
    with torch.inference_mode():
        nbests = _search(model, enc_out, enc_lens, config, scorers)
        for factor in _WIDER if _may_forbid_ends(config) else ():
            again = [i for i, nbest in enumerate(nbests) if not nbest and enc_out[i, : enc_lens[i]].isfinite().all()]
            if again:
                wider = config.model_copy(update={"beam": factor * config.beam})
                for i, nbest in zip(again, _search(model, enc_out[again], enc_lens[again], wider, scorers), strict=True):
                    nbests[i] = nbest
        return nbests


def _search(
    model: Recognizer, enc_out: Tensor, enc_lens: Tensor, config: DecodeConfig, scorers: Scorers
) -> list[list[Hypothesis]]:
    if config.method == "beam":
        return beam_search(model, enc_out, enc_lens, config, scorers)
    if config.method == "mask_ctc":
        return mask_ctc(model, enc_out, enc_lens, config)
    log_probs = model.ctc_log_probs(enc_out)
    if config.method in ("ctc_beam", "attention_rescoring"):
        rescoring = config.method == "attention_rescoring"
        first = config.model_copy(update={"nbest": config.beam}) if rescoring else config
        ids = {"blank_id": model.blank_id, "sos_eos_id": model.sos_eos_id}
        nbests = ctc_beam_search(log_probs, enc_lens, first, scorers, **ids)
        return rescore(model, enc_out, enc_lens, nbests, config, ctc_log_probs=log_probs) if rescoring else nbests
    best = ctc_greedy(log_probs, enc_lens, blank_id=model.blank_id, sos_eos_id=model.sos_eos_id)
    return [[hypothesis] if math.isfinite(hypothesis.score) else [] for hypothesis in best]


def _may_forbid_ends(config: DecodeConfig) -> bool:
    return config.lm_weight > 0 or config.ngram_weight > 0


def why_nothing(config: DecodeConfig) -> str:
    """What to say of an utterance for which `decode_encoded` returned no hypothesis."""
    if not _may_forbid_ends(config):
        return "the model's output is not finite"
    widest = _WIDER[-1] * config.beam
    return f"the model's output is not finite, or the language model let none of {widest} hypotheses end; try a larger beam"


def check_method(model: Recognizer, config: DecodeConfig) -> None:
    """Refuses a search that this kind of decoder was not trained for, and phones of a model that predicts none.

    Raises:
        ConfigError: see `method_problem`.
    """
    if config.phone_weight and not model.predicts_phones:
        raise ConfigError(
            f"phone_weight {config.phone_weight} needs a model that predicts phones (model.intermediate_ctc.lexicon), which this "
            "one does not; set phone_weight: 0.0"
        )
    kind = "none" if model.decoder is None else "attention" if model.decoder.causal else "mask_ctc"
    if problem := method_problem(config.method, kind):
        raise ConfigError("; ".join(problem))


def method_problem(method: str, decoder: str) -> tuple[str, str] | None:
    """Why a decoder (its type, or "none") is of no use to a search, and what to do about it; None if it is, or is not asked."""
    if method == "mask_ctc" and decoder != "mask_ctc":
        found = "has none" if decoder == "none" else "has one of type attention"
        return (
            f"method mask_ctc needs a decoder of type mask_ctc, but this model {found}",
            "train one with --set model.decoder.type=mask_ctc, or decode with method beam or ctc_greedy",
        )
    if method == "attention_rescoring" and decoder == "none":
        return (
            "method attention_rescoring needs a decoder, but this model has none",
            "decode with CTC alone: method ctc_beam or ctc_greedy",
        )
    if method in ("beam", "attention_rescoring") and decoder == "mask_ctc":
        return (
            f"method {method} asks the decoder for the next token, but decoder.type mask_ctc only fills in hidden ones",
            "decode with method mask_ctc, or with CTC alone: ctc_greedy or ctc_beam",
        )
    return None
