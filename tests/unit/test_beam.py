"""The batched beam search against the plain one, against brute force, against greedy."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechtx.config.decode import DecodeConfig
from speechtx.config.errors import ConfigError
from speechtx.config.penalty import AttentionPenaltyConfig, CrossPenaltyConfig
from speechtx.config.schema import DecoderConfig, EncoderConfig, ModelConfig, SubsamplingConfig
from speechtx.model.recognizer import Recognizer
from speechtx.search.beam import beam_search
from speechtx.search.greedy import ctc_greedy
from speechtx.search.hypothesis import Hypothesis
from speechtx.search.reference import ctc_log_prob, reference_search

MELS, VOCAB = 16, 9


CROSS = {
    "uniform": CrossPenaltyConfig(shape="gaussian", sigma=0.15, axis="uniform"),
    "rate": CrossPenaltyConfig(shape="linear", scale=0.5, axis="rate", rate=1.5),
    "ctc_count": CrossPenaltyConfig(shape="gaussian", sigma=1.0, heads="all"),
    "ctc_prefix": CrossPenaltyConfig(shape="gaussian", sigma=1.0, axis="ctc_prefix"),
    "monotonic": CrossPenaltyConfig(shape="gaussian", sigma=1.0, axis="monotonic", rate=1.2),
    "lower_layer": CrossPenaltyConfig(shape="gaussian", sigma=1.0, axis="lower_layer"),
}


def tiny_model(seed: int = 0, *, vocab: int = VOCAB, cross: str | None = None) -> Recognizer:
    torch.manual_seed(seed)
    config = ModelConfig(
        encoder=EncoderConfig(layers=1, dim=16, heads=2, ff_dim=32, subsampling=SubsamplingConfig(channels=4)),
        decoder=DecoderConfig(layers=2, heads=2, ff_dim=32),
        attention_penalty=AttentionPenaltyConfig(cross=CROSS[cross] if cross else CrossPenaltyConfig()),
    )
    return Recognizer(config=config, num_mel_bins=MELS, vocab_size=vocab).eval()


def sharp_model(seed: int, cross: str | None = None) -> Recognizer:
    """Random, but with outputs as decided as a trained model's, so that searches differ in more than noise."""
    model = tiny_model(seed, cross=cross)
    with torch.no_grad():
        model.ctc.weight.mul_(4)
        assert model.decoder is not None
        for name, parameter in model.decoder.named_parameters():
            if "axis.weight" in name:  # monotonic steps that depend on what was said
                parameter.normal_()
        model.decoder.output.weight.mul_(3)
    return model


@pytest.fixture(scope="module")
def trained() -> Recognizer:
    """Trained for a moment on three token patterns painted into the features, enough to be right on them."""
    model = tiny_model(5).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(5)
    for _ in range(150):
        feats, feat_lens, tokens, token_lens = painted(generator, batch=8)
        losses = model(feats, feat_lens, tokens, token_lens)
        optimizer.zero_grad()
        (losses.total / losses.num_tokens).backward()
        optimizer.step()
    return model.eval()


