from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import IO

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.image import imread
from toy_corpus import make_training_data, tiny_config

from speechtx.attention.penalty import alibi_slopes
from speechtx.bin.attention import file_name
from speechtx.bin.main import main
from speechtx.config.errors import ExperimentError
from speechtx.config.load import dump_config
from speechtx.config.penalty import AttentionPenaltyConfig, CrossPenaltyConfig, PenaltyConfig, RampConfig
from speechtx.config.schema import DecoderConfig, EncoderConfig, ModelConfig, SubsamplingConfig
from speechtx.experiment.experiment import Experiment
from speechtx.model.encoder import Encoder
from speechtx.model.recognizer import Recognizer
from speechtx.report.attention_locality import EPSILON, certified_window, format_table, mass_outside, measure
from speechtx.report.attention_maps import plot_maps, prior
from speechtx.report.attention_probe import cross_maps, diagonality, encoder_maps, mean_distance, penalty_by_offset

ENCODER = EncoderConfig(type="transformer", layers=2, dim=16, heads=2, ff_dim=32, subsampling=SubsamplingConfig(channels=4))


def make_encoder(penalty: PenaltyConfig, kind: str = "transformer", backend: str = "auto") -> Encoder:
    torch.manual_seed(0)
    return Encoder(config=ENCODER.model_copy(update={"type": kind}), penalty=penalty, num_mel_bins=20, backend=backend).eval()


def distances(length: int) -> torch.Tensor:
    return (torch.arange(length)[:, None] - torch.arange(length)[None, :]).abs()


# ---------------------------------------------------------------------------------------------------- the maps


@pytest.mark.parametrize("backend", ["sdpa", "eager", "blocks"])
@pytest.mark.parametrize("kind", ["transformer", "conformer"])
def test_a_window_shows_in_the_trained_map_and_not_in_the_other(kind: str, backend: str) -> None:
    encoder = make_encoder(PenaltyConfig(shape="window", window=3), kind, backend)
    maps = encoder_maps(encoder, torch.randn(80, 20))
    assert [m.layer for m in maps] == [0, 1]
    for layer in maps:
        assert layer.without is not None and layer.trained.shape == layer.without.shape == (2, 19, 19)
        assert (layer.trained[:, distances(19) > 3] == 0).all() and (layer.without[:, distances(19) > 3] > 0).all()
        for weights in (layer.trained, layer.without):
            torch.testing.assert_close(weights.sum(-1), torch.ones(2, 19))
        assert (mean_distance(layer.trained) < mean_distance(layer.without)).all()
        assert (diagonality(layer.trained) > diagonality(layer.without)).all()


def test_a_layer_that_pays_nothing_has_one_map_and_no_prior() -> None:
    first, second = encoder_maps(make_encoder(PenaltyConfig(shape="linear", scale=0.3, layers=[1])), torch.randn(80, 20))
    assert first.without is None and first.penalty is None
    assert second.without is not None and second.penalty is not None


def test_without_and_the_penalty_make_the_trained_map() -> None:
    for layer in encoder_maps(make_encoder(PenaltyConfig(shape="log", scale=(1.0, 2.0), heads=[0, 1])), torch.randn(80, 20)):
        assert layer.without is not None and layer.penalty is not None
        paid = layer.without * torch.exp(-layer.penalty[:, distances(19) + 18])
        torch.testing.assert_close(layer.trained, paid / paid.sum(-1, keepdim=True))


def test_the_maps_of_the_mistake_after_softmax_are_what_it_computes() -> None:
    (layer,) = encoder_maps(make_encoder(PenaltyConfig(shape="linear", apply="after_softmax")), torch.randn(80, 20), [0])
    assert layer.without is not None
    lifted = layer.without - distances(19)
    lifted = lifted - lifted.min()
    torch.testing.assert_close(layer.trained, lifted / lifted.sum(-1, keepdim=True))


