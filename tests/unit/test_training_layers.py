"""Layers that are compiled or computed again give the same training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from toy_corpus import make_training_data, tiny_config

from speechtx.config.errors import ConfigError
from speechtx.model.recognizer import Recognizer
from speechtx.training import layers
from speechtx.training.checkpoint import load_checkpoint
from speechtx.training.prepare import TrainingData
from speechtx.training.train import train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    return make_training_data(tmp_path_factory.mktemp("toy"))


def test_layers_that_are_computed_again_give_the_same_weights_to_the_bit(data: TrainingData, tmp_path: Path) -> None:
    states = []
    for again in ("false", "true"):
        exp = tmp_path / again
        train(tiny_config("training.epochs=1", f"training.gradient_checkpointing={again}"), data, exp)
        states.append(load_checkpoint(exp / "checkpoints")["model"])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_layers_keep_only_their_inputs_when_they_are_computed_again() -> None:
    def kept_bytes(again: bool) -> int:
        layer = torch.nn.Sequential(torch.nn.Linear(8, 800), torch.nn.ReLU(), torch.nn.Linear(800, 8))
        if again:
            layers.recompute_layers([layer])
        sizes: list[int] = []
        with saved_tensors_hooks(lambda x: (sizes.append(x.nbytes), x)[1], lambda x: x):
            layer(torch.randn(100, 8, requires_grad=True))
        return sum(sizes)

    assert kept_bytes(again=True) < kept_bytes(again=False) / 10


def test_statistics_over_the_batch_would_count_it_twice() -> None:
    with pytest.raises(ConfigError, match="count each batch twice"):
        tiny_config("model.encoder.norm=batch", "training.gradient_checkpointing=true")


def test_compiled_layers_compute_the_same_and_are_not_compiled_again_for_another_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a backend that runs the traced graph as it is; what a real one makes of it is PyTorch's business."""
    from torch._dynamo.utils import counters

    original = layers.compile_layers
    monkeypatch.setattr(layers, "compile_layers", lambda parts: original(parts, backend="eager"))
    config = tiny_config(
        "model.encoder.layers=9",
        "model.encoder.dropout=0",
        "model.decoder.dropout=0",
        "training.compile=true",
        "training.gradient_checkpointing=true",
    )
    torch.manual_seed(0)
    model = Recognizer(config=config.model, num_mel_bins=12, vocab_size=9).train()
    batches = [
        (torch.randn(3, frames, 12), torch.tensor([frames, 60, 50]), torch.randint(1, 8, (3, 5)), torch.tensor([5, 4, 3]))
        for frames in (80, 104)
    ]

    def gradients() -> list[list[torch.Tensor]]:
        found = []
        for batch in batches:
            torch.manual_seed(1)
            found.append(list(torch.autograd.grad(model(*batch).total, list(model.parameters()))))
        return found

    plain = gradients()
    layers.set_up_layers(model, config.training)
    counters.clear()
    torch.testing.assert_close(gradients(), plain)
    assert 0 < counters["stats"]["unique_graphs"] <= 4, "one for all encoder layers, one for the decoder's, of one or two ranks"
