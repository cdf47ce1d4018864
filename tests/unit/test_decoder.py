from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from speechtx.attention.kernels import attention_weights
from speechtx.attention.multihead import split_heads
from speechtx.config.penalty import CrossPenaltyConfig, PenaltyConfig
from speechtx.config.schema import DecoderConfig
from speechtx.model.decoder import Decoder

VOCAB = 11
# One of every axis, and with them the ways to pay: shapes, sides, heads, layers, windows, learned strengths.
CROSS = {
    "uniform": CrossPenaltyConfig(shape="gaussian", sigma=0.1, axis="uniform"),
    "rate": CrossPenaltyConfig(shape="linear", scale=(0.5, 2.0), heads="all", axis="rate", rate=1.5),
    "ctc_count": CrossPenaltyConfig(shape="gaussian", sigma=1.0, layers=(0, 2)),
    "ctc_prefix": CrossPenaltyConfig(
        shape="log", scale=2.0, axis="ctc_prefix", symmetric=False, scale_right=1.0, round_centre=True, window=4
    ),
    "monotonic": CrossPenaltyConfig(shape="gaussian", sigma=1.5, axis="monotonic", rate=1.2, learnable="head", layers=(1, 2)),
    "lower_layer": CrossPenaltyConfig(shape="gaussian", sigma=1.0, axis="lower_layer", heads=(1,)),
}


def make_decoder(cross: str | None = None) -> Decoder:
    torch.manual_seed(0)
    config = DecoderConfig(layers=2 if cross is None else 3, heads=2, ff_dim=32)
    penalty = None if cross is None else CROSS[cross]
    decoder = Decoder(config=config, dim=16, vocab_size=VOCAB, cross_penalty=penalty).eval()
    if cross == "monotonic":  # steps that depend on the query, as after training
        for weight in decoder.cross_penalty.axis.weight:
            torch.nn.init.normal_(weight)
    return decoder


def ctc_of(enc_out: Tensor) -> Tensor:
    """A fixed random CTC output, a function of each frame alone."""
    weight = torch.randn(enc_out.shape[-1], VOCAB, generator=torch.Generator().manual_seed(8)).to(enc_out.dtype)
    return (enc_out @ weight).float().log_softmax(-1)


@contextmanager
def biases_of(decoder: Decoder) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """(queries' input, keys, bias) of every call of a cross-attention, in order."""
    calls: list[tuple[Tensor, Tensor, Tensor]] = []
    hooks = [
        layer.cross.register_forward_pre_hook(
            lambda _, args, kwargs: calls.append((args[0], args[1], kwargs["bias"])), with_kwargs=True
        )
        for layer in decoder.layers
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


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
    assert state.position == 2 and after.position == 3 and state.own[0].shape[1] == 2 * 3  # the old state is untouched


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


# ---------------------------------------------------------------------------------------------------- a penalty on distance


@settings(deadline=None, max_examples=10)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=3), st.integers(1, 20), st.integers(1, 3), st.integers(0, 99))
@pytest.mark.parametrize("cross", CROSS)
@torch.no_grad()
def test_with_a_cross_penalty_step_by_step_equals_teacher_forcing(cross, enc_lens, length, beam, seed) -> None:
    decoder = make_decoder(cross).double()
    generator = torch.Generator().manual_seed(seed)
    batch, lens = len(enc_lens), torch.tensor(enc_lens)
    enc_out = 2 * torch.randn(batch, max(enc_lens), 16, dtype=torch.float64, generator=generator)
    tokens = torch.randint(VOCAB, (batch * beam, length), generator=generator)
    outputs: list[Tensor] = []  # before the last layer, which rounds to float32
    decoder.norm.register_forward_hook(lambda module, args, output: outputs.append(output))
    state = decoder.start(enc_out, lens, beam=beam, ctc_log_probs=ctc_of(enc_out))
    for position in range(length):
        _, state = decoder.step(tokens[:, position], state)
    repeated = enc_out.repeat_interleave(beam, 0)
    token_lens = torch.full((batch * beam,), length)
    decoder(tokens, token_lens, repeated, lens.repeat_interleave(beam), ctc_log_probs=ctc_of(repeated))
    torch.testing.assert_close(torch.stack(outputs[:-1], 1), outputs[-1], atol=1e-9, rtol=0)


@pytest.mark.parametrize("cross", CROSS)
@torch.no_grad()
def test_with_a_cross_penalty_hypotheses_may_move_and_utterances_leave(cross) -> None:
    decoder = make_decoder(cross)
    enc_out, lens = 2 * torch.randn(3, 9, 16), torch.tensor([9, 5, 7])
    first, second, third = torch.randint(VOCAB, (3, 6)).unbind(0)
    _, state = decoder.step(first, decoder.start(enc_out, lens, beam=2, ctc_log_probs=ctc_of(enc_out)))
    _, state = decoder.step(second, state)
    rows = torch.tensor([1, 1, 2, 3, 5, 4])
    moved, _ = decoder.step(third, state.select(rows))
    repeated = enc_out.repeat_interleave(2, 0)
    tokens = torch.stack((first[rows], second[rows], third), 1)
    logits = decoder(tokens, torch.full((6,), 3), repeated, lens.repeat_interleave(2), ctc_log_probs=ctc_of(repeated))
    torch.testing.assert_close(moved, logits[:, -1].log_softmax(-1), atol=1e-5, rtol=0)
    stay = torch.tensor([0, 1, 4, 5])
    kept, _ = decoder.step(third[stay], state.select(rows).keep(torch.tensor([0, 2])))
    torch.testing.assert_close(kept, moved[stay], atol=1e-5, rtol=0)


