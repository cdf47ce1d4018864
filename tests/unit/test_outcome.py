"""Reading losses a step late changes nothing but when they are known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from toy_corpus import make_training_data, tiny_config

from speechtx.config.errors import TrainingError
from speechtx.config.schema import OptimizerConfig
from speechtx.training import trainer as trainer_module
from speechtx.training.checkpoint import load_checkpoint
from speechtx.training.optim import build_optimizer
from speechtx.training.outcome import Outcomes
from speechtx.training.prepare import TrainingData
from speechtx.training.train import train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    return make_training_data(tmp_path_factory.mktemp("toy"))


def read_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    monkeypatch.setattr(trainer_module, "Outcomes", lambda device: Outcomes(device, late=1))


def test_outcomes_come_in_order_as_late_as_they_may_and_all_of_them() -> None:
    queue = Outcomes(CPU, late=1)
    sent = [[o.step for o in queue.send(step, [], torch.tensor(1.0), torch.zeros(2))] for step in (1, 2, 3)]
    assert sent == [[], [1], [2]]
    assert [o.step for o in queue.flush()] == [3] and not list(queue.flush())
    assert [o.norm for o in Outcomes(CPU).send(1, [], torch.tensor(2.0), torch.zeros(2))] == [2.0], "a CPU has them at once"


def test_a_training_that_reads_late_ends_with_the_same_bits_and_losses(
    data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config("training.checkpoint_minutes=1e-9", "training.ema.decay=0.9")
    train(config, data, tmp_path / "at once")
    read_late(monkeypatch)
    train(config, data, tmp_path / "late")
    states, lines = [], []
    for name in ("at once", "late"):
        states.append(load_checkpoint(tmp_path / name / "checkpoints"))
        entries = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        lines.append([(e["train"], e["dev"]) for e in entries])
    assert lines[0] == lines[1]
    assert all(torch.equal(states[0]["model"][name], states[1]["model"][name]) for name in states[0]["model"])


def test_steps_that_are_not_finite_are_named_when_read_late(
    data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_late(monkeypatch)
    wild = ("training.optimizer.lr=1e30", "training.max_nonfinite_steps=1", "training.schedule.warmup_steps=0")
    with pytest.raises(TrainingError, match=r"step 3: 2 steps had a non-finite gradient"):
        train(tiny_config(*wild), data, tmp_path / "exp")
    assert "warning: step 2: gradient is not finite, step skipped (1 so far)" in (tmp_path / "exp" / "train.log").read_text()


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_the_optimiser_leaves_everything_alone_in_a_step_that_is_not_finite(name: str) -> None:
    layer = torch.nn.Linear(3, 3)
    optimizer = build_optimizer(layer, OptimizerConfig(name=name, weight_decay=0.1), CPU)
    for found, gradient in ((0.0, 1.0), (1.0, float("nan"))):
        for parameter in layer.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        before = [p.clone() for p in layer.parameters()]
        moments = [state["exp_avg"].clone() for state in optimizer.state.values()]
        optimizer.found_inf = torch.tensor(found)  # type: ignore[attr-defined]
        optimizer.step()
        same = [torch.equal(old, new) for old, new in zip(before, layer.parameters(), strict=True)]
        assert same == [bool(found)] * 2
    assert all(torch.equal(m, state["exp_avg"]) for m, state in zip(moments, optimizer.state.values(), strict=True))
    assert {float(state["step"]) for state in optimizer.state.values()} == {1.0}


class Killed(BaseException):
    """Stands for a kill: nothing in the program may catch it."""


def test_resuming_stays_exact_with_every_option_of_the_engine(
    data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed with a step's outcome still on its way: it is in the checkpoint before it, or computed again."""
    read_late(monkeypatch)
    config = tiny_config(
        "training.checkpoint_minutes=1e-9",
        "training.gradient_checkpointing=true",
        "training.accum_steps=2",
        "model.encoder.subsampling={type: conv1d, factor: 6, channels: 8}",
    )
    train(config, data, tmp_path / "straight")
    original = trainer_module.Trainer.train_step

    def dying(self, *args):
        if self.step >= 3:
            raise Killed
        original(self, *args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(trainer_module.Trainer, "train_step", dying)
        train(config, data, tmp_path / "killed")
    train(config, data, tmp_path / "killed", profile=1)  # which must not be noticed either
    train(config, data, tmp_path / "killed")
    straight, killed = (load_checkpoint(tmp_path / name / "checkpoints") for name in ("straight", "killed"))
    assert all(torch.equal(straight["model"][name], killed["model"][name]) for name in straight["model"])
    assert [e["train"] for e in straight["history"]] == [e["train"] for e in killed["history"]]
