from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speechtx.model.losses import IGNORE, attention_loss, ctc_loss, ctc_min_frames, decoder_targets


def collapse(path: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(token for token, _ in itertools.groupby(path) if token != 0)


@given(st.lists(st.integers(1, 2), max_size=4))
def test_ctc_min_frames_is_the_shortest_alignment_there_is(tokens: list[int]) -> None:
    shortest = next(
        n for n in itertools.count() if any(collapse(p) == tuple(tokens) for p in itertools.product(range(3), repeat=n))
    )
    assert ctc_min_frames(tokens) == shortest


@pytest.mark.parametrize("tokens", [(1,), (1, 2), (1, 1), ()])
def test_ctc_is_the_sum_over_all_alignments(tokens: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    log_probs = torch.randn(1, 5, 3).log_softmax(-1)
    paths = [p for p in itertools.product(range(3), repeat=4) if collapse(p) == tokens]
    expected = -math.log(sum(math.exp(sum(log_probs[0, t, k].item() for t, k in enumerate(p))) for p in paths))
    padded = torch.tensor([[*tokens, 2, 2]])
    loss = ctc_loss(log_probs, torch.tensor([4]), padded, torch.tensor([len(tokens)]), blank_id=0)
    assert loss.item() == pytest.approx(expected, abs=1e-5)


def test_an_impossible_utterance_gives_an_infinite_loss_and_is_not_hidden() -> None:
    log_probs = torch.zeros(1, 2, 3).log_softmax(-1)
    assert ctc_min_frames([1, 1]) == 3
    assert ctc_loss(log_probs, torch.tensor([2]), torch.tensor([[1, 1]]), torch.tensor([2]), blank_id=0).item() == math.inf


def test_targets_start_and_end_each_sentence_whatever_the_padding_holds() -> None:
    tokens = torch.tensor([[4, 5, 6], [7, -100, 99]])
    tokens_in, targets = decoder_targets(tokens, torch.tensor([3, 1]), sos_eos_id=9)
    assert tokens_in.tolist() == [[9, 4, 5, 6], [9, 7, 9, 9]]
    assert targets.tolist() == [[4, 5, 6, 9], [7, 9, IGNORE, IGNORE]]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_label_smoothing_is_cross_entropy_to_the_smoothed_distribution(smoothing: float) -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 3, 5), torch.tensor([[1, 4, IGNORE], [2, IGNORE, IGNORE]])
    expected, correct = 0.0, 0
    for row, column in ((0, 0), (0, 1), (1, 0)):
        wanted = torch.full((5,), smoothing / 5)
        wanted[targets[row, column]] += 1 - smoothing
        expected -= float((wanted * logits[row, column].log_softmax(-1)).sum())
        correct += int(logits[row, column].argmax() == targets[row, column])
    loss, hits = attention_loss(logits, targets, label_smoothing=smoothing)
    assert loss.item() == pytest.approx(expected, rel=1e-5) and hits.item() == correct
