from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechtx.config.schema import DecoderConfig
from speechtx.model.decoder import Decoder

VOCAB = 11


def make_decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder(config=DecoderConfig(layers=2, heads=2, ff_dim=32), dim=16, vocab_size=VOCAB).eval()


@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=3), st.integers(1, 8), st.integers(1, 4))
@torch.no_grad()
def test_step_by_step_equals_teacher_forcing(enc_lens: list[int], length: int, beam: int) -> None:
    decoder = make_decoder()
    batch = len(enc_lens)
    enc_out, lens = torch.randn(batch, max(enc_lens), 16), torch.tensor(enc_lens)
    tokens = torch.randint(VOCAB, (batch * beam, length))
    state = decoder.start(enc_out, lens, beam=beam)
    stepped = []
    for position in range(length):
        log_probs, state = decoder.step(tokens[:, position], state)
        stepped.append(log_probs)
    token_lens = torch.full((batch * beam,), length)
    logits = decoder(tokens, token_lens, enc_out.repeat_interleave(beam, 0), lens.repeat_interleave(beam))
    torch.testing.assert_close(torch.stack(stepped, 1), logits.log_softmax(-1), atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_reordered_hypothesis_continues_its_own_past() -> None:
    decoder = make_decoder()
    enc_out, lens = torch.randn(2, 9, 16), torch.tensor([9, 5])
    first, second, third = torch.randint(VOCAB, (3, 6)).unbind(0)
    rows = torch.tensor([2, 0, 0, 4, 3, 5])  # within each utterance of three hypotheses
    _, state = decoder.step(first, decoder.start(enc_out, lens, beam=3))
    _, state = decoder.step(second, state)
    log_probs, after = decoder.step(third, state.select(rows))
    tokens = torch.stack((first[rows], second[rows], third), 1)
    logits = decoder(tokens, torch.full((6,), 3), enc_out.repeat_interleave(3, 0), lens.repeat_interleave(3))
    torch.testing.assert_close(log_probs, logits[:, -1].log_softmax(-1), atol=1e-5, rtol=0)
    assert state.position == 2 and after.position == 3 and state.own[0][0].shape[2] == 2  # the old state is untouched


@torch.no_grad()
def test_dropping_finished_utterances_changes_nothing_for_the_others() -> None:
    decoder = make_decoder()
    enc_out, lens = torch.randn(3, 9, 16), torch.tensor([9, 5, 7])
    first, second = torch.randint(VOCAB, (2, 6)).unbind(0)
    _, state = decoder.step(first, decoder.start(enc_out, lens, beam=2))
    everybody, _ = decoder.step(second, state)
    kept, _ = decoder.step(second[[0, 1, 4, 5]], state.keep(torch.tensor([0, 2])))
    torch.testing.assert_close(kept, everybody[[0, 1, 4, 5]], atol=1e-6, rtol=0)


@torch.no_grad()
def test_cross_keys_are_held_once_an_utterance_not_once_a_hypothesis() -> None:
    state = make_decoder().start(torch.randn(2, 9, 16), torch.tensor([9, 5]), beam=7)
    assert [keys.shape for keys, _ in state.cross] == [(2, 2, 9, 8)] * 2
    with pytest.raises(ValueError, match="beam 0"):
        make_decoder().start(torch.randn(2, 9, 16), torch.tensor([9, 5]), beam=0)


@torch.no_grad()
def test_encoder_padding_and_later_tokens_do_not_reach_a_position() -> None:
    decoder = make_decoder()
    enc_out, tokens = torch.randn(1, 9, 16), torch.randint(VOCAB, (1, 6))
    logits = decoder(tokens, torch.tensor([6]), enc_out, torch.tensor([5]))
    noisy, other = enc_out.clone(), tokens.clone()
    noisy[:, 5:] = 100.0
    other[:, 4:] = (other[:, 4:] + 1) % VOCAB
    torch.testing.assert_close(decoder(tokens, torch.tensor([6]), noisy, torch.tensor([5])), logits, atol=1e-6, rtol=0)
    changed = decoder(other, torch.tensor([4]), enc_out, torch.tensor([5]))
    torch.testing.assert_close(changed[:, :4], logits[:, :4], atol=1e-6, rtol=0)
    assert not torch.allclose(changed[:, 4:], logits[:, 4:], atol=1e-3)