def painted(generator: torch.Generator, *, batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each token is 12 frames of energy in its own pair of mel bins, 8 frames of silence between."""
    tokens = torch.randint(1, VOCAB - 1, (batch, 4), generator=generator)
    feats = 0.3 * torch.randn(batch, 88, MELS, generator=generator)
    for row, position in itertools.product(range(batch), range(4)):
        token, start = int(tokens[row, position]), 6 + 20 * position
        feats[row, start : start + 12, 2 * token - 2 : 2 * token] += 3.0
    return feats, torch.full((batch,), 88), tokens, torch.full((batch,), 4)


def encode(model: Recognizer, lengths: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    feats = torch.randn(len(lengths), max(lengths), MELS, generator=generator)
    for row, length in enumerate(lengths):
        feats[row, length:] = 0
    with torch.no_grad():
        return model.encode(feats, torch.tensor(lengths))


def assert_same(fast: list[Hypothesis], slow: list[Hypothesis]) -> None:
    assert [h.tokens for h in fast] == [h.tokens for h in slow]
    for a, b in zip(fast, slow, strict=True):
        assert a.score == pytest.approx(b.score, abs=1e-4)
        for x, y in ((a.att, b.att), (a.ctc, b.ctc), (a.length_bonus, b.length_bonus)):
            assert (x is None) == (y is None) and (x is None or x == pytest.approx(y, abs=1e-4))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("ctc_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("length_bonus", [-0.3, 0.0, 0.6])
def test_batched_search_equals_the_plain_one(seed, ctc_weight, length_bonus):
    model = sharp_model(seed)
    enc_out, enc_lens = encode(model, [40, 23, 31], seed)
    config = DecodeConfig(beam=4, nbest=3, ctc_weight=ctc_weight, length_bonus=length_bonus, max_len_ratio=0.9)
    fast = beam_search(model, enc_out, enc_lens, config)
    for row, length in enumerate(enc_lens.tolist()):
        assert_same(fast[row], reference_search(model, enc_out[row, :length], config))


@pytest.mark.parametrize("cross", CROSS)
@pytest.mark.parametrize("ctc_weight", [0.0, 0.3])
def test_with_a_cross_penalty_batched_search_equals_the_plain_one_and_each_utterance_alone(cross, ctc_weight):
    model = sharp_model(2, cross)
    enc_out, enc_lens = encode(model, [40, 23, 9, 31])  # one leaves the batch early, the shortest has one frame
    assert int(enc_lens.min()) == 1
    config = DecodeConfig(beam=4, nbest=3, ctc_weight=ctc_weight, length_bonus=0.3, max_len_ratio=0.9)
    fast = beam_search(model, enc_out, enc_lens, config)
    for row, length in enumerate(enc_lens.tolist()):
        assert_same(fast[row], reference_search(model, enc_out[row, :length], config))
        (alone,) = beam_search(model, enc_out[row : row + 1, :length], enc_lens[row : row + 1], config)
        assert_same(fast[row], alone)
    model.decoder.cross_penalty = None
    free = beam_search(model, enc_out, enc_lens, config)
    assert any(abs(a[0].score - b[0].score) > 1e-3 for a, b in zip(fast, free, strict=True)), "the penalty must matter here"


@pytest.mark.parametrize(
    ("cross", "ctc_weight", "calls"),
    [
        (None, 0.0, 0),
        ("monotonic", 0.0, 0),
        ("rate", 0.0, 0),
        ("ctc_count", 0.0, 1),
        ("ctc_count", 0.3, 1),
        ("ctc_prefix", 0.3, 1),
    ],
)
def test_the_ctc_output_is_computed_once_and_only_when_scores_or_the_axis_need_it(cross, ctc_weight, calls):
    model = tiny_model(cross=cross)
    enc_out, enc_lens = encode(model, [40, 23])
    counted = []
    model.ctc.register_forward_hook(lambda *_: counted.append(1))
    beam_search(model, enc_out, enc_lens, DecodeConfig(beam=3, nbest=1, ctc_weight=ctc_weight))
    assert len(counted) == calls


@pytest.mark.parametrize("ctc_weight", [0.0, 0.3, 1.0])
def test_on_a_trained_model_both_searches_are_equal_and_ctc_makes_them_right(trained, ctc_weight):
    feats, feat_lens, tokens, _ = painted(torch.Generator().manual_seed(77), batch=3)
    with torch.no_grad():
        enc_out, enc_lens = trained.encode(feats, feat_lens)
    config = DecodeConfig(beam=3, nbest=3, ctc_weight=ctc_weight, max_len_ratio=0.4)
    for row, fast in enumerate(beam_search(trained, enc_out, enc_lens, config)):
        assert_same(fast, reference_search(trained, enc_out[row], config))
        if ctc_weight > 0:  # attention alone needs longer to learn where to look
            assert fast[0].tokens == tuple(tokens[row].tolist())


@pytest.mark.parametrize("ctc_weight", [0.0, 0.4, 1.0])
def test_results_do_not_depend_on_how_utterances_are_batched(ctc_weight):
    model = sharp_model(3)
    lengths = [60, 12, 35, 48, 20]
    enc_out, enc_lens = encode(model, lengths)
    config = DecodeConfig(beam=5, nbest=4, ctc_weight=ctc_weight, length_bonus=0.2)
    together = beam_search(model, enc_out, enc_lens, config)
    for row, length in enumerate(enc_lens.tolist()):
        (alone,) = beam_search(model, enc_out[row : row + 1, :length], enc_lens[row : row + 1], config)
        assert_same(together[row], alone)


def test_score_is_the_weighted_sum_of_its_parts_and_each_part_is_right():
    model = sharp_model(4)
    enc_out, enc_lens = encode(model, [40])
    config = DecodeConfig(beam=4, nbest=4, ctc_weight=0.3, length_bonus=0.5)
    (nbest,) = beam_search(model, enc_out, enc_lens, config)
    assert [h.score for h in nbest] == sorted((h.score for h in nbest), reverse=True) and len({h.tokens for h in nbest}) == 4
    log_probs = model.ctc_log_probs(enc_out)[0].detach().double().numpy()
    for h in nbest:
        assert h.att is not None and h.ctc is not None
        assert h.score == pytest.approx(0.7 * h.att + 0.3 * h.ctc + h.length_bonus, abs=1e-9)
        assert h.length_bonus == pytest.approx(0.5 * len(h.tokens))
        assert h.ctc == pytest.approx(ctc_log_prob(log_probs, h.tokens, blank_id=0, prefix=False), abs=1e-6)
        assert model.decoder is not None
        tokens_in = torch.tensor([[model.sos_eos_id, *h.tokens]])
        logits = model.decoder(tokens_in, torch.tensor([tokens_in.shape[1]]), enc_out, enc_lens)[0].detach().log_softmax(-1)
        targets = torch.tensor([*h.tokens, model.sos_eos_id])
        assert h.att == pytest.approx(float(logits.gather(1, targets.unsqueeze(1)).sum()), abs=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_attention_beam_one_is_attention_greedy(seed):
    model = sharp_model(seed)
    enc_out, enc_lens = encode(model, [50], seed)
    tokens: list[int] = []
    assert model.decoder is not None
    while len(tokens) < int(enc_lens[0]):
        tokens_in = torch.tensor([[model.sos_eos_id, *tokens]])
        logits = model.decoder(tokens_in, torch.tensor([tokens_in.shape[1]]), enc_out, enc_lens)[0, -1]
        logits[0] = -torch.inf  # blank is CTC's alone
        if int(logits.argmax()) == model.sos_eos_id:
            break
        tokens.append(int(logits.argmax()))
    (found,) = beam_search(model, enc_out, enc_lens, DecodeConfig(beam=1, ctc_weight=0.0))
    assert found[0].tokens == tuple(tokens)


def ctc_only(log_probs: torch.Tensor) -> SimpleNamespace:
    """A "model" whose encoder output is its CTC posteriors."""
    return SimpleNamespace(ctc_outputs=lambda enc_out: [enc_out], decoder=None, blank_id=0, sos_eos_id=log_probs.shape[-1] - 1)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), frames=st.integers(1, 30))
def test_ctc_beam_one_is_ctc_greedy_when_the_best_path_has_more_than_half_of_the_probability(seed, frames):
    """Then the best path's labels have more than half too, so every other extension of each of their prefixes has less."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, frames, 6, generator=generator)
    path = torch.randint(0, 5, (1, frames, 1), generator=generator)
    log_probs = logits.scatter(2, path, 12.0).log_softmax(-1)
    lens = torch.tensor([frames])
    (greedy,) = ctc_greedy(log_probs, lens, blank_id=0, sos_eos_id=5)
    assert greedy.score > -0.6931  # the premise: more than one half
    ((beam,),) = beam_search(ctc_only(log_probs), log_probs, lens, DecodeConfig(beam=1, ctc_weight=1.0))  # type: ignore[arg-type]
    assert beam.tokens == greedy.tokens and beam.score >= greedy.score - 1e-6


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_wide_ctc_beam_finds_the_most_likely_text_of_all(seed):
    generator = torch.Generator().manual_seed(seed)
    log_probs = (2 * torch.randn(1, 4, 4, generator=generator)).log_softmax(-1)
    everything = [labels for n in range(5) for labels in itertools.product((1, 2), repeat=n)]
    exact = {labels: ctc_log_prob(log_probs[0].numpy(), labels, blank_id=0, prefix=False) for labels in everything}
    best = sorted(exact.items(), key=lambda item: -item[1])[:5]
    config = DecodeConfig(beam=40, nbest=5, ctc_weight=1.0)
    (found,) = beam_search(ctc_only(log_probs), log_probs, torch.tensor([4]), config)  # type: ignore[arg-type]
    assert [(h.tokens, pytest.approx(h.score, abs=1e-6)) for h in found] == best


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 10**6), length_bonus=st.sampled_from([-0.5, 0.0, 0.7, 1.5]))
def test_the_search_never_stops_before_a_better_hypothesis_could_end(seed, length_bonus):
    """The plain search never stops early; with one best asked for and a bonus for length, the fast one is tempted to."""
    generator = torch.Generator().manual_seed(seed)
    log_probs = (3 * torch.randn(1, 7, 5, generator=generator)).log_softmax(-1)
    config = DecodeConfig(beam=3, nbest=1, ctc_weight=1.0, length_bonus=length_bonus)
    (fast,) = beam_search(ctc_only(log_probs), log_probs, torch.tensor([7]), config)  # type: ignore[arg-type]
    assert_same(fast, reference_search(ctc_only(log_probs), log_probs[0], config))  # type: ignore[arg-type]


