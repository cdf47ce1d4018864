"""Configuration: every mistake a user can make in YAML is refused before any work, with file, line and the nearest name."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speechtx.config.errors import ConfigError
from speechtx.config.load import config_hash, dump_config, load_config, parse_config
from speechtx.config.schema import DecodeConfig, FbankConfig, TrainConfig

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
        ("{shape: gaussian}", "sigma (in encoder frames) is required"),
        ("{shape: log, sigma: 3.0}", "has no meaning for the others"),
        ("{shape: window}", "needs window"),
        ("{shape: none, window: 3}", "takes no window"),
        ("{shape: log, scale: alibi}", "goes with shape linear"),
        ("{shape: gaussian, sigma: 2.0, scale: 2.0}", "use sigma"),
    ],
)
def test_impossible_penalty_is_refused(penalty: str, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_config(f"model:\n  attention_penalty:\n    encoder_self: {penalty}\n", TrainConfig, source="f.yaml")
    assert expected in str(error.value)
    assert str(error.value).startswith("f.yaml:")


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
