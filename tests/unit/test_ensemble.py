"""Several models that recognise together."""

from __future__ import annotations

import math

import pytest
import torch
from toy_corpus import make_training_data, tiny_config

from speechtx.config.decode import DecodeConfig
from speechtx.config.errors import ConfigError
from speechtx.config.load import parse_config
from speechtx.config.schema import AverageConfig, ModelConfig
from speechtx.model.ensemble import Ensemble, log_mean_prob
from speechtx.model.recognizer import Recognizer
from speechtx.search.ctc_prefix import CtcPrefixScorer
from speechtx.search.decode import decode_batch
from speechtx.search.reference import ctc_log_prob, reference_search
from speechtx.search.system import System
from speechtx.training.averaging import average_checkpoints
from speechtx.training.train import train

BINS, VOCAB = 12, 9
COVERING = DecodeConfig(beam=3, coverage_weight=0.5, coverage_threshold=0.1)


def make_model(seed: int, *, dim: int = 16, layers: int = 1, vocab: int = VOCAB, overrides: tuple[str, ...] = ()) -> Recognizer:
    shape = (
        f"encoder: {{layers: 1, dim: {dim}, heads: 2, ff_dim: 32, subsampling: {{channels: 4}}}}\n"
        f"decoder: {{layers: {layers}, heads: 2, ff_dim: 32}}\n"
    )
    torch.manual_seed(seed)
    model = Recognizer(config=parse_config(shape, ModelConfig, overrides), num_mel_bins=BINS, vocab_size=vocab)
    with torch.no_grad():  # a sharper output, so that hypotheses differ clearly
        for layer in [model.ctc, *([model.decoder.output] if model.decoder else [])]:
            layer.weight.mul_(4)
    return model.eval()


@pytest.fixture(scope="module")
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.tensor([70, 45, 31])
    feats = torch.randn(3, 70, BINS, generator=torch.Generator().manual_seed(3))
    return feats, lengths


@pytest.mark.parametrize("config", [DecodeConfig(beam=4, nbest=3), DecodeConfig(method="ctc_greedy")])
@pytest.mark.parametrize(
    "overrides", [(), ("attention_penalty={cross: {shape: log, axis: ctc_prefix}}", "decoder.position=rotary")]
)
def test_a_model_twice_gives_exactly_its_own_results(batch, config, overrides):
    model = make_model(1, overrides=overrides)
    alone = decode_batch(model, *batch, config)
    twice = decode_batch(Ensemble([model, model]).eval(), *batch, config)
    assert twice == alone  # texts, scores and parts of scores, to the last bit
    assert any(hypothesis.tokens for nbest in alone for hypothesis in nbest)


def test_two_models_score_with_the_mean_of_their_probabilities(batch):
    a, b = make_model(1), make_model(2, dim=24)  # another width, too
    both = Ensemble([a, b]).eval()
    with torch.inference_mode():
        enc, lens = both.encode(*batch)
        enc_a, enc_b = a.encode(*batch)[0], b.encode(*batch)[0]
        mean = (a.ctc_log_probs(enc_a).exp() + b.ctc_log_probs(enc_b).exp()) / 2
        torch.testing.assert_close(both.ctc_log_probs(enc).exp(), mean)
        states = [m.start(e, lens, beam=2) for m, e in ((both.decoder, enc), (a.decoder, enc_a), (b.decoder, enc_b))]
        tokens = torch.full((6,), VOCAB - 1)
        rows = torch.tensor([1, 0, 2, 2, 5, 4])
        for step in range(3):
            found = []
            for i, decoder in enumerate((both.decoder, a.decoder, b.decoder)):
                log_probs, state = decoder.step(tokens, states[i])
                states[i] = state.select(rows)
                found.append(log_probs.exp())
            torch.testing.assert_close(found[0], (found[1] + found[2]) / 2)
            tokens = torch.tensor([1, 2, 3, 4, 5, 6]) + step % 2
        kept = states[0].keep(torch.tensor([2]))
        assert both.decoder.step(tokens[:2], kept)[0].shape == (2, VOCAB)


@pytest.mark.parametrize(
    "config", [DecodeConfig(beam=4, nbest=3), DecodeConfig(beam=3, ctc_weight=1.0, length_bonus=0.5), COVERING]
)
def test_joint_search_scores_each_members_ctc_by_itself(batch, config):
    both = Ensemble([make_model(1), make_model(2, dim=24)]).eval()
    with torch.no_grad():
        enc, lens = both.encode(*batch)
    found = decode_batch(both, *batch, config)
    for row, nbest in enumerate(found):
        expected = reference_search(both, enc[row, : lens[row]], config)
        assert [h.tokens for h in nbest] == [h.tokens for h in expected]
        assert [h.score for h in nbest] == pytest.approx([h.score for h in expected], abs=1e-4)
        members = [out[row, : lens[row]].detach().double().numpy() for out in both.ctc_outputs(enc)]
        ids = {"blank_id": both.blank_id, "prefix": False}
        for hypothesis in nbest:
            scores = [ctc_log_prob(own, hypothesis.tokens, **ids) for own in members]
            assert hypothesis.ctc == pytest.approx(sum(scores) / 2, abs=1e-4)


