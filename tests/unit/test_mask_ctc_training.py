"""How a Mask-CTC decoder is trained: what is hidden, what it is asked for, and that it learns to correct CTC."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_mask_ctc import BINS, BLANK, END, VOCAB, encoded, make_model
from torch import Tensor

from speechtx.config.decode import DecodeConfig
from speechtx.config.penalty import AttentionPenaltyConfig, PenaltyConfig
from speechtx.config.schema import DecoderConfig, EncoderConfig, ModelConfig, SubsamplingConfig
from speechtx.model.losses import IGNORE, Losses, draw_hidden, every_other, hidden_targets
from speechtx.model.recognizer import Recognizer
from speechtx.search.decode import decode_batch


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(0, 1000))
def test_at_least_one_token_is_hidden_and_never_padding(lens: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    token_lens = torch.tensor(lens)
    hidden = draw_hidden(token_lens, max(lens))
    for row, length in enumerate(lens):
        assert hidden[row].sum() >= min(length, 1)
        assert not hidden[row, length:].any()
    even, odd = every_other(token_lens, max(lens))
    assert torch.equal(even.int() + odd.int(), (torch.arange(max(lens)) < token_lens.unsqueeze(1)).int())


def test_every_number_of_hidden_tokens_and_every_place_is_equally_likely() -> None:
    torch.manual_seed(0)
    hidden = draw_hidden(torch.full((20000,), 4), 6)
    counts = torch.bincount(hidden.sum(dim=1), minlength=5)
    assert counts[0] == 0
    assert torch.allclose(counts[1:] / 20000, torch.tensor(0.25), atol=0.015)
    assert torch.allclose(hidden[:, :4].float().mean(dim=0), torch.tensor(2.5 / 4), atol=0.015)


def test_hidden_tokens_are_fed_as_blank_and_only_they_are_asked_for() -> None:
    tokens, lens = torch.tensor([[3, 4, 5], [6, 99, -7]]), torch.tensor([3, 1])
    hidden = torch.tensor([[False, True, False], [True, False, False]])
    tokens_in, targets = hidden_targets(tokens, lens, hidden, blank_id=BLANK)
    assert tokens_in.tolist() == [[3, BLANK, 5], [BLANK, BLANK, BLANK]]
    assert targets.tolist() == [[IGNORE, 4, IGNORE], [6, IGNORE, IGNORE]]


def a_batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    feats, tokens = torch.randn(3, 80, BINS, generator=generator), torch.randint(1, END, (3, 6), generator=generator)
    return feats, torch.tensor([80, 61, 70]), tokens, torch.tensor([6, 2, 5])


def test_the_decoder_sees_what_stands_behind_a_hidden_token_but_no_padding() -> None:
    decoder = make_model().decoder
    enc_out, enc_lens = encoded([20], 0)
    tokens = torch.tensor([[3, BLANK, 5, 6]])
    with torch.no_grad():
        full = decoder(tokens, torch.tensor([4]), enc_out, enc_lens)
        behind = decoder(torch.tensor([[3, BLANK, 5, 7]]), torch.tensor([4]), enc_out, enc_lens)
        short = decoder(tokens[:, :3], torch.tensor([3]), enc_out, enc_lens)
        padded = decoder(tokens, torch.tensor([3]), enc_out, enc_lens)
    assert not torch.allclose(full[0, 1], behind[0, 1])
    assert torch.allclose(short[0], padded[0, :3], atol=1e-5)


def test_evaluation_is_a_function_of_the_utterance_alone_and_asks_for_each_token_once() -> None:
    model = make_model()
    feats, feat_lens, tokens, token_lens = a_batch()
    torch.manual_seed(1)
    with torch.no_grad():
        whole = model(feats, feat_lens, tokens, token_lens)
        torch.manual_seed(2)
        parts = [
            model(feats[[i], : feat_lens[i]], feat_lens[[i]], tokens[[i], : token_lens[i]], token_lens[[i]]) for i in range(3)
        ]
    assert whole.num_tokens == sum(p.num_tokens for p in parts) == 13
    assert whole.num_correct == sum(p.num_correct for p in parts)
    assert float(whole.att) == pytest.approx(sum(float(p.att) for p in parts), rel=1e-4)


def test_training_draws_are_those_of_the_seed_and_only_hidden_tokens_cost() -> None:
    model, batch = make_model().train(), a_batch()

    def loss(seed: int) -> Losses:
        torch.manual_seed(seed)
        return model(*batch)

    assert loss(1).att == loss(1).att != loss(2).att
    # With a decoder that knows nothing but its favourite token every hidden token costs ln V.
    with torch.no_grad():
        model.decoder.output.weight.zero_()
        model.decoder.output.bias.zero_()
    hidden = {round(float(loss(seed).att) / math.log(VOCAB), 3) for seed in range(10)}
    assert all(count == round(count) and 3 <= count <= 13 for count in hidden) and len(hidden) > 3
    batch = (*batch[:2], torch.zeros_like(batch[2]), batch[3])  # and of its favourites it gets all right
    assert {float(loss(seed).num_correct) for seed in range(5)} == {13.0}


@pytest.mark.parametrize("training", [True, False])
def test_empty_transcripts_cost_the_decoder_nothing(training: bool) -> None:
    model = make_model(decoder_self=PenaltyConfig(shape="log")).train(training)
    feats, feat_lens, tokens, _ = a_batch()
    for width, lens in ((6, [6, 0, 5]), (0, [0, 0, 0])):
        model.zero_grad()
        losses = model(feats, feat_lens, tokens[:, :width], torch.tensor(lens))
        losses.total.backward()
        assert losses.num_tokens == sum(lens) and losses.total.isfinite()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert losses.att == 0.0


def test_a_tiny_model_learns_and_corrects_what_ctc_gets_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """All sentences are 1 2 3 or 4 5 6, some with a silent middle, which CTC then takes for the other sentence's."""
    generator = torch.Generator().manual_seed(5)
    patterns = torch.randn(7, BINS, generator=generator)

    def audio(*sounds: Tensor) -> Tensor:
        clean = torch.stack(sounds).repeat_interleave(16, dim=0)
        return clean + 0.05 * torch.randn(clean.shape, generator=generator)

    kinds = [[1, 2, 3], [4, 5, 6]]
    loudness = torch.ones(8, 3, 1)
    loudness[4:, 1] = 0.0
    feats = torch.stack([audio(*(patterns[kinds[i % 2]] * loudness[i])) for i in range(8)])
    lens, tokens = torch.full((8,), 48), torch.tensor([kinds[i % 2] for i in range(8)])
    config = ModelConfig(
        encoder=EncoderConfig(
            layers=1,
            dim=32,
            heads=2,
            ff_dim=64,
            dropout=0.0,
            positional_dropout=0.0,
            position="none",
            subsampling=SubsamplingConfig(channels=16),
        ),
        decoder=DecoderConfig(type="mask_ctc", layers=1, heads=2, ff_dim=64, dropout=0.0, positional_dropout=0.0),
        attention_penalty=AttentionPenaltyConfig(encoder_self=PenaltyConfig(shape="window", window=1)),
    )
    torch.manual_seed(0)
    model = Recognizer(config=config, num_mel_bins=BINS, vocab_size=8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    history = []
    for step in range(120):
        torch.manual_seed(step)
        losses = model(feats, lens, tokens, torch.full((8,), 3))
        optimizer.zero_grad()
        (losses.total / losses.num_tokens).backward()
        optimizer.step()
        history.append(float(losses.total.detach()))
    assert sum(history[-10:]) < 0.5 * sum(history[:10])
    model.eval()
    frames = torch.tensor([1, BLANK, 5, 5, BLANK, 3, BLANK, BLANK, BLANK, BLANK, BLANK])
    heard = torch.full((1, 11, 8), 1e-5).scatter(2, frames.view(1, -1, 1), 1.0)
    heard[0, 2:4, 5], heard[0, 2:4, 2] = 0.6, 0.4
    monkeypatch.setattr(model, "ctc_log_probs", lambda enc_out: heard.log())
    silent = audio(patterns[1], 0.0 * patterns[2], patterns[3]).unsqueeze(0)
    (greedy,) = decode_batch(model, silent, torch.tensor([48]), DecodeConfig(method="ctc_greedy"))[0]
    (ours,) = decode_batch(model, silent, torch.tensor([48]), DecodeConfig(method="mask_ctc"))[0]
    assert greedy.tokens == (1, 5, 3)
    assert ours.tokens == (1, 2, 3) and ours.att > -0.5