@pytest.mark.parametrize("cross", CROSS)
@torch.no_grad()
def test_with_a_cross_penalty_padding_and_the_rest_of_the_batch_do_not_reach_an_utterance(cross) -> None:
    decoder = make_decoder(cross)
    enc_out, tokens = 2 * torch.randn(2, 9, 16), torch.randint(VOCAB, (2, 6))
    together = decoder(tokens, torch.tensor([6, 6]), enc_out, torch.tensor([5, 9]), ctc_log_probs=ctc_of(enc_out))
    short = enc_out[:1, :5]
    alone = decoder(tokens[:1], torch.tensor([6]), short, torch.tensor([5]), ctc_log_probs=ctc_of(short))
    torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=0)
    plain = make_decoder(cross)
    plain.cross_penalty = None
    assert not torch.allclose(plain(tokens[:1], torch.tensor([6]), short, torch.tensor([5])), alone, atol=1e-3)


@torch.no_grad()
def test_cross_attention_is_charged_exactly_for_the_distance_on_the_axis() -> None:
    decoder = make_decoder("ctc_count")
    enc_out, lens = 2 * torch.randn(2, 7, 16), torch.tensor([7, 4])
    log_probs = ctc_of(enc_out)
    with biases_of(decoder) as calls:
        decoder(torch.randint(VOCAB, (2, 5)), torch.tensor([5, 5]), enc_out, lens, ctc_log_probs=log_probs)
    paying, free, again = (bias for _, _, bias in calls)
    assert again is paying and free.shape == (2, 1, 1, 7)  # built once, and not at all for the layer that does not pay
    p = log_probs.exp().tolist()
    for b, length in enumerate(lens.tolist()):
        y, count = [], 0.0
        for j in range(length):
            begun = sum(p[b][j][k] * (1 - (p[b][j - 1][k] if j else 0.0)) for k in range(1, VOCAB))
            y.append(count + begun / 2 + 0.001 * (j + 0.5))
            count += begun
        for i in range(5):
            x = min(max(i + 0.5, y[0]), y[-1])
            for j in range(7):
                expected = -((x - y[j]) ** 2) / 2 if j < length else -math.inf
                assert paying[b, 0, i, j].item() == pytest.approx(expected, abs=1e-4)
                assert paying[b, 1, i, j] == (0.0 if j < length else -math.inf)  # head 1 is not selected


@torch.no_grad()
def test_lower_layer_is_charged_for_the_distance_from_where_the_paying_heads_looked_one_layer_below() -> None:
    decoder = make_decoder("lower_layer")
    enc_out, lens = torch.randn(2, 7, 16), torch.tensor([7, 4])
    with biases_of(decoder) as calls:
        decoder(torch.randint(VOCAB, (2, 5)), torch.tensor([5, 5]), enc_out, lens)
    assert calls[0][2].shape == (2, 1, 1, 7)
    frames = torch.arange(7.0)
    for layer in (1, 2):
        query, keys, bias = calls[layer - 1]
        weights = attention_weights(split_heads(decoder.layers[layer - 1].cross.q(query), 2), keys, bias=bias)[:, 1]
        expected = -0.5 * ((weights @ frames).unsqueeze(-1) - frames).square()
        torch.testing.assert_close(calls[layer][2][0, 1], expected[0], atol=1e-4, rtol=1e-4)
        assert bool((calls[layer][2][0, 0] == 0).all()) and bool((calls[layer][2][1, :, :, 4:] == -math.inf).all())


@torch.no_grad()
def test_lower_layer_may_be_asked_of_the_last_layer_alone() -> None:
    config = CROSS["lower_layer"].model_copy(update={"layers": (2,)})
    decoder = Decoder(config=DecoderConfig(layers=3, heads=2, ff_dim=32), dim=16, vocab_size=VOCAB, cross_penalty=config).eval()
    with biases_of(decoder) as calls:
        decoder(torch.randint(VOCAB, (1, 5)), torch.tensor([5]), torch.randn(1, 7, 16), torch.tensor([7]))
    assert [bias.shape[2] for _, _, bias in calls] == [1, 1, 5] and float(calls[2][2].min()) < 0