def test_searches_that_read_ctc_frame_by_frame_warn_of_models_trained_apart(tmp_path, caplog):
    data = make_training_data(tmp_path, num_train=4, num_dev=2)
    for name in ("a", "b"):
        train(tiny_config("training.epochs=2"), data, tmp_path / name)
        average_checkpoints(tmp_path / name, AverageConfig(num=2))
    both = [tmp_path / "a", tmp_path / "b"]
    greedy, joint = DecodeConfig(method="ctc_greedy"), DecodeConfig()
    System.find(both).load([joint], "cpu")
    System.find(both[:1], weights=[both[0] / "model.pt"] * 2).load([greedy], "cpu")  # checkpoints of one training
    assert "trained apart" not in caplog.text
    System.find(both).load([joint, greedy], "cpu")
    assert "method ctc_greedy reads the mean of the models' CTC outputs frame by frame" in caplog.text


def test_models_trained_apart_need_not_see_tokens_in_the_same_frame():
    """Two CTC outputs that are sure of the same token, one frame apart: together they are sure of it too."""
    sure, other = torch.full((2, 1, 4, 3), 0.005)
    for output, frame in ((sure, 1), (other, 2)):
        output[0, :, 0] = 0.99
        output[0, frame, 0], output[0, frame, 1] = 0.005, 0.99
    known = {"enc_lens": torch.tensor([4]), "blank_id": 0, "beam": 1}
    outputs = [output.log() for output in (sure, other)]
    ends = [CtcPrefixScorer(log_probs=log_probs, **known) for log_probs in (*outputs, log_mean_prob(outputs))]
    scores = []
    for scorer in ends:
        state = scorer.start()
        one = scorer.extend(state, torch.tensor([0]), torch.tensor([1]))
        scores.append((float(scorer.score(one)[1]), float(scorer.score(state)[1])))
    apart = [sum(values) / 2 for values in zip(*scores[:2], strict=True)]
    assert apart[0] > apart[1] + 3.0  # the token, not nothing
    assert scores[2][0] - scores[2][1] < 1.5  # their mean is hardly surer than a coin


def test_teacher_forcing_agrees_with_the_steps(batch):
    both = Ensemble([make_model(1), make_model(2)]).eval()
    tokens = torch.tensor([[VOCAB - 1, 3, 4]] * 3)
    with torch.inference_mode():
        enc, lens = both.encode(*batch)
        whole = both.decoder(tokens, torch.tensor([3, 3, 3]), enc, lens)
        state = both.decoder.start(enc, lens, beam=1)
        for position in range(3):
            log_probs, state = both.decoder.step(tokens[:, position], state)
            torch.testing.assert_close(whole[:, position], log_probs)


def test_no_member_is_held_twice(batch):
    a, b = make_model(1), make_model(2)
    expected = sum(p.numel() for m in (a, b) for p in m.parameters())
    assert sum(p.numel() for p in Ensemble([a, b]).parameters()) == expected


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"vocab": 7}, "9 and 7 tokens"),
        ({"layers": 0, "overrides": ("ctc_weight=1.0",)}, "attention and none"),
        ({"overrides": ("decoder.type=mask_ctc",)}, "attention and mask_ctc"),
    ],
)
def test_members_that_do_not_fit_are_named_with_the_difference(other, words):
    with pytest.raises(ConfigError, match=f"models 1 and 2 of the ensemble .*{words}"):
        Ensemble([make_model(1), make_model(2, **other)])


def test_members_with_another_subsampling_are_refused_where_frames_differ(batch):
    other = make_model(2, overrides=("encoder.subsampling.factor=6",))
    with pytest.raises(ConfigError, match="same subsampling"):
        Ensemble([make_model(1), other]).encode(*batch)


def test_the_mean_of_impossible_is_impossible_and_of_equal_is_the_same():
    x = torch.tensor([0.1, 0.7, -80.0, -math.inf]).sub(1.0)
    assert torch.equal(log_mean_prob([x, x, x]), x)
    y = torch.tensor([-math.inf, -math.inf])
    assert torch.equal(log_mean_prob([y, torch.zeros(2)]), torch.full((2,), 0.5).log())


def test_coverage_counts_the_frames_that_the_members_look_at_on_average(batch):
    a, b = make_model(1), make_model(2)
    twice, alone, mixed = (decode_batch(model, *batch, COVERING) for model in (Ensemble([a, a]), a, Ensemble([a, b])))
    for (found,), (expected,), (both,) in zip(twice, alone, mixed, strict=True):
        assert found.tokens == expected.tokens and found.coverage == expected.coverage and both.coverage is not None