def test_the_greatest_logit_is_that_of_queries_and_keys_without_the_penalty() -> None:
    feats = torch.randn(80, 20)
    (free,), (charged,) = (encoder_maps(make_encoder(PenaltyConfig(shape=shape)), feats, [0]) for shape in ("none", "log"))
    assert charged.max_logit == free.max_logit
    logits = free.trained.log()
    spread = (logits.amax(-1) - logits.amin(-1)).max().item()  # of two logits of one query
    assert 0.5 * spread <= free.max_logit + 1e-5
    encoder = make_encoder(PenaltyConfig())
    with torch.no_grad():
        encoder.layers[0].attn.qkv.weight.mul_(2.0)
        encoder.layers[0].attn.qkv.bias.mul_(2.0)
    assert encoder_maps(encoder, feats, [0])[0].max_logit == pytest.approx(4.0 * free.max_logit, rel=1e-4)


@pytest.mark.parametrize("position", ["rotary", "relative"])
def test_positions_inside_the_attention_count_as_content(position: str) -> None:
    config = ENCODER.model_copy(update={"position": position})
    torch.manual_seed(0)
    encoder = Encoder(config=config, penalty=PenaltyConfig(shape="log"), num_mel_bins=20).eval()
    (layer,) = encoder_maps(encoder, torch.randn(80, 20), [0])
    assert layer.without is not None
    logits = layer.without.log()
    assert 0.5 * (logits.amax(-1) - logits.amin(-1)).max().item() <= layer.max_logit + 1e-5
    paid = layer.without / (1 + distances(19))
    torch.testing.assert_close(layer.trained, paid / paid.sum(-1, keepdim=True))


def test_relu_weights_are_measured_as_shares_and_certify_nothing() -> None:
    config = ENCODER.model_copy(update={"attention_weights": "relu"})
    torch.manual_seed(0)
    encoder = Encoder(config=config, penalty=PenaltyConfig(shape="linear", scale=0.01), num_mel_bins=20).eval()
    feats = torch.randn(400, 20)
    (row,), (layer,) = measure(encoder, [feats], [0]), encoder_maps(encoder, feats, [0])
    assert row.certified is None and "relu" in row.why
    sums = layer.trained.sum(-1)
    assert sums.max() < 0.5
    assert row.outside[16].mean == pytest.approx(
        (mass_outside(layer.trained, 16) / sums.clamp(min=1e-30)).mean().item(), rel=1e-4
    )


def test_looking_at_a_model_leaves_no_hook_and_changes_nothing() -> None:
    encoder = make_encoder(PenaltyConfig(shape="log"))
    feats, lens = torch.randn(1, 80, 20), torch.tensor([80])
    before = encoder(feats, lens)[0]
    encoder_maps(encoder, feats[0], [1])
    assert torch.equal(encoder(feats, lens)[0], before)
    assert not any(module._forward_pre_hooks for module in encoder.modules())


def test_layers_that_do_not_exist_are_named() -> None:
    with pytest.raises(ExperimentError, match=r"\[2, -1\] do not exist.*0 to 1"):
        encoder_maps(make_encoder(PenaltyConfig()), torch.randn(80, 20), [0, 2, -1])


def test_the_prior_of_log_falls_as_one_over_one_plus_distance() -> None:
    (layer,) = encoder_maps(make_encoder(PenaltyConfig(shape="log")), torch.randn(80, 20), [0])
    assert layer.penalty is not None
    curve = prior(layer.penalty)[0]
    assert len(curve) == 19 and curve.sum().item() == pytest.approx(1.0) and curve.argmax() == 9
    assert (curve[9] / curve[12]).item() == pytest.approx(4.0)


def test_the_prior_shows_which_side_is_cheaper_and_milliseconds_as_frames() -> None:
    sided = PenaltyConfig(shape="linear", symmetric=False, scale=1.0, scale_right=0.1)
    ms = PenaltyConfig(shape="linear", scale=1.0 / 40.0, unit="ms")
    left_right = prior(penalty_by_offset(make_encoder(sided).attention_penalty, 0, 9))[0]
    assert left_right[5] > left_right[3] * 2
    by_ms = penalty_by_offset(make_encoder(ms).attention_penalty, 0, 9)
    torch.testing.assert_close(by_ms[0], torch.arange(-8.0, 9.0).abs())


# ---------------------------------------------------------------------------------------------------- cross-attention


