"""Configuration: every mistake a user can make in YAML is refused before any work, with file, line and the nearest name."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speechtx.config.decode import DecodeConfig
from speechtx.config.errors import ConfigError
from speechtx.config.lm import LmConfig
from speechtx.config.load import config_hash, dump_config, load_config, parse_config
from speechtx.config.penalty import PRESETS
from speechtx.config.schema import FbankConfig, TrainConfig

GOOD = """\
seed: 3
model:
  encoder: {layers: 6, dim: 144}
  attention_penalty:
    encoder_self: {shape: linear, scale: [1, 2, 0.5, 1]}
training:
  optimizer: {lr: 1e-3}
"""


def test_values_are_read_and_defaults_filled_in() -> None:
    config = parse_config(GOOD, TrainConfig)
    assert config.seed == 3
    assert config.model.encoder.layers == 6
    assert config.model.attention_penalty.encoder_self.scale == (1, 2, 0.5, 1)
    assert config.training.optimizer.lr == 1e-3
    assert config.model.decoder.layers == 6


def test_dumped_configuration_reads_back_equal() -> None:
    config = parse_config(GOOD, TrainConfig)
    again = parse_config(dump_config(config), TrainConfig)
    assert again == config
    assert config_hash(again) == config_hash(config)


def test_hash_tells_configurations_apart() -> None:
    assert config_hash(parse_config(GOOD, TrainConfig)) != config_hash(parse_config(GOOD, TrainConfig, ["seed=4"]))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model:\n  encoder:\n    layer: 3\n", "f.yaml:3: model.encoder.layer: unknown key; did you mean 'layers'?"),
        ("modle: {}\n", "f.yaml:1: modle: unknown key; did you mean 'model'?"),
        ("training:\n\n  zzz: 1\n", "f.yaml:3: training.zzz: unknown key; valid keys here: epochs"),
        (
            "model:\n  encoder:\n    type: transfomer\n",
            "f.yaml:3: model.encoder.type: 'transfomer' is not 'transformer' or 'conformer'",
        ),
        ("model:\n  encoder:\n    layers: six\n", "f.yaml:3: model.encoder.layers: input should be a valid integer, found 'six'"),
        ("model:\n  encoder:\n    layers: true\n", "f.yaml:3: model.encoder.layers: input should be a valid integer, found True"),
        ("model:\n  encoder:\n    layers: 0\n", "f.yaml:3: model.encoder.layers: input should be greater than 0, found 0"),
        ("model:\n  encoder: {dim: 100, heads: 3}\n", "f.yaml:2: model.encoder: dim 100 is not divisible by heads 3"),
        ("model:\n  encoder: 5\n", "f.yaml:2: model.encoder: "),
        ("seed: 1\nseed: 2\n", "f.yaml:2: duplicate key 'seed' (first at f.yaml:1)"),
        ("a: [1\nb: 2\n", "f.yaml:2: not valid YAML"),
        ("- 1\n", "f.yaml:1: expected a mapping"),
        (
            "seed: !!python/object/apply:os.system [true]\n",
            "f.yaml:1: not valid YAML here: the tag tag:yaml.org,2002:python/object/apply:os.system",
        ),
        ("seed: !!python/name:os.system\n", "f.yaml:1: not valid YAML: could not determine a constructor"),
        ("training: {optimizer: {lr: .inf}}\n", "f.yaml:1: training.optimizer.lr: input should be a finite number"),
    ],
)
def test_mistake_is_refused_with_its_place(text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_config(text, TrainConfig, source="f.yaml")
    assert str(error.value).startswith(expected)


@pytest.mark.parametrize(
    ("penalty", "expected"),
    [
        ("{shape: logarithmic}", "'logarithmic' is not"),
        ("{shape: log, scale: -1}", "greater than or equal to 0, found -1"),
        ("{shape: log, scale: [1, 2]}", "lists 2 values, but encoder.heads is 4"),
        ("{shape: gaussian}", "sigma (in encoder frames, or in `unit`) is required"),
        ("{shape: log, sigma: 3.0}", "sigma has no meaning for shape log; use scale"),
        ("{shape: power}", "exponent is required"),
        ("{shape: bucket, learnable: head}", "give buckets, max_distance"),
        ("{shape: bucket, buckets: 32, max_distance: 128}", "learned table"),
        ("{shape: window, window: 8, learnable: head}", "nothing to learn"),
        ("{shape: none, learnable: head}", "nothing to learn"),
        ("{shape: log, scale: 2.0, window: auto}", "needs logit_bound"),
        ("{shape: log, window: auto, logit_bound: 5.0}", "impossible for shape log with a scale of at most 1"),
        ("{shape: linear, window: auto, logit_bound: 5.0, max_distance: 9}", "impossible for shape linear with max_distance 9"),
        ("{shape: linear, scale: 0.1, window: auto, logit_bound: 5.0, learnable: head}", "needs a fixed penalty"),
        ("{shape: linear, scale: 0.1, window: auto, logit_bound: 5.0, ramp: {steps: 9}}", "take the ramp away"),
        ("{shape: linear, window: 9, logit_bound: 5.0}", "only with window: auto"),
        ("{shape: log, symmetric: false}", "needs scale_right"),
        ("{shape: log, scale_right: 2.0}", "needs symmetric: false"),
        ("{shape: gaussian, sigma: 2.0, symmetric: false, scale_right: 2.0}", "scale_right has no meaning"),
        ("{shape: log, scale: [1.0, 2.0, 3.0, 4.0], learnable: layer}", "use learnable: head"),
        ("{shape: log, scale: 0.0, learnable: head}", "cannot be learned"),
        ("{shape: log, layers: 0:5}", "neither all, nor a span"),
        ("{shape: log, layers: 5-0}", "neither all, nor a span"),
        ("{shape: log, layers: [0, 12]}", "names 12, but there are 12, counted from 0"),
        ("{shape: log, heads: [4]}", "names 4, but there are 4, counted from 0"),
        ("{shape: log, heads: [1, 1]}", "names one twice"),
        ("{shape: log, heads: [0, 1], scale: [1.0, 2.0, 3.0, 4.0]}", "lists 4 values, but 2 heads are selected"),
        ("{shape: log, ramp: {from: -1.0}}", "greater than or equal to 0"),
        ("{shape: log, ramp: {form: 0.0}}", "did you mean 'from'?"),
        ("{shape: log, unit: s}", "'s' is not"),
        ("{shape: window}", "needs window"),
        ("{shape: none, window: 3}", "takes no window"),
        ("{shape: log, scale: alibi}", "goes with shape linear"),
        ("{shape: gaussian, sigma: 2.0, scale: 2.0}", "use sigma"),
        ("{shape: linear, apply: after_softmax, window: 4}", "the penalty must be finite, so there is no window"),
    ],
)
def test_impossible_penalty_is_refused(penalty: str, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_config(f"model:\n  attention_penalty:\n    encoder_self: {penalty}\n", TrainConfig, source="f.yaml")
    assert expected in str(error.value)
    assert str(error.value).startswith("f.yaml:")


@pytest.mark.parametrize(
    ("penalty", "expected"),
    [
        ("{preset: alibbi}", "did you mean 'alibi'?"),
        ("{backend: fold, encoder_self: {shape: log}}", "encoder_self: backend fold folds plain gaussian and linear"),
        ("{backend: fold, encoder_self: {shape: gaussian, sigma: 3.0, learnable: head}}", "cannot learn the strength"),
        ("{backend: blocks, encoder_self: {shape: log}}", "needs a window"),
        ("{backend: blocks, encoder_self: {shape: log, window: 8, heads: [0]}}", "backend blocks needs heads: all"),
        ("{backend: flash_attn, encoder_self: {shape: log}}", "linear penalties only"),
        ("{backend: flash_attn, encoder_self: {shape: linear, heads: [0]}}", "needs heads: all"),
        ("{backend: sdpa, encoder_self: {shape: log, apply: after_softmax}}", "use eager"),
        ("{decoder_self: {shape: log, unit: ms}}", "no meaning for tokens"),
        ("{decoder_self: {shape: log, symmetric: false, scale_right: 1.0}}", "never sees keys to the right"),
        ("{backend: blocks, decoder_self: {shape: log, window: 8}}", "decoder_self: backend blocks is not causal"),
        ("{backend: fold, decoder_self: {shape: gaussian, sigma: 3.0}}", "folds causal linear penalties only"),
        ("{cross: {shape: gaussian, sigma: 2.0, axis: rate}}", "needs rate"),
        ("{cross: {shape: gaussian, sigma: 2.0, step: 2}}", "needs integer positions"),
        ("{cross: {shape: gaussian, sigma: 2.0, unit: ms}}", "brings its own unit"),
        ("{cross: {shape: gaussian, sigma: 2.0, window: auto, logit_bound: 3.0}}", "is for self-attention"),
        ("{cross: {shape: gaussian, sigma: 2.0, axis: monotonic, round_centre: true}}", "it has no gradient"),
        ("{cross: {shape: gaussian, sigma: 2.0, axis: lower_layer, layers: [0]}}", "never charges layer 0"),
        ("{cross: {shape: gaussian, sigma: 2.0, heads: [7]}}", "names 7, but there are 4"),
    ],
)
def test_impossible_site_or_backend_is_refused_with_its_line(penalty: str, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_config(f"model:\n  attention_penalty: {penalty}\n", TrainConfig, source="f.yaml")
    assert expected in str(error.value)
    assert str(error.value).startswith("f.yaml:")


def test_cross_attention_cannot_be_measured_by_a_ctc_output_that_is_not_trained() -> None:
    text = "model: {ctc_weight: 0.0, attention_penalty: {cross: {shape: gaussian, sigma: 2.0}}}"
    with pytest.raises(ConfigError, match="which ctc_weight 0 never trains"):
        parse_config(text, TrainConfig, source="f.yaml")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_fills_its_sites_and_own_keys_win(preset: str) -> None:
    config = parse_config(f"model: {{attention_penalty: {{preset: {preset}, encoder_self: {{layers: 0-5}}}}}}", TrainConfig)
    site = config.model.attention_penalty.encoder_self
    assert site.shape == PRESETS[preset]["encoder_self"]["shape"] and site.layers == "0-5"
    assert parse_config(dump_config(config), TrainConfig) == config


def test_a_ramp_is_written_and_read_under_the_names_of_the_yaml() -> None:
    text = "model: {attention_penalty: {encoder_self: {shape: log, ramp: {from: 0.5, to: 0.0, steps: 9}}}}"
    config = parse_config(text, TrainConfig)
    assert parse_config(dump_config(config), TrainConfig) == config and "from: 0.5" in dump_config(config)
    assert config_hash(config) != config_hash(TrainConfig())


def test_a_value_of_several_types_is_reported_in_one_line() -> None:
    with pytest.raises(ConfigError) as error:
        parse_config("model: {attention_penalty: {encoder_self: {shape: log, scale: wide}}}", TrainConfig, source="f.yaml")
    assert len(str(error.value).splitlines()) == 1


def test_all_mistakes_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        parse_config("seed: -1\nmodel:\n  encoder: {dimm: 3}\n", TrainConfig, source="f.yaml")
    assert [line.split(": ")[0] for line in str(error.value).splitlines()] == ["f.yaml:1", "f.yaml:3"]


def test_override_wins_and_reads_yaml() -> None:
    config = parse_config(
        GOOD, TrainConfig, ["model.encoder.layers=2", "training.specaugment=null", "tokenizer.user_symbols=[<noise>]"]
    )
    assert config.model.encoder.layers == 2
    assert config.training.specaugment is None
    assert config.tokenizer.user_symbols == ("<noise>",)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.encoder.layer=2", "--set model.encoder.layer=2: model.encoder.layer: unknown key; did you mean 'layers'?"),
        ("epochs", "--set epochs: expected key.path=value"),
        ("=3", "--set =3: expected key.path=value"),
        ("seed.x=3", "--set seed.x=3: seed is not a section"),
        ("seed=[", "--set seed=[:1: not valid YAML"),
    ],
)
def test_wrong_override_is_refused(override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_config(GOOD, TrainConfig, [override], source="f.yaml")
    assert str(error.value).startswith(expected)


def test_what_is_wrong_in_a_section_given_by_an_override_is_blamed_on_it_and_not_on_the_file() -> None:
    with pytest.raises(ConfigError) as error:
        parse_config("model:\n  encoder:\n    layers: 3\n", TrainConfig, ["model.encoder={layers: 0}"], source="f.yaml")
    assert str(error.value).startswith("--set model.encoder={layers: 0}: model.encoder")


def test_keys_that_are_given_win_over_those_of_a_merge() -> None:
    text = "ngram: &ngram {order: 2, text: [data/a]}\nlexicon:\n  <<: *ngram\n  order: 3\n"
    config = parse_config(text, LmConfig)
    assert config.lexicon is not None and config.lexicon.order == 3 and config.lexicon.text == ("data/a",)
    with pytest.raises(ConfigError, match=r"f\.yaml:5: duplicate key 'order' \(first at f\.yaml:4\)"):
        parse_config(text + "  order: 4\n", LmConfig, source="f.yaml")


def test_missing_and_undecodable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such configuration file"):
        load_config(tmp_path / "nothing.yaml", TrainConfig)
    (tmp_path / "latin.yaml").write_bytes(b"seed: 1 # \xe9\n")
    with pytest.raises(ConfigError, match=r"latin\.yaml: cannot be read as UTF-8"):
        load_config(tmp_path / "latin.yaml", TrainConfig)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("low_freq: 8000.0", "must satisfy low < high"),
        ("high_freq: 9000.0", "must satisfy low < high"),
        ("frame_shift_ms: 30.0", "samples would be lost"),
    ],
)
def test_impossible_features_are_refused(text: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        parse_config(text, FbankConfig)


def test_nbest_beyond_the_beam_is_refused() -> None:
    with pytest.raises(ConfigError, match="nbest 5 exceeds beam 3"):
        parse_config("{beam: 3, nbest: 5}", DecodeConfig)


def test_a_frozen_configuration_cannot_be_changed() -> None:
    config = parse_config("", DecodeConfig)
    with pytest.raises(ValueError, match="frozen"):
        config.beam = 3


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=60))
def test_no_text_does_anything_but_parse_or_raise_a_configuration_error(text: str) -> None:
    with contextlib.suppress(ConfigError):
        parse_config(text, TrainConfig)


def test_a_word_that_yaml_takes_for_true_is_explained() -> None:
    with pytest.raises(ConfigError, match=r"hot_words\.0: YAML reads an unquoted yes, no, on or off as True; write it in quotes"):
        parse_config("hot_words: [YES, HELLO]", DecodeConfig)
    assert parse_config('hot_words: ["YES", HELLO]', DecodeConfig).hot_words == ("YES", "HELLO")


def test_every_tuning_configuration_can_still_be_trained_and_says_what_came_out(repo: Path) -> None:
    folder = repo / "egs/an4/asr1/conf/tuning"
    for path in folder.glob("train*.yaml"):
        load_config(path, TrainConfig)
        header = path.read_text().split("tokenizer:")[0]
        assert "dev" in header and f"--train-config conf/tuning/{path.name}" in header, path
    for path in folder.glob("fbank*.yaml"):
        load_config(path, FbankConfig)
    assert len(list(folder.glob("*.yaml"))) >= 6
