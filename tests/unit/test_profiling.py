"""A profile accounts for the whole step, and the experiment does not notice it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from toy_corpus import make_training_data, tiny_config

from speechtx.attention.blocks import BlockBias
from speechtx.attention.kernels import attend
from speechtx.training import profiling
from speechtx.training.prepare import TrainingData
from speechtx.training.train import train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    return make_training_data(tmp_path_factory.mktemp("toy"))


def test_a_profile_accounts_for_the_step_and_leaves_the_experiment_as_it_was(data: TrainingData, tmp_path: Path) -> None:
    exp, config = tmp_path / "exp", tiny_config("training.epochs=1", "model.encoder.type=conformer")
    train(config, data, exp, profile=3)
    assert not (exp / "run.json").exists() and not (exp / "checkpoints").exists()
    found = json.loads((exp / "profile.json").read_text())
    assert found["steps"] == 3
    assert set(profiling.PHASES) < set(found["phases"])
    assert sum(found["phases"].values()) == pytest.approx(found["step"])
    assert sum(found["forward"].values()) == pytest.approx(found["phases"]["forward"])
    assert all(found["forward"][part] > 0 for part in ("front end", "encoder self-attention", "encoder convolution", "decoder"))
    assert 0.0 < found["share_of_product"] < 1.0 and 0.0 <= found["padding"] < 0.5
    page = (exp / "profile.md").read_text()
    assert "| backward |" in page and page in (exp / "train.log").read_text()
    train(config, data, exp)
    state = torch.load(exp / "checkpoints" / "last.pt", weights_only=True)["model"]
    train(config, data, tmp_path / "unprofiled")
    plain = torch.load(tmp_path / "unprofiled" / "checkpoints" / "last.pt", weights_only=True)["model"]
    assert all(torch.equal(state[name], plain[name]) for name in plain)


def test_a_finished_training_can_be_profiled(data: TrainingData, tmp_path: Path) -> None:
    train(tiny_config("training.epochs=1"), data, tmp_path / "exp")
    train(tiny_config("training.epochs=1"), data, tmp_path / "exp", profile=2)
    assert json.loads((tmp_path / "exp" / "profile.json").read_text())["steps"] == 2


@pytest.mark.parametrize("bias", ["none", "dense", "blocks"])
def test_the_products_of_attention_are_counted_on_a_cpu_too(bias: str) -> None:
    q, k, v = (torch.randn(2, 4, 48, 16, requires_grad=True) for _ in range(3))
    given = {"none": None, "dense": torch.randn(1, 1, 48, 48), "blocks": BlockBias(torch.zeros(1, 2 * 8 + 1))}[bias]
    with profiling.flop_counter() as counter:
        attend(q, k, v, bias=given).sum().backward()
    keys = 2 * 8 + 1 if bias == "blocks" else 48
    product = 2 * 2 * 4 * 48 * keys * 16  # of queries and keys, and as many of weights and values
    # backward computes the weights again, and makes four gradients
    assert counter.get_total_flops() == (2 + 5) * product


@pytest.mark.parametrize("groups", [1, 8])
def test_a_gradient_of_a_convolution_counts_as_much_as_the_convolution_with_groups_too(groups: int) -> None:
    convolution = torch.nn.Conv1d(8, 8, 5, padding=2, groups=groups)
    with profiling.flop_counter() as counter:
        convolution(torch.randn(3, 8, 40, requires_grad=True)).sum().backward()
    assert counter.get_total_flops() == 3 * (2 * 3 * 40 * 8 * 8 * 5 // groups)


def test_padding_is_the_share_of_frames_behind_the_ends_of_utterances() -> None:
    assert profiling.padding_share([10, 5, 4, 4], [[0, 1], [2, 3]]) == pytest.approx(5 / 28)
