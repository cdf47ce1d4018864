"""The moving average of weights: the formula, what judges and decodes with it, and that training itself never sees it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from toy_corpus import make_training_data, tiny_config

from speechtx.config.errors import ConfigError
from speechtx.config.schema import AverageConfig
from speechtx.experiment.experiment import Experiment
from speechtx.training.averaging import average_checkpoints, epoch_path
from speechtx.training.ema import Ema
from speechtx.training.prepare import TrainingData
from speechtx.training.train import train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    return make_training_data(tmp_path_factory.mktemp("toy"))


def test_the_average_is_the_formula_with_the_start_soon_forgotten() -> None:
    model = torch.nn.BatchNorm1d(3)  # floating and integer buffers too
    ema = Ema(model, decay=0.6)
    expected, rng = model.weight.detach().double().clone(), torch.Generator().manual_seed(1)
    for step in range(1, 30):
        with torch.no_grad():
            model.weight.copy_(torch.randn(3, generator=rng))
            model.num_batches_tracked += 1
        ema.update(step)
        decay = min(0.6, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach().double()
    torch.testing.assert_close(ema.values["weight"].double(), expected, rtol=1e-5, atol=1e-6)
    assert ema.values["num_batches_tracked"] == 29


def test_the_model_has_the_average_inside_the_block_and_its_own_bits_behind_it() -> None:
    model = torch.nn.Linear(4, 4)
    ema, own = Ema(model, decay=0.9), model.weight.detach().clone()
    ema.values["weight"].zero_()
    with pytest.raises(KeyboardInterrupt), ema.in_place():
        assert not model.weight.any()
        raise KeyboardInterrupt
    assert torch.equal(model.weight, own)


def test_dev_judges_and_stage_5_gets_the_average_while_training_is_untouched(data: TrainingData, tmp_path: Path) -> None:
    for name, overrides in (("plain", []), ("averaged", ["training.ema.decay=0.9"])):
        train(tiny_config("training.average.num=1", "training.average.by=last", *overrides), data, tmp_path / name)
    plain, averaged = (torch.load(tmp_path / name / "checkpoints" / "last.pt") for name in ("plain", "averaged"))
    assert all(torch.equal(plain["model"][name], averaged["model"][name]) for name in plain["model"])
    assert plain["ema"] is None
    kept = torch.load(epoch_path(tmp_path / "averaged", 2))
    assert all(torch.equal(kept[name], averaged["ema"][name]) for name in kept)
    assert any(not torch.equal(kept[name], averaged["model"][name]) for name in kept)
    opened = Experiment.open(tmp_path / "averaged").load_model(tmp_path / "averaged/checkpoints/last.pt").state_dict()
    assert all(torch.equal(opened[name], averaged["ema"][name]) for name in kept), "a checkpoint is opened with what dev judged"
    histories = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("plain", "averaged")
    ]
    assert [e["train"] for e in histories[0]] == [e["train"] for e in histories[1]]
    assert all(e["dev"] != other["dev"] for e, other in zip(*histories, strict=True))
    average_checkpoints(tmp_path / "averaged", AverageConfig(num=1, by="last"))
    decoded = torch.load(tmp_path / "averaged" / "model.pt")
    assert all(torch.equal(decoded[name], averaged["ema"][name]) for name in decoded)


@pytest.mark.parametrize("decay", ["0.0", "1.0", "1.5"])
def test_a_decay_that_is_no_average_is_refused(decay: str) -> None:
    with pytest.raises(ConfigError, match=r"training\.ema\.decay"):
        tiny_config(f"training.ema.decay={decay}")
