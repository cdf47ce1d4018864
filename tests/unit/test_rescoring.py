"""Attention rescoring against the beam search's own scores, one by one, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from test_beam import CROSS, encode, sharp_model

from speechtx.config.decode import DecodeConfig
from speechtx.config.errors import ConfigError
from speechtx.search import rescoring
from speechtx.search.beam import beam_search
from speechtx.search.ctc_beam import ctc_beam_search
from speechtx.search.decode import decode_encoded
from speechtx.search.hot_words import HotWords
from speechtx.search.rescoring import rescore
from speechtx.search.scorers import Scorers

CONFIG = DecodeConfig(method="attention_rescoring", beam=5, nbest=5, ctc_weight=0.4, length_bonus=0.2)


def nbests(model, enc_out, enc_lens, config=CONFIG, scorers=None):
    ids = {"blank_id": model.blank_id, "sos_eos_id": model.sos_eos_id}
    return ctc_beam_search(model.ctc_log_probs(enc_out), enc_lens, config, scorers or Scorers(), **ids)


@pytest.mark.parametrize("cross", [None, *CROSS])
def test_hypotheses_get_the_score_that_the_decoder_gives_them_one_by_one(cross):
    model = sharp_model(3, cross)
    enc_out, enc_lens = encode(model, [40, 9, 31])
    found = decode_encoded(model, enc_out, enc_lens, CONFIG)
    before = nbests(model, enc_out, enc_lens)
    for row, length in enumerate(enc_lens.tolist()):
        assert {h.tokens for h in found[row]} == {h.tokens for h in before[row]}
        for hypothesis in found[row]:
            tokens = torch.tensor([[model.sos_eos_id, *hypothesis.tokens]])
            own = enc_out[row : row + 1, :length]
            with torch.no_grad():
                ctc = model.ctc_log_probs(own) if model.decoder.needs_ctc else None
                logits = model.decoder(tokens, torch.tensor([tokens.shape[1]]), own, torch.tensor([length]), ctc_log_probs=ctc)
            log_probs = logits[0].double().log_softmax(dim=1)
            att = sum(float(log_probs[i, t]) for i, t in enumerate([*hypothesis.tokens, model.sos_eos_id]))
            assert hypothesis.att == pytest.approx(att, abs=1e-4)
            score = 0.6 * att + 0.4 * hypothesis.ctc + 0.2 * len(hypothesis.tokens)
            assert hypothesis.score == pytest.approx(score, abs=1e-4)
        assert [h.score for h in found[row]] == sorted((h.score for h in found[row]), reverse=True)


def test_few_hypotheses_at_a_time_score_as_all_at_once(monkeypatch):
    model = sharp_model(4)
    enc_out, enc_lens = encode(model, [40, 23, 31])
    whole = decode_encoded(model, enc_out, enc_lens, CONFIG)
    monkeypatch.setattr(rescoring, "_MAX_CELLS", 1)
    for a, b in zip(whole, decode_encoded(model, enc_out, enc_lens, CONFIG), strict=True):
        assert [h.tokens for h in a] == [h.tokens for h in b]
        assert [h.score for h in a] == pytest.approx([h.score for h in b], abs=1e-5)


def test_the_best_of_a_whole_beam_is_what_the_joint_search_ranks_first():
    """Where both look at every text, they must agree."""
    model = sharp_model(1)
    enc_out, enc_lens = encode(model, [12, 9])  # two frames and one
    found = decode_encoded(model, enc_out, enc_lens, CONFIG.model_copy(update={"beam": 60, "nbest": 1}))
    joint = beam_search(model, enc_out, enc_lens, CONFIG.model_copy(update={"method": "beam", "beam": 60, "nbest": 1}))
    for (a,), (b,) in zip(found, joint, strict=True):
        assert a.tokens == b.tokens
        assert a.score == pytest.approx(b.score, abs=1e-4) and a.att == pytest.approx(b.att, abs=1e-4)


def test_bonuses_of_the_first_pass_stay_in_the_score():
    model = sharp_model(2)
    enc_out, enc_lens = encode(model, [40])
    config = CONFIG.model_copy(update={"hot_words": ("tokens",)})
    scorers = Scorers(hot_words=HotWords([[2], [3]], bonus=1.5, vocab_size=model.sos_eos_id + 1))
    (found,) = decode_encoded(model, enc_out, enc_lens, config, scorers)
    assert any(h.hot_words for h in found)
    for h in found:
        assert h.hot_words == pytest.approx(1.5 * sum(t in (2, 3) for t in h.tokens))
        assert h.score == pytest.approx(0.6 * h.att + 0.4 * h.ctc + h.hot_words + 0.2 * len(h.tokens), abs=1e-5)


def test_what_is_not_finite_is_left_out_and_the_other_utterances_are_not():
    model = sharp_model(0)
    enc_out, enc_lens = encode(model, [40, 23])
    before = nbests(model, enc_out, enc_lens)
    whole = rescore(model, enc_out, enc_lens, before, CONFIG)
    enc_out = enc_out.clone()
    enc_out[0] = math.nan
    found = rescore(model, enc_out, enc_lens, before, CONFIG)
    assert found[0] == [] and [h.tokens for h in found[1]] == [h.tokens for h in whole[1]]
    assert rescore(model, enc_out, enc_lens, [[], before[1]], CONFIG)[0] == []
    assert rescore(model, enc_out, enc_lens, [[], []], CONFIG) == [[], []]


def test_without_a_decoder_ctc_beam_works_and_rescoring_is_refused():
    model = sharp_model(0)
    model.decoder = None
    enc_out, enc_lens = encode(model, [40, 23])
    assert all(decode_encoded(model, enc_out, enc_lens, DecodeConfig(method="ctc_beam")))
    with pytest.raises(ConfigError, match="attention_rescoring needs a decoder"):
        decode_encoded(model, enc_out, enc_lens, CONFIG)
    with pytest.raises(ConfigError, match="attention_rescoring needs a decoder"):
        rescore(model, enc_out, enc_lens, [[], []], CONFIG)