def make_recognizer(layers: int = 2, penalty: AttentionPenaltyConfig | None = None, kind: str = "attention") -> Recognizer:
    torch.manual_seed(0)
    weight = 0.3 if layers else 1.0
    config = ModelConfig(
        encoder=ENCODER,
        decoder=DecoderConfig(type=kind, layers=layers, heads=2, ff_dim=32),
        ctc_weight=weight,
        attention_penalty=penalty or AttentionPenaltyConfig(),
    )
    return Recognizer(config=config, num_mel_bins=20, vocab_size=7).eval()


def test_cross_attention_has_a_row_for_each_token_and_the_end() -> None:
    maps = cross_maps(make_recognizer(), torch.randn(80, 20), [1, 2, 3])
    assert [m.layer for m in maps] == [0, 1]
    for layer in maps:
        assert layer.trained.shape == (2, 4, 19) and layer.without is None
        torch.testing.assert_close(layer.trained.sum(-1), torch.ones(2, 4))


def test_a_query_of_cross_attention_does_not_depend_on_later_tokens() -> None:
    model, feats = make_recognizer(), torch.randn(80, 20)
    first, second = cross_maps(model, feats, [1, 2, 3]), cross_maps(model, feats, [1, 2, 5])
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one.trained[:, :3], other.trained[:, :3])
        assert not torch.allclose(one.trained[:, 3], other.trained[:, 3])


def test_a_cross_penalty_shows_in_the_trained_map_and_not_in_the_other() -> None:
    penalty = AttentionPenaltyConfig(
        cross=CrossPenaltyConfig(shape="window", window=3, axis="rate", rate=4.0, heads="all", layers=[1])
    )
    first, second = cross_maps(make_recognizer(penalty=penalty), torch.randn(80, 20), [1, 2, 3])
    assert first.without is None and second.without is not None
    centre = (4.0 * (torch.arange(4) + 0.5) - 0.5)[:, None]
    far = (torch.arange(19)[None, :] - centre).abs() > 3
    assert (second.trained[:, far] == 0).all() and (second.without[:, far] > 0).all()


def test_a_mask_ctc_decoder_has_a_row_for_each_token_and_none_for_the_end() -> None:
    model, feats = make_recognizer(kind="mask_ctc"), torch.randn(80, 20)
    for layer in cross_maps(model, feats, [1, 2, 3]):
        assert layer.trained.shape == (2, 3, 19)
    with pytest.raises(ExperimentError, match="transcript is empty"):
        cross_maps(model, feats, [])


def test_a_model_without_decoder_has_no_cross_attention_to_show() -> None:
    with pytest.raises(ExperimentError, match="no decoder"):
        cross_maps(make_recognizer(0), torch.randn(80, 20), [1])


# ---------------------------------------------------------------------------------------------------- numbers


def test_mean_distance_counts_frames_between_query_and_key() -> None:
    next_frame = torch.eye(6).roll(1, dims=1)  # query i looks at key i + 1, the last one at key 0
    weights = torch.stack((torch.eye(6), next_frame, (torch.eye(6) + next_frame) / 2))
    torch.testing.assert_close(mean_distance(weights), torch.tensor([0.0, 10 / 6, 5 / 6]))