def test_hypotheses_hold_no_blank_no_end_and_at_most_the_configured_length():
    model = sharp_model(6)
    enc_out, enc_lens = encode(model, [80, 40])
    config = DecodeConfig(beam=4, nbest=4, ctc_weight=0.0, length_bonus=20.0, max_len_ratio=0.5)  # a bonus that wants to run on
    for nbest, length in zip(beam_search(model, enc_out, enc_lens, config), enc_lens.tolist(), strict=True):
        assert nbest and max(len(h.tokens) for h in nbest) == int(0.5 * length)
        assert all(0 < token < VOCAB - 1 for h in nbest for token in h.tokens)


def test_one_encoder_frame_is_enough():
    model = sharp_model(7)
    enc_out, enc_lens = encode(model, [7])
    assert enc_lens.tolist() == [1]
    (nbest,) = beam_search(model, enc_out, enc_lens, DecodeConfig(beam=10, nbest=10, ctc_weight=0.3))
    assert all(len(h.tokens) <= 1 for h in nbest) and len(nbest) == 8  # seven tokens, and nothing at all


def test_a_search_that_needs_a_decoder_says_so():
    log_probs = torch.zeros(1, 3, 4).log_softmax(-1)
    with pytest.raises(ConfigError, match=r"ctc_weight 0\.3 needs a decoder.*ctc_weight: 1\.0"):
        beam_search(ctc_only(log_probs), log_probs, torch.tensor([3]), DecodeConfig())  # type: ignore[arg-type]


def test_a_model_that_outputs_nan_gives_no_hypothesis_and_leaves_its_neighbours_alone():
    model = sharp_model(8)
    enc_out, enc_lens = encode(model, [40, 40])
    enc_out[0] = float("nan")
    config = DecodeConfig(beam=4, ctc_weight=0.3)
    broken, whole = beam_search(model, enc_out, enc_lens, config)
    assert broken == []
    assert_same(whole, beam_search(model, enc_out[1:], enc_lens[1:], config)[0])
