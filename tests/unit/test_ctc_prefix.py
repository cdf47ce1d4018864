"""CTC prefix scores: against all paths written out, against the plain recursion, against torch's CTC loss."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechtx.search.ctc_prefix import CtcPrefixScorer
from speechtx.search.reference import ctc_log_prob


def posteriors(seed: int, *shape: int, sharpness: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(*shape, generator=generator, dtype=torch.float64)).log_softmax(-1)


def collapse(path: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(label for label, _ in itertools.groupby(path) if label != 0)


def by_enumeration(log_probs: torch.Tensor, labels: tuple[int, ...], *, prefix: bool) -> float:
    frames, vocab = log_probs.shape
    total = 0.0
    for path in itertools.product(range(vocab), repeat=frames):
        emitted = collapse(path)
        if (emitted[: len(labels)] if prefix else emitted) == labels:
            total += math.exp(sum(float(log_probs[t, label]) for t, label in enumerate(path)))
    return math.log(total) if total else -math.inf


def fast_scores(log_probs: torch.Tensor, labels: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """(V,) log psi of every extension of `labels`, and log P(labels), from the vectorised scorer, which keeps all frames."""
    lens = torch.tensor([len(log_probs)])
    scorer = CtcPrefixScorer(log_probs=log_probs.unsqueeze(0), enc_lens=lens, blank_id=0, beam=1, short=len(log_probs))
    state = scorer.start()
    for label in labels:
        state = scorer.extend(state, torch.tensor([0]), torch.tensor([label]))
    psi, end = scorer.score(state)
    return psi[0], end[0]


@pytest.mark.parametrize("labels", [(), (1,), (2,), (1, 1), (1, 2), (2, 2, 1), (1, 2, 1, 2), (1, 1, 1)])
def test_scores_equal_the_sum_over_all_paths(labels):
    log_probs = posteriors(1, 5, 3)
    psi, end = fast_scores(log_probs, labels)
    assert float(end) == pytest.approx(by_enumeration(log_probs, labels, prefix=False), abs=1e-9)
    assert ctc_log_prob(log_probs.numpy(), labels, blank_id=0, prefix=False) == pytest.approx(float(end), abs=1e-9)
    for label in (1, 2):
        exact = by_enumeration(log_probs, (*labels, label), prefix=True)
        assert float(psi[label]) == pytest.approx(exact, abs=1e-9)
        assert ctc_log_prob(log_probs.numpy(), (*labels, label), blank_id=0, prefix=True) == pytest.approx(exact, abs=1e-9)
    assert float(psi[0]) == -math.inf


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    frames=st.integers(1, 25),
    labels=st.lists(st.integers(1, 4), max_size=8).map(tuple),
    sharpness=st.sampled_from([0.1, 2.0, 20.0, 100.0]),
)
def test_vectorised_scores_equal_the_plain_recursion(seed, frames, labels, sharpness):
    log_probs = posteriors(seed, frames, 5, sharpness=sharpness)
    psi, end = fast_scores(log_probs, labels)
    plain = [ctc_log_prob(log_probs.numpy(), (*labels, c), blank_id=0, prefix=True) for c in range(1, 5)]
    plain_end = ctc_log_prob(log_probs.numpy(), labels, blank_id=0, prefix=False)
    for fast, slow in zip([*psi[1:].tolist(), float(end)], [*plain, plain_end], strict=True):
        # An impossible label sequence comes out as log 0 or as the floor that stands for it; both lose against anything possible.
        assert fast == pytest.approx(slow, abs=1e-6) or (slow == -math.inf and fast < -9e3)


def test_a_complete_hypothesis_scores_like_torch_ctc_loss():
    log_probs = posteriors(3, 40, 6)
    labels = (1, 1, 3, 5, 2, 2, 4)
    loss = torch.nn.functional.ctc_loss(log_probs.unsqueeze(1), torch.tensor([labels]), [40], [7], blank=0, reduction="sum")
    assert float(fast_scores(log_probs, labels)[1]) == pytest.approx(-float(loss), abs=1e-8)


def test_long_and_very_confident_audio_loses_no_precision():
    log_probs = posteriors(5, 400, 8, sharpness=30.0)
    labels = collapse(tuple(log_probs.argmax(-1).tolist()))[:60]
    psi, _ = fast_scores(log_probs, labels)
    for label in range(1, 8):
        assert float(psi[label]) == pytest.approx(
            ctc_log_prob(log_probs.numpy(), (*labels, label), blank_id=0, prefix=True), abs=1e-6
        )


def peaky(seed: int, frames: int, vocab: int) -> tuple[torch.Tensor, list[int]]:
    """Posteriors like a trained model's, blank but for a label (never the last) every few frames, and these labels."""
    draw = torch.Generator().manual_seed(seed)
    labels, at = [], 0
    logits = torch.randn(frames, vocab, generator=draw, dtype=torch.float64)
    logits[:, 0] += 8.0
    while (at := at + int(torch.randint(2, 9, (), generator=draw))) < frames:
        labels.append(int(torch.randint(1, vocab - 1, (), generator=draw)))
        logits[at, labels[-1]] += 16.0
    return logits.log_softmax(-1), labels


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    frames=st.lists(st.integers(1, 40), min_size=1, max_size=2),
    beam=st.integers(1, 2),
    depth=st.sampled_from([0.5, 5.0, 25.0, 60.0]),
    like=st.sampled_from(["trained", 0.1, 2.0, 20.0, 100.0]),
    data=st.data(),
)
def test_a_window_of_frames_never_underrates_and_is_exact_where_it_is_not_in_doubt(seed, frames, beam, depth, like, data):
    batch, longest = len(frames), max(frames)
    padded = torch.full((batch, longest, 4), float("nan"), dtype=torch.float64)
    for i, num in enumerate(frames):
        padded[i, :num] = peaky(seed + i, num, 4)[0] if like == "trained" else posteriors(seed + i, num, 4, sharpness=like)
    scorer = CtcPrefixScorer(log_probs=padded, enc_lens=torch.tensor(frames), blank_id=0, beam=beam, short=0, depth=depth)
    labels, state, same = torch.zeros(batch * beam, 0, dtype=torch.int64), scorer.start(), torch.arange(batch * beam)
    for _ in range(data.draw(st.integers(0, 8))):
        new = torch.tensor(data.draw(st.lists(st.integers(1, 3), min_size=len(labels), max_size=len(labels))))
        labels, state = torch.cat([labels, new.unsqueeze(1)], dim=1), scorer.extend(state, same, new)
    exact = []
    for row, prefix in enumerate(labels.tolist()):
        known = padded[row // beam, : frames[row // beam]].numpy()
        exact += [ctc_log_prob(known, (*prefix, c), blank_id=0, prefix=True) for c in range(1, 4)]
        exact.append(ctc_log_prob(known, prefix, blank_id=0, prefix=False))
    for attempt in range(3):
        psi, end = scorer.score(state)
        scores = torch.cat([psi[:, 1:], end.unsqueeze(1)], dim=1)
        doubtful = scorer.doubtful(state, scores)
        for score, doubt, slow in zip(scores.view(-1).tolist(), doubtful.view(-1).tolist(), exact, strict=True):
            assert score >= slow - 1e-6
            assert doubt or score == pytest.approx(slow, abs=1e-6) or (slow == -math.inf and score < -9e3)
        if not doubtful.any():
            return
        assert attempt < 2, "a score stays in doubt although all frames were asked for"
        state = scorer.restart(labels.view(batch, beam, -1), torch.zeros(batch, beam, dtype=torch.bool))


def test_long_audio_is_scored_within_a_window_that_does_not_grow_with_it():
    widest = {}
    for frames in (400, 1600):
        log_probs, labels = peaky(11, frames, 6)
        scorer = CtcPrefixScorer(log_probs=log_probs.unsqueeze(0), enc_lens=torch.tensor([frames]), blank_id=0, beam=1)
        state, widths = scorer.start(), []
        for label in labels:
            state = scorer.extend(state, torch.tensor([0]), torch.tensor([label]))
            widths.append(state.forward.end - state.forward.first)
        widest[frames] = max(widths)
        end = scorer.score(state)[1]
        exact = -torch.nn.functional.ctc_loss(log_probs, torch.tensor(labels), [frames], [len(labels)], reduction="sum")
        assert float(end) == pytest.approx(float(exact), abs=1e-7) and not scorer.doubtful(state, end).any()
    assert widest[400] < 250 and widest[1600] < 1.3 * widest[400]


def test_what_holds_no_hypothesis_does_not_widen_the_window():
    log_probs, labels = peaky(11, 1600, 6)
    scorer = CtcPrefixScorer(log_probs=log_probs.unsqueeze(0), enc_lens=torch.tensor([1600]), blank_id=0, beam=2)
    rows, dead, state = torch.tensor([0, 1]), torch.tensor([False, True]), scorer.start()
    for label in labels[:100]:
        state = scorer.extend(state, rows, torch.tensor([label, 5]), dead)
    assert state.forward.end - state.forward.first < 250 and state.forward.first > 300


def test_a_longer_prefix_is_never_more_likely_and_what_may_follow_sums_to_its_probability():
    log_probs = posteriors(6, 30, 5)
    labels = (1, 2, 2, 3, 1, 4, 4, 2, 1, 3, 2)
    score = 0.0
    for length, label in enumerate(labels):
        psi, end = fast_scores(log_probs, labels[:length])
        assert float(psi.max()) <= score + 1e-9 and float(end) <= score + 1e-9
        assert float(torch.logsumexp(torch.cat([psi, end.view(1)]), 0)) == pytest.approx(score, abs=1e-9)
        score = float(psi[label])


def test_padding_and_the_neighbours_in_a_batch_have_no_influence():
    short, long = posteriors(7, 9, 5), posteriors(8, 20, 5)
    padded = torch.full((2, 20, 5), float("nan"), dtype=torch.float64)  # what lies beyond the end must not matter
    padded[0, :9], padded[1] = short, long
    scorer = CtcPrefixScorer(log_probs=padded, enc_lens=torch.tensor([9, 20]), blank_id=0, beam=2)
    rows, labels = torch.tensor([1, 0, 2, 3]), torch.tensor([1, 2, 3, 3])
    state = scorer.extend(scorer.extend(scorer.start(), rows, labels), rows, torch.tensor([4, 2, 3, 1]))
    psi, end = scorer.score(state)
    for row, (log_probs, prefix) in enumerate([(short, (2, 4)), (short, (1, 2)), (long, (3, 3)), (long, (3, 1))]):
        alone_psi, alone_end = fast_scores(log_probs, prefix)
        assert torch.allclose(psi[row], alone_psi, atol=1e-9) and torch.allclose(end[row], alone_end, atol=1e-9)


def test_labels_a_model_rules_out_do_not_turn_into_nan():
    log_probs = posteriors(9, 12, 5)
    log_probs[:, 3] = -math.inf
    log_probs[4:8, 0] = -math.inf
    psi, end = fast_scores(log_probs, (1, 3, 2))
    assert not torch.isnan(psi).any() and not torch.isnan(end)
    assert float(psi[1]) < -9e3 and np.isfinite(float(fast_scores(log_probs, (1, 2))[0][1]))
