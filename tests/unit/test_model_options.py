"""The options that are off by default: each is one line of YAML, trains, decodes, and minds padding, whatever else is chosen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from toy_corpus import make_training_data, tiny_config

from speechtx.config.errors import ConfigError
from speechtx.config.load import parse_config
from speechtx.config.schema import ModelConfig, TrainConfig
from speechtx.experiment.experiment import Experiment
from speechtx.model.norm import MaskedBatchNorm
from speechtx.model.recognizer import Recognizer
from speechtx.training import trainer as trainer_module
from speechtx.training.averaging import average_checkpoints
from speechtx.training.checkpoint import load_checkpoint
from speechtx.training.prepare import TrainingData
from speechtx.training.train import train

BASE = """\
encoder: {layers: 2, dim: 16, heads: 2, ff_dim: 32, conv_kernel: 5, subsampling: {channels: 4}}
decoder: {layers: 1, heads: 2, ff_dim: 32}
attention_penalty: {encoder_self: {shape: log}}
"""
OPTIONS = [
    "encoder.position=sinusoidal_concatenated",
    "encoder.position=none",
    "encoder.position=rotary",
    "encoder.position=relative",
    "encoder.norm=batch",
    "encoder.attention_weights=relu",
    "encoder.subsampling.attention_2d={modules: 2, channels: 3}",
    "decoder.position=sinusoidal_concatenated",
    "decoder.position=none",
    "decoder.position=rotary",
    # restricted self-attention: each frame sees the three before and the three behind it
    "attention_penalty.encoder_self={shape: window, window: 3}",
]
# The options meet in the same layers: one of them with several others.
TOGETHER = [
    "encoder.position=relative encoder.attention_weights=relu encoder.norm=batch",
    "encoder.position=rotary encoder.attention_weights=relu decoder.position=rotary",
]
LENS = torch.tensor([80, 61, 70, 31])


def make_model(options: str, kind: str = "transformer") -> Recognizer:
    settings = [f"encoder.type={kind}", *(options.split() if "{" not in options else [options])]
    config = parse_config(BASE, ModelConfig, settings)
    torch.manual_seed(0)
    return Recognizer(config=config, num_mel_bins=20, vocab_size=12)


def make_batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 11, (4, 5), generator=generator)
    return torch.randn(4, 80, 20, generator=generator), LENS, tokens, torch.tensor([5, 2, 4, 3])


@pytest.mark.parametrize("kind", ["transformer", "conformer"])
@pytest.mark.parametrize("options", OPTIONS + TOGETHER)
def test_the_loss_falls_and_every_parameter_takes_part(options: str, kind: str) -> None:
    model, batch = make_model(options, kind), make_batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(*batch).total
        loss.backward()
        losses.append(loss.item())
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
        optimizer.step()
    assert all((p.grad != 0).any() for p in model.parameters())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("kind", ["transformer", "conformer"])
@pytest.mark.parametrize("options", OPTIONS + TOGETHER)
@torch.no_grad()
def test_an_utterance_does_not_depend_on_its_batch_or_its_padding_and_twice_is_the_same(options: str, kind: str) -> None:
    model, (feats, lens, *_) = make_model(options, kind), make_batch()
    model(*make_batch())  # running statistics, where there are any, become something
    model.eval()
    wider = torch.cat((feats, 10 * torch.randn(4, 23, 20)), dim=1)
    enc_out, enc_lens = model.encode(wider, lens)
    assert torch.equal(enc_out, model.encode(wider, lens)[0])
    for row, length in enumerate(lens.tolist()):
        alone, _ = model.encode(feats[row : row + 1, :length], lens[row : row + 1])
        torch.testing.assert_close(enc_out[row, : enc_lens[row]], alone[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", OPTIONS + TOGETHER)
def test_an_utterance_too_short_for_one_frame_harms_nobody(options: str) -> None:
    model = make_model(options, "conformer")
    enc_out, enc_lens = model.encode(torch.randn(2, 40, 20), torch.tensor([40, 3]))
    assert enc_lens.tolist() == [9, 0] and torch.isfinite(enc_out).all()
    enc_out.sum().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.encoder.parameters())


@pytest.mark.parametrize("options", OPTIONS[:7] + TOGETHER)
def test_bfloat16_autocast_stays_near_float32_and_trains(options: str) -> None:
    model, batch = make_model(options, "conformer"), make_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(*batch).total.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    model.eval()
    with torch.no_grad():
        exact, _ = model.encode(*batch[:2])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded, _ = model.encode(*batch[:2])
    assert (rounded[0].float() - exact[0]).abs().mean() < 0.05


@pytest.mark.parametrize("kind", ["transformer", "conformer"])
@pytest.mark.parametrize("options", OPTIONS)
def test_shapes_can_be_checked_without_memory(options: str, kind: str) -> None:
    with torch.device("meta"):
        model = make_model(options, kind)
        enc_out, enc_lens = model.encode(torch.empty(2, 80, 20), torch.empty(2, dtype=torch.int64))
    assert enc_out.shape == (2, 19, 16) and enc_lens.shape == (2,)


@pytest.mark.parametrize("position", ["sinusoidal", "sinusoidal_concatenated", "none", "rotary"])
@torch.no_grad()
def test_step_by_step_decoding_equals_teacher_forcing(position: str) -> None:
    model = make_model(f"decoder.position={position}").eval()
    assert model.decoder is not None
    enc_out, enc_lens = model.encode(*make_batch()[:2])
    tokens = torch.randint(12, (4 * 2, 7))
    state = model.decoder.start(enc_out, enc_lens, beam=2)
    stepped = []
    for step in range(7):
        log_probs, state = model.decoder.step(tokens[:, step], state)
        stepped.append(log_probs)
    lens = torch.full((8,), 7)
    logits = model.decoder(tokens, lens, enc_out.repeat_interleave(2, 0), enc_lens.repeat_interleave(2))
    torch.testing.assert_close(torch.stack(stepped, 1), logits.log_softmax(-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_changes_what_is_computed(option: str) -> None:
    batch = make_batch()
    with torch.no_grad():
        assert make_model(option).eval()(*batch).total != make_model("").eval()(*batch).total


def test_rotary_and_relative_encoders_tell_the_order_of_frames_and_none_leaves_it_to_the_convolutions() -> None:
    for position in ("none", "rotary", "relative"):
        model = make_model(f"encoder.position={position}").eval()
        layer = model.encoder.layers[0]
        x, order = torch.randn(1, 9, 16), torch.randperm(9, generator=torch.Generator().manual_seed(1))
        mask = torch.ones(1, 9, dtype=torch.bool)
        same = torch.allclose(layer(x, bias=None, mask=mask)[:, order], layer(x[:, order], bias=None, mask=mask), atol=1e-5)
        assert same == (position == "none")


def test_batch_norm_is_in_the_encoders_blocks_only() -> None:
    model = make_model("encoder.norm=batch", "conformer")
    batch = {name for name, module in model.named_modules() if isinstance(module, MaskedBatchNorm)}
    layer = {name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    assert all(name.startswith("encoder.layers.") for name in batch) and len(batch) == 2 * 6
    assert "encoder.norm" in layer and not any(name.startswith("encoder.layers.") for name in layer)


def test_a_batch_norm_model_is_a_function_of_valid_frames_in_training_too() -> None:
    one, other, batch = *(make_model("encoder.norm=batch", "conformer") for _ in range(2)), make_batch()
    for model in (one, other):
        for module in model.modules():
            if hasattr(module, "p"):
                module.p = 0.0
    wider = torch.cat((batch[0], 10 * torch.randn(4, 23, 20)), dim=1)
    torch.testing.assert_close(one(*batch).total, other(wider, *batch[1:]).total, atol=1e-4, rtol=0)
    for name, value in one.named_buffers():
        torch.testing.assert_close(value, other.get_buffer(name), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("encoder: {position: alibi}", "model.encoder.position: 'alibi' is not"),
        ("decoder: {position: relative}", "model.decoder.position: 'relative' is not"),
        ("encoder: {norm: group}", "model.encoder.norm: 'group' is not"),
        ("encoder: {attention_weights: sigmoid}", "model.encoder.attention_weights: 'sigmoid' is not"),
        ("encoder: {subsampling: {attention_2d: 2}}", "model.encoder.subsampling.attention_2d: "),
        ("encoder: {subsampling: {attention_2d: {modules: -1}}}", "attention_2d.modules: input should be greater than or equal"),
        (
            "encoder: {position: relative}\n  attention_penalty: {encoder_self: {shape: gaussian, sigma: 3.0}, backend: fold}",
            "use auto or eager or sdpa",
        ),
        (
            "encoder: {attention_weights: relu}\n  attention_penalty: {encoder_self: {shape: log}, backend: sdpa}",
            "use auto or eager",
        ),
        ("encoder: {attention_weights: relu}\n  attention_penalty: {preset: additive_after_softmax}", "apply: after_softmax"),
        ("encoder: {dim: 20, heads: 4, position: rotary}\n  decoder: {heads: 2}", "dim / heads is 5"),
        ("encoder: {dim: 20, heads: 2}\n  decoder: {heads: 4, position: rotary}", "encoder.dim / decoder.heads is 5"),
    ],
)
def test_an_impossible_option_is_refused_with_its_place(text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_config(f"model:\n  {text}\n", TrainConfig, source="f.yaml")
    assert str(error.value).startswith("f.yaml:") and expected in str(error.value)


# ------------------------------------------------------------------------------------------------ the whole


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    return make_training_data(tmp_path_factory.mktemp("toy"), num_train=6, num_dev=2)


@pytest.mark.parametrize("option", [*OPTIONS[:7], OPTIONS[9]])
def test_an_option_goes_from_yaml_through_training_to_an_averaged_model(option: str, data: TrainingData, tmp_path: Path) -> None:
    config = tiny_config(f"model.{option}", "training.epochs=1")
    train(config, data, tmp_path / "exp")
    average_checkpoints(tmp_path / "exp", config.training.average)
    model = Experiment.open(tmp_path / "exp").load_model()
    feats, lens = torch.randn(2, 60, 12), torch.tensor([60, 40])
    assert torch.isfinite(model.ctc_log_probs(model.encode(feats, lens)[0])).all()


def test_killed_and_continued_training_with_batch_norm_ends_with_the_same_bits(
    data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config("model.encoder.norm=batch", "training.checkpoint_minutes=1e-9")
    train(config, data, tmp_path / "straight")
    original = trainer_module.Trainer.train_step

    def dying(self, *args):
        if self.step >= 2:
            raise KeyboardInterrupt
        original(self, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer_module.Trainer, "train_step", dying)
        train(config, data, tmp_path / "killed")
    train(config, data, tmp_path / "killed")
    states = [load_checkpoint(tmp_path / name / "checkpoints") for name in ("straight", "killed")]
    straight, killed = (state["model"] for state in states if state is not None)
    assert any("running_mean" in name and (value != 0).any() for name, value in straight.items())
    assert straight.keys() == killed.keys() and all(torch.equal(straight[name], killed[name]) for name in straight)
