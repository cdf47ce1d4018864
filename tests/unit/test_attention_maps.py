from __future__ import annotations

from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from speechtx.config.errors import ExperimentError
from speechtx.config.schema import EncoderConfig, PenaltyConfig, SubsamplingConfig
from speechtx.model.encoder import Encoder
from speechtx.report.attention_maps import encoder_maps, mean_distance, plot_maps, prior


def make_encoder(penalty: PenaltyConfig, kind: str = "transformer") -> Encoder:
    torch.manual_seed(0)
    config = EncoderConfig(type=kind, layers=2, dim=16, heads=2, ff_dim=32, subsampling=SubsamplingConfig(channels=4))
    return Encoder(config=config, penalty=penalty, num_mel_bins=20).eval()


@pytest.mark.parametrize("kind", ["transformer", "conformer"])
def test_a_window_shows_in_the_trained_map_and_not_in_the_other(kind: str) -> None:
    encoder = make_encoder(PenaltyConfig(shape="window", window=3), kind)
    maps = encoder_maps(encoder, torch.randn(80, 20))
    distance = (torch.arange(19)[:, None] - torch.arange(19)[None, :]).abs()
    assert [m.layer for m in maps] == [1, 2]
    for layer in maps:
        assert layer.trained.shape == layer.without.shape == (2, 19, 19)
        assert (layer.trained[:, distance > 3] == 0).all() and (layer.without[:, distance > 3] > 0).all()
        for weights in (layer.trained, layer.without):
            torch.testing.assert_close(weights.sum(-1), torch.ones(2, 19))
        assert (mean_distance(layer.trained) < mean_distance(layer.without)).all()


def test_looking_at_a_model_leaves_no_hook_and_changes_nothing() -> None:
    encoder = make_encoder(PenaltyConfig(shape="log"))
    feats, lens = torch.randn(1, 80, 20), torch.tensor([80])
    before = encoder(feats, lens)[0]
    encoder_maps(encoder, feats[0], [2])
    assert torch.equal(encoder(feats, lens)[0], before)
    assert not any(module._forward_pre_hooks for module in encoder.modules())


def test_a_model_without_penalty_has_one_map_and_a_flat_prior() -> None:
    (layer,) = encoder_maps(make_encoder(PenaltyConfig()), torch.randn(80, 20), [1])
    assert layer.without is None
    torch.testing.assert_close(prior(PenaltyConfig(), 10, 2), torch.full((1, 10), 0.1))


def test_the_prior_of_log_falls_as_one_over_one_plus_distance() -> None:
    curve = prior(PenaltyConfig(shape="log"), 11, 2)[0]
    assert curve.sum().item() == pytest.approx(1.0) and curve.argmax() == 5
    assert (curve[5] / curve[8]).item() == pytest.approx(4.0)


def test_mean_distance_counts_frames_between_query_and_key() -> None:
    next_frame = torch.eye(6).roll(1, dims=1)  # query i looks at key i + 1, the last one at key 0
    weights = torch.stack((torch.eye(6), next_frame, (torch.eye(6) + next_frame) / 2))
    torch.testing.assert_close(mean_distance(weights), torch.tensor([0.0, 10 / 6, 5 / 6]))


def test_a_layer_that_does_not_exist_is_named() -> None:
    with pytest.raises(ExperimentError, match=r"\[3\] do not exist.*1 to 2"):
        encoder_maps(make_encoder(PenaltyConfig()), torch.randn(80, 20), [1, 3])


@pytest.mark.parametrize("penalty", [PenaltyConfig(), PenaltyConfig(shape="linear", scale="alibi")], ids=["none", "alibi"])
def test_the_picture_is_a_png_with_something_in_it(tmp_path: Path, penalty: PenaltyConfig) -> None:
    encoder = make_encoder(penalty)
    maps = encoder_maps(encoder, torch.randn(80, 20))
    plot_maps(maps, penalty, title="utt: HELLO", frame_seconds=0.04, out=tmp_path / "utt.png")
    pixels = imread(tmp_path / "utt.png")
    assert min(pixels.shape[:2]) > 300 and pixels[..., :3].std() > 0.05
