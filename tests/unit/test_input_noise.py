"""Noise on the decoder's input: only in training, only where a token stands, and as often as asked for."""

from __future__ import annotations

import pytest
import torch
from toy_corpus import BINS, tiny_config

from speechtx.config.errors import ConfigError
from speechtx.model.recognizer import Recognizer

VOCAB = 9
SOS_EOS = VOCAB - 1


def make_model(*overrides: str) -> Recognizer:
    quiet = [f"model.{part}.{kind}=0.0" for part in ("encoder", "decoder") for kind in ("dropout", "positional_dropout")]
    torch.manual_seed(0)
    return Recognizer(config=tiny_config(*quiet, *overrides).model, num_mel_bins=BINS, vocab_size=VOCAB)


def embedded(model: Recognizer, tokens_in: torch.Tensor) -> torch.Tensor:
    """The tokens that the decoder embeds when it is given `tokens_in`."""
    seen = []
    hook = model.decoder.embedding.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    enc_out, enc_lens = torch.randn(len(tokens_in), 5, 16), torch.full((len(tokens_in),), 5)
    model.decoder(tokens_in, torch.full((len(tokens_in),), tokens_in.shape[1]), enc_out, enc_lens)
    hook.remove()
    return seen[0]


def test_tokens_are_replaced_as_often_as_asked_for_by_any_other_and_sentences_still_start() -> None:
    model = make_model("model.decoder.input_noise=0.3").train()
    tokens_in = torch.full((200, 50), 4)
    tokens_in[:, 0] = SOS_EOS
    torch.manual_seed(1)
    seen = embedded(model, tokens_in)
    assert (seen[:, 0] == SOS_EOS).all()
    replaced = seen[:, 1:] != 4
    # one replacement in V - 2 is by the token itself
    assert float(replaced.float().mean()) == pytest.approx(0.3 * 6 / 7, abs=0.02)
    assert set(seen[:, 1:][replaced].tolist()) == {1, 2, 3, 5, 6, 7}  # neither <blank> nor <sos/eos>
    torch.manual_seed(1)
    assert torch.equal(embedded(model, tokens_in), seen)
    assert not torch.equal(embedded(model, tokens_in), seen)


def test_evaluation_and_a_share_of_zero_feed_the_true_tokens_and_draw_nothing() -> None:
    tokens_in = torch.randint(1, SOS_EOS, (4, 6))
    assert torch.equal(embedded(make_model("model.decoder.input_noise=0.9").eval(), tokens_in), tokens_in)
    model = make_model().train()
    enc_out, enc_lens = torch.randn(4, 5, 16), torch.full((4,), 5)
    before = torch.get_rng_state()
    model.decoder(tokens_in, torch.full((4,), 6), enc_out, enc_lens)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_targets_stay_the_true_tokens() -> None:
    feats, lens = torch.randn(2, 60, BINS), torch.tensor([60, 40])
    batch = (feats, lens, torch.tensor([[1, 2, 3], [4, 1, 0]]), torch.tensor([3, 2]))
    clean, noisy = make_model().train()(*batch), make_model("model.decoder.input_noise=0.9").train()(*batch)
    assert float(clean.ctc) == float(noisy.ctc)
    assert float(clean.att) != float(noisy.att)
    assert int(noisy.num_tokens) == 7


def test_a_decoder_of_hidden_tokens_takes_no_noise() -> None:
    with pytest.raises(ConfigError, match="mask_ctc hides tokens already"):
        make_model("model.decoder.input_noise=0.1", "model.decoder.type=mask_ctc")