@torch.no_grad()
def test_uniform_is_trained_with_the_true_number_of_tokens_which_end_of_sentence_is_not() -> None:
    config = CROSS["uniform"].model_copy(update={"length_noise": 0.0})
    decoder = Decoder(config=DecoderConfig(layers=1, heads=2, ff_dim=32), dim=16, vocab_size=VOCAB, cross_penalty=config).train()
    with biases_of(decoder) as calls:
        decoder(torch.randint(VOCAB, (1, 5)), torch.tensor([5]), torch.randn(1, 8, 16), torch.tensor([8]))
    x = torch.tensor([1 / 8, 3 / 8, 5 / 8, 7 / 8, 15 / 16])  # four tokens and the end, which stays with the last frame
    y = (torch.arange(8) + 0.5) / 8
    torch.testing.assert_close(calls[0][2][0, 0], -50 * (x[:, None] - y).square(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cross", CROSS)
@pytest.mark.parametrize(("frames", "length"), [(1, 1), (1, 4), (9, 1), (9, 6)])
def test_with_a_cross_penalty_even_one_frame_and_one_token_train(cross, frames, length) -> None:
    decoder = make_decoder(cross).train()
    enc_out = torch.randn(2, frames, 16, requires_grad=True)
    lens = torch.tensor([frames, max(1, frames - 2)])
    tokens, token_lens = torch.randint(VOCAB, (2, length)), torch.tensor([length, 1])
    logits = decoder(tokens, token_lens, enc_out, lens, ctc_log_probs=ctc_of(enc_out.detach()))
    logits.square().sum().backward()
    gradients = {name: p.grad for name, p in decoder.named_parameters()}
    assert all(g is not None and bool(g.isfinite().all()) for g in gradients.values()), "unused or broken parameters"
    if cross == "monotonic" and frames == 9 and length == 6:
        assert bool((gradients["cross_penalty.axis.bias"] != 0).all())
        assert bool((gradients["cross_penalty.penalty.strength.learned"] != 0).all())


def test_without_a_cross_penalty_nothing_is_computed_for_it() -> None:
    decoder = make_decoder()
    assert decoder.cross_penalty is None and not decoder.needs_ctc
    assert not any("cross_penalty" in name for name in decoder.state_dict())
    with biases_of(decoder) as calls:
        state = decoder.start(torch.randn(2, 9, 16), torch.tensor([9, 5]), beam=1)
        _, after = decoder.step(torch.tensor([10, 10]), state)
    assert state.axis is None and after.axis is None and all(bias is state.cross_bias for _, _, bias in calls)


def test_an_axis_that_needs_ctc_says_so_when_it_is_not_given() -> None:
    enc_out, lens = torch.randn(1, 4, 16), torch.tensor([4])
    for cross in CROSS:
        decoder = make_decoder(cross)
        assert decoder.needs_ctc == (cross in ("uniform", "ctc_count", "ctc_prefix"))
        if decoder.needs_ctc:
            with pytest.raises(ValueError, match=f"{cross} needs ctc_log_probs"):
                decoder.start(enc_out, lens, beam=1)


OWN = {
    "free": {},
    "rotary": {"position": "rotary"},
    "penalty": {"penalty": PenaltyConfig(shape="linear", scale=0.5)},
    "penalty of some heads, learned per layer": {
        "position": "rotary",
        "penalty": PenaltyConfig(shape="linear", scale=0.5, heads=(1,), learnable="head"),
    },
}


@pytest.mark.parametrize("own", OWN)
@pytest.mark.parametrize("beam", [1, 3])
@torch.no_grad()
def test_hypotheses_that_are_reordered_at_every_step_keep_their_own_pasts_and_no_others(own, beam):
    """Long enough that tokens which no hypothesis has any more are dropped several times; one utterance leaves on the way."""
    torch.manual_seed(0)
    options = dict(OWN[own])
    penalty = options.pop("penalty", None)
    config = DecoderConfig(layers=2, heads=2, ff_dim=32, **options)
    decoder = Decoder(config=config, dim=16, vocab_size=VOCAB, penalty=penalty).eval()
    batch, length = 3, 40
    enc_out, lens = torch.randn(batch, 9, 16), torch.tensor([9, 5, 7])
    state = decoder.start(enc_out, lens, beam=beam)
    past = torch.zeros(batch * beam, 0, dtype=torch.int64)
    sizes = []
    for position in range(length):
        tokens = torch.randint(VOCAB, (batch * beam,))
        past = torch.cat((past, tokens.unsqueeze(1)), dim=1)
        log_probs, state = decoder.step(tokens, state)
        if position % 3 == 0:
            logits = decoder(
                past, torch.full((len(past),), past.shape[1]), enc_out.repeat_interleave(beam, 0), lens.repeat_interleave(beam)
            )
            torch.testing.assert_close(log_probs, logits[:, -1].log_softmax(-1), atol=1e-5, rtol=0)
        # the first two hypotheses have most descendants, and every utterance chooses otherwise
        rows = torch.randint(min(2, beam), (batch, beam)) + beam * torch.arange(batch).unsqueeze(1)
        state, past = state.select(rows.view(-1)), past[rows.view(-1)]
        sizes.append(state.own[0].shape[1])
        if position == 20:
            remaining = torch.tensor([0, 2])
            state, past = state.keep(remaining), past.view(batch, beam, -1)[remaining].flatten(0, 1)
            enc_out, lens, batch = enc_out[remaining], lens[remaining], 2
    assert max(sizes) <= 1.5 * (length + 8 * beam) and (beam == 1 or sizes != sorted(sizes))