def test_diagonality_is_one_on_the_diagonal_zero_at_the_far_ends_and_known_for_flat_attention() -> None:
    length = 400
    farthest = torch.zeros(length, length)
    farthest[torch.arange(length), torch.where(torch.arange(length) < length // 2, length - 1, 0)] = 1.0
    values = diagonality(torch.stack((torch.eye(length), farthest, torch.full((length, length), 1 / length))))
    assert values[:2].tolist() == [1.0, 0.0]
    assert values[2].item() == pytest.approx(1.25 - math.log(2.0), abs=2e-3)
    assert diagonality(torch.ones(1, 1, 1)).tolist() == [1.0]


def test_mass_outside_counts_keys_beyond_the_window_only() -> None:
    flat = torch.full((1, 10, 10), 0.1)
    assert mass_outside(flat, 9).sum() == 0
    assert mass_outside(flat, 2)[0, [0, 5]].tolist() == pytest.approx([0.7, 0.5])


def test_the_table_weighs_utterances_by_their_length_and_takes_the_greatest() -> None:
    encoder = make_encoder(PenaltyConfig(shape="log"))
    short, long = torch.randn(60, 20), torch.randn(280, 20)
    apart, together = [measure(encoder, [feats], [1])[0] for feats in (short, long)], measure(encoder, [short, long], [1])[0]
    share = 14 / (14 + 69)
    for name in ("diagonality", "diagonality_without", "mean_distance"):
        first, second = (getattr(part, name) for part in apart)
        assert getattr(together, name) == pytest.approx(share * first + (1 - share) * second)
    assert together.outside[32].mean == pytest.approx((1 - share) * apart[1].outside[32].mean) and apart[0].outside[32].max == 0
    assert together.outside[16].max == max(part.outside[16].max for part in apart)
    assert together.logit_bound == max(part.logit_bound for part in apart)
    assert (
        together.certified is None
        and "scale > 1" in together.why
        and together.diagonality > (together.diagonality_without or 1.0)
    )
    assert measure(make_encoder(PenaltyConfig()), [short])[0].diagonality_without is None
    table = format_table([together], frame_seconds=0.04)
    assert (
        "no certified window in layers 1: shape log" in table and len({line.count("|") for line in table.splitlines()[:3]}) == 1
    )


@pytest.mark.parametrize(
    "penalty",
    [
        PenaltyConfig(shape="linear", scale=(1.0, 0.25)),
        PenaltyConfig(shape="gaussian", sigma=2.0, learnable="head"),
        PenaltyConfig(shape="gaussian", sigma=80.0, unit="ms"),
    ],
    ids=["linear", "learned", "ms"],
)
def test_a_certified_window_holds_on_the_utterance_it_was_measured_on(penalty: PenaltyConfig) -> None:
    encoder, feats = make_encoder(penalty), torch.randn(2000, 20)
    (row,) = measure(encoder, [feats], [0])
    assert row.certified is not None and 4 < row.certified < 400
    (layer,) = encoder_maps(encoder, feats, [0])
    assert mass_outside(layer.trained, row.certified).max().item() <= EPSILON


def test_what_cannot_be_certified_says_why() -> None:
    half = make_encoder(PenaltyConfig(shape="linear", heads=[0])).attention_penalty
    one = make_encoder(PenaltyConfig(shape="linear", layers=[1])).attention_penalty
    ramp = make_encoder(PenaltyConfig(shape="linear", ramp=RampConfig(steps=10))).attention_penalty
    assert certified_window(half, 0, 3.0) == (None, "only heads [0] pay")
    assert certified_window(one, 0, 3.0) == (None, "this layer pays no penalty")
    assert "strength 0" in certified_window(ramp, 0, 3.0)[1]
    ramp.at_step(10)
    assert certified_window(ramp, 0, 3.0) == certified_window(one, 1, 3.0) != (None, "")


def test_the_weakest_of_alibis_slopes_decides_the_window() -> None:
    site = make_encoder(PenaltyConfig(shape="linear", scale="alibi")).attention_penalty
    weakest = make_encoder(PenaltyConfig(shape="linear", scale=alibi_slopes(2)[-1])).attention_penalty
    assert certified_window(site, 0, 3.0) == certified_window(weakest, 0, 3.0)


# ---------------------------------------------------------------------------------------------------- the verb


@pytest.mark.parametrize(
    "penalty",
    [PenaltyConfig(), PenaltyConfig(shape="linear", scale="alibi"), PenaltyConfig(shape="stripe", layers=[1])],
    ids=["none", "alibi", "one layer"],
)
def test_the_picture_is_a_png_with_something_in_it(tmp_path: Path, penalty: PenaltyConfig) -> None:
    maps = encoder_maps(make_encoder(penalty), torch.randn(80, 20))
    plot_maps(maps, title=r"utt: 5 $\x$ HELLO", frame_seconds=0.04, out=tmp_path / "utt.png")
    pixels = imread(tmp_path / "utt.png")
    assert min(pixels.shape[:2]) > 300 and pixels[..., :3].std() > 0.05


def test_the_picture_of_relu_weights_tells_the_numbers_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    save = Figure.savefig

    def note(figure: Figure, stream: IO[bytes], **options: object) -> None:
        drawn.append(figure)
        save(figure, stream, **options)

    monkeypatch.setattr(Figure, "savefig", note)
    torch.manual_seed(0)
    config = ENCODER.model_copy(update={"attention_weights": "relu"})
    encoder = Encoder(config=config, penalty=PenaltyConfig(), num_mel_bins=20).eval()
    feats = torch.randn(400, 20)
    (row,), maps = measure(encoder, [feats], [0]), encoder_maps(encoder, feats, [0])
    plot_maps(maps, title="utt", frame_seconds=0.04, out=tmp_path / "utt.png")
    (figure,) = drawn
    assert figure.subfigs[0].get_suptitle() == f"layer 0: diagonality {row.diagonality:.2f}"
    far = [float(axis.get_title().split()[-2]) for axis in figure.subfigs[0].axes]
    assert sum(far) / len(far) == pytest.approx(0.04 * row.mean_distance, abs=0.01)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An untrained model's directory, and data for it."""
    root = tmp_path_factory.mktemp("attention")
    data = make_training_data(root, num_train=8, num_dev=3)
    path = root / "exp"
    path.mkdir()
    (path / "config.yaml").write_text(dump_config(tiny_config("features.cmvn=speaker")))
    shutil.copy(data.train / "fbank.yaml", path)
    shutil.copytree(data.tokenizer, path / "tokenizer")
    torch.manual_seed(0)
    torch.save(Experiment.open(path).new_model().state_dict(), path / "model.pt")
    return path, data.dev


def test_the_verb_draws_both_kinds_of_maps(experiment: tuple[Path, Path], tmp_path: Path) -> None:
    path, data = experiment
    utterance = (data / "text").read_text().split()[0]
    assert main(["attention", str(path), "--data", str(data), utterance, "--out", str(tmp_path), "--layers", "0", "--cross"]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{utterance}.cross.png", f"{utterance}.png"]


def test_the_verb_draws_a_mask_ctc_model_and_measures_it(experiment: tuple[Path, Path], tmp_path: Path) -> None:
    path, data = experiment
    shutil.copytree(path, tmp_path / "exp")
    (tmp_path / "exp/config.yaml").write_text(dump_config(tiny_config("features.cmvn=speaker", "model.decoder.type=mask_ctc")))
    utterance = (data / "text").read_text().split()[0]
    arguments = ["attention", str(tmp_path / "exp"), "--data", str(data)]
    assert main([*arguments, utterance, "--out", str(tmp_path / "maps"), "--cross"]) == 0
    assert (tmp_path / "maps" / f"{utterance}.cross.png").is_file()
    assert main([*arguments, "--measure"]) == 0


def test_the_verb_measures_a_whole_directory_and_writes_json(
    experiment: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, data = experiment
    assert main(["attention", str(path), "--data", str(data), "--measure", "--out", str(tmp_path)]) == 0
    assert "| logit_bound |" in capsys.readouterr().out
    written = json.loads((tmp_path / "attention.json").read_text())
    assert written["utterances"] == 3 and written["frame_seconds"] == pytest.approx(0.04)
    (layer,) = written["layers"]
    assert layer["layer"] == 0 and layer["logit_bound"] > 0 and set(layer["outside"]) == {"16", "32", "64", "128"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nobody", "--out", "x"], "no utterance nobody"),
        (["--out", "x"], "name the utterances to draw"),
        (["s0-000"], "--out for the pictures"),
        (["--measure", "--cross"], "--cross draws and --measure does not"),
        (["--measure", "--layers", "1"], "layers [1] do not exist; this encoder has layers 0 to 0"),
        (["--measure", "--layers", "one"], "--layers one: expected numbers"),
    ],
)
def test_a_wrong_command_line_says_what_to_give(
    experiment: tuple[Path, Path], words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path, data = experiment
    assert main(["attention", str(path), "--data", str(data), *words]) == 1
    assert message in capsys.readouterr().err


@given(st.sets(st.text(alphabet="a/_%.2Fcros", min_size=1, max_size=9), min_size=2, max_size=6))
@example({"a/b", "a_b", "a%2Fb"})
@example({"a", "a.cross", "a%2Ecross"})
def test_no_two_utterances_share_a_picture(utterances: set[str]) -> None:
    names = [f"{file_name(utterance)}{end}" for utterance in utterances for end in (".png", ".cross.png")]
    assert len(set(names)) == len(names) and not any("/" in name for name in names)
    assert file_name("menk-an153-b") == "menk-an153-b"
