"""The search of long audio, which looks at a window of CTC's frames, against the search that looks at all of them."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_beam import assert_same, ctc_only, encode, sharp_model
from test_ctc_prefix import peaky

from speechtx.config.decode import DecodeConfig
from speechtx.model.recognizer import Recognizer
from speechtx.search import joint_scores
from speechtx.search.beam import beam_search
from speechtx.search.ctc_prefix import CtcPrefixScorer, PrefixState
from speechtx.search.hypothesis import Hypothesis
from speechtx.search.reference import reference_search

ALL_FRAMES = 10**9


class Watched(CtcPrefixScorer):
    """Notes how many frames are looked at, and how often that was not enough."""

    frames: list[int]
    restarts: int

    def score(self, state: PrefixState) -> tuple[torch.Tensor, torch.Tensor]:
        Watched.frames.append(state.forward.end - state.forward.first)
        return super().score(state)

    def restart(self, tokens: torch.Tensor, dead: torch.Tensor) -> PrefixState:
        Watched.restarts += 1
        return super().restart(tokens, dead)


def searched(
    model: Recognizer, enc_out: torch.Tensor, lens: torch.Tensor, config: DecodeConfig, **window: Any
) -> list[list[Hypothesis]]:
    """What `beam_search` finds with `short` and `depth` of the scorer as given."""
    Watched.frames, Watched.restarts = [], 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joint_scores, "CtcPrefixScorer", partial(Watched, **window))
        return beam_search(model, enc_out, lens, config)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    lengths=st.lists(st.integers(9, 120), min_size=1, max_size=3),
    depth=st.sampled_from([0.5, 15.0, 40.0, 100.0]),
    weight=st.sampled_from([0.1, 0.5, 1.0]),
    bonus=st.sampled_from([0.0, 0.8]),
)
def test_the_window_changes_neither_text_nor_score_however_narrow_it_starts(seed, lengths, depth, weight, bonus):
    model = sharp_model(seed % 3)
    enc_out, lens = encode(model, lengths, seed)
    config = DecodeConfig(beam=4, nbest=3, ctc_weight=weight, length_bonus=bonus, max_len_ratio=0.7)
    narrow = searched(model, enc_out, lens, config, short=0, depth=depth)
    for found, exact in zip(narrow, searched(model, enc_out, lens, config, short=ALL_FRAMES), strict=True):
        assert [h.tokens for h in found] == [h.tokens for h in exact]
        assert [h.score for h in found] == pytest.approx([h.score for h in exact], abs=1e-6)


def test_the_window_searches_like_the_plain_twin_and_starts_again_where_it_was_too_narrow():
    model = sharp_model(1)
    enc_out, lens = encode(model, [60, 23], 3)
    config = DecodeConfig(beam=3, nbest=2, ctc_weight=0.3, length_bonus=0.3, max_len_ratio=0.9)
    fast = searched(model, enc_out, lens, config, short=0, depth=22.0)
    assert Watched.restarts and min(Watched.frames) < int(lens.max())
    for row, length in enumerate(lens.tolist()):
        assert_same(fast[row], reference_search(model, enc_out[row, :length], config))


def test_audio_of_minutes_is_searched_in_windows_as_wide_as_those_of_audio_of_seconds():
    config = DecodeConfig(beam=5, nbest=2, ctc_weight=1.0)
    widths = {}
    for frames in (400, 1600):
        log_probs, labels = peaky(2, frames, 12)
        log_probs, lens = log_probs.unsqueeze(0), torch.tensor([frames])
        found = searched(ctc_only(log_probs), log_probs, lens, config)
        widths[frames] = sum(Watched.frames) / len(Watched.frames)
        assert not Watched.restarts and len(Watched.frames) >= len(found[0][0].tokens) > 0.8 * len(labels)
    exact = searched(ctc_only(log_probs), log_probs, lens, config, short=ALL_FRAMES)
    assert_same(found[0], exact[0])
    assert min(Watched.frames) == 1600
    assert widths[1600] < 1.5 * widths[400] < 450


def test_neighbours_of_another_length_or_without_numbers_do_not_change_the_result_of_long_audio():
    config = DecodeConfig(beam=4, nbest=2, ctc_weight=1.0)
    alone = [peaky(3, 700, 6)[0], peaky(4, 300, 6)[0], torch.full((500, 6), float("nan"), dtype=torch.float64)]
    log_probs = torch.zeros(3, 700, 6, dtype=torch.float64)
    for row, known in zip(log_probs, alone, strict=True):
        row[: len(known)] = known
    together = searched(ctc_only(log_probs), log_probs, torch.tensor([len(known) for known in alone]), config)
    assert min(Watched.frames) < 350 and together[2] == []
    for known, found in zip(alone[:2], together, strict=False):
        (exact,) = searched(
            ctc_only(known.unsqueeze(0)), known.unsqueeze(0), torch.tensor([len(known)]), config, short=ALL_FRAMES
        )
        assert_same(found, exact)
