"""Training: it learns, resumes exactly, refuses what would waste hours, and averages what it says."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_corpus import REGULARISERS, WORDS_AND_PHONES, make_training_data, tiny_config, write_lexicon, write_words

from speechtx.config.errors import DataError, ExperimentError, SpeechtxError, TrainingError
from speechtx.config.schema import AverageConfig, OptimizerConfig, ScheduleConfig
from speechtx.data.ark import ArkWriter, read_matrix
from speechtx.data.manifest import load_manifest
from speechtx.experiment.experiment import Experiment
from speechtx.training import distributed, prepare
from speechtx.training import trainer as trainer_module
from speechtx.training.averaging import average_checkpoints, choose_epochs, epoch_path
from speechtx.training.checkpoint import load_checkpoint, save_checkpoint
from speechtx.training.optim import build_optimizer, learning_rate
from speechtx.training.prepare import TrainingData, only_one_training
from speechtx.training.train import train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    return make_training_data(tmp_path_factory.mktemp("toy"))


def weights(exp: Path) -> dict[str, torch.Tensor]:
    state = load_checkpoint(exp / "checkpoints")
    assert state is not None
    averaged = {f"averaged {name}": value for name, value in (state["ema"] or {}).items()}
    return {**state["model"], **averaged}


def history(exp: Path) -> list[dict]:
    return [json.loads(line) for line in (exp / "metrics.jsonl").read_text().splitlines()]


class Killed(BaseException):
    """Stands for a kill: nothing in the program may catch it."""


def kill_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    original = trainer_module.Trainer.train_step

    def dying(self, *args):
        if self.step >= steps:
            raise Killed
        original(self, *args)

    monkeypatch.setattr(trainer_module.Trainer, "train_step", dying)


def copied(data: TrainingData, train_dir: Path) -> TrainingData:
    """The same data with a training directory of its own, to be broken."""
    train_dir.mkdir()
    for path in data.train.iterdir():
        (train_dir / path.name).write_bytes(path.read_bytes())
    return TrainingData(train=train_dir, dev=data.dev, tokenizer=data.tokenizer)


# ------------------------------------------------------------------------------------------------ the whole


def test_a_tiny_model_learns_and_the_experiment_can_be_opened_again(data: TrainingData, tmp_path: Path) -> None:
    exp = tmp_path / "exp"
    train(tiny_config("training.epochs=12", "training.specaugment=null"), data, exp)
    losses = [e["train"]["loss"] for e in history(exp)]
    assert losses[-1] < 0.7 * losses[0]
    assert average_checkpoints(exp, AverageConfig(num=2, by="dev_acc")) == sorted(
        choose_epochs(history(exp), AverageConfig(num=2))
    )
    model = Experiment.open(exp).load_model()
    assert not model.training
    run = json.loads((exp / "run.json").read_text())
    assert run["num_parameters"] == sum(p.numel() for p in model.parameters())
    assert run["train_seconds"] > 0
    assert "epoch 12/12" in (exp / "train.log").read_text()


@pytest.mark.parametrize(
    ("steps", "overrides"),
    [(1, []), (4, []), (7, []), (4, REGULARISERS), (6, WORDS_AND_PHONES), (4, ["model.decoder.type=mask_ctc"])],
    ids=["1", "4", "7", "4-with-every-regulariser", "6-with-joined-words-and-phones", "4-mask-ctc"],
)
def test_killed_and_continued_training_ends_with_the_same_bits(
    data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int, overrides: list[str]
) -> None:
    if overrides is WORDS_AND_PHONES:
        words, lexicon = write_words(data.train, tmp_path / "words"), write_lexicon(tmp_path / "lexicon.txt")
        overrides = [*overrides, f"training.join.words={words}", f"model.intermediate_ctc.lexicon={lexicon}"]
    config = tiny_config(
        "training.checkpoint_minutes=1e-9", "training.accum_steps=2", "training.frames_per_batch=400", *overrides
    )
    train(config, data, tmp_path / "straight")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, steps)
        train(config, data, tmp_path / "killed")
    for _ in range(2):  # the second call finds it finished
        train(config, data, tmp_path / "killed")
    straight, killed = weights(tmp_path / "straight"), weights(tmp_path / "killed")
    assert straight.keys() == killed.keys()
    assert all(torch.equal(straight[name], killed[name]) for name in straight)
    timeless = [[{**e, "seconds": 0, "frames_per_second": 0} for e in history(tmp_path / exp)] for exp in ("straight", "killed")]
    assert timeless[0] == timeless[1]
    continued = json.loads((tmp_path / "killed" / "run.json").read_text())["continued"]
    assert [how.rsplit(" ", 1)[1] for how in continued] == [prepare.git_hash()]


def test_more_loader_processes_change_nothing(data: TrainingData, tmp_path: Path) -> None:
    words = write_words(data.train, tmp_path / "words")
    for workers in (0, 2):
        config = tiny_config(f"training.join.words={words}", f"training.loader_workers={workers}")
        train(config, data, tmp_path / str(workers))
    alone, helped = weights(tmp_path / "0"), weights(tmp_path / "2")
    assert all(torch.equal(alone[name], helped[name]) for name in alone)


def test_a_finished_training_can_be_prolonged(data: TrainingData, tmp_path: Path) -> None:
    train(tiny_config("training.epochs=1"), data, tmp_path / "exp")
    train(tiny_config("training.epochs=3"), data, tmp_path / "exp")
    assert [e["epoch"] for e in history(tmp_path / "exp")] == [1, 2, 3]


def test_a_cosine_schedule_cannot_be_prolonged_and_says_why(data: TrainingData, tmp_path: Path) -> None:
    cosine = "training.schedule.name=cosine"
    train(tiny_config("training.epochs=1", cosine), data, tmp_path / "exp")
    with pytest.raises(TrainingError, match="a cosine schedule ends with the last epoch, so it cannot be prolonged"):
        train(tiny_config("training.epochs=3", cosine), data, tmp_path / "exp")


def test_only_epochs_that_averaging_may_choose_stay_on_disk(data: TrainingData, tmp_path: Path) -> None:
    exp = tmp_path / "exp"
    train(tiny_config("training.epochs=5"), data, exp)
    kept = {path.name for path in (exp / "checkpoints").glob("epoch-*.pt")}
    chosen = choose_epochs(history(exp), AverageConfig(num=2, by="dev_acc"))
    assert kept == {epoch_path(exp, epoch).name for epoch in chosen}


def test_an_epoch_whose_dev_loss_is_not_a_number_is_the_worst() -> None:
    losses = [float("nan"), 2.0, float("nan"), 1.0, float("inf")]
    history = [{"epoch": number, "dev": {"acc": 0.0, "loss": loss}} for number, loss in enumerate(losses, start=1)]
    assert choose_epochs(history, AverageConfig(num=3, by="dev_loss")) == [4, 2, 5]


# ------------------------------------------------------------------------------------------------ refusals


def test_another_configuration_in_the_same_directory_is_refused_by_name(data: TrainingData, tmp_path: Path) -> None:
    train(tiny_config("training.epochs=1"), data, tmp_path / "exp")
    with pytest.raises(TrainingError, match=r"another configuration \(model\.encoder\.ff_dim, seed\)"):
        train(tiny_config("model.encoder.ff_dim=48", "seed=2"), data, tmp_path / "exp")


def test_features_of_another_kind_in_dev_are_refused(data: TrainingData, tmp_path: Path) -> None:
    dev = tmp_path / "dev"
    dev.mkdir()
    for path in data.dev.iterdir():
        (dev / path.name).write_bytes(path.read_bytes())
    (dev / "fbank.yaml").write_text((dev / "fbank.yaml").read_text().replace("low_freq: 20.0", "low_freq: 60.0"))
    with pytest.raises(DataError, match=r"low_freq 20\.0 against 60\.0"):
        train(tiny_config(), TrainingData(train=data.train, dev=dev, tokenizer=data.tokenizer), tmp_path / "exp")


def test_utterances_that_ctc_cannot_emit_are_listed_with_the_numbers(data: TrainingData, tmp_path: Path) -> None:
    broken = tmp_path / "train"
    broken.mkdir()
    for path in data.train.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    lines = (broken / "text").read_text().splitlines()
    key = lines[0].split()[0]
    lines[0] = key + 35 * " A"
    (broken / "text").write_text("".join(line + "\n" for line in lines))
    exp = tmp_path / "exp"
    train(tiny_config("training.epochs=1"), TrainingData(train=broken, dev=data.dev, tokenizer=data.tokenizer), exp)
    report = (exp / "left_out_train.txt").read_text()
    assert report.startswith(f"{key} ")
    assert "encoder frames, but CTC needs" in report
    assert "1 left out" in (exp / "train.log").read_text()


def test_nothing_left_to_train_on_is_an_error(data: TrainingData, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="none of 24 utterances can be used"):
        train(tiny_config("training.max_frames=20"), data, tmp_path / "exp")


def test_non_finite_steps_are_counted_named_and_fatal_past_the_limit(data: TrainingData, tmp_path: Path) -> None:
    exp = tmp_path / "exp"
    with pytest.raises(TrainingError, match=r"2 steps had a non-finite gradient, more than training\.max_nonfinite_steps 1"):
        train(
            tiny_config("training.optimizer.lr=1e30", "training.max_nonfinite_steps=1", "training.schedule.warmup_steps=0"),
            data,
            exp,
        )
    assert "gradient is not finite, step skipped (1 so far); utterances s" in (exp / "train.log").read_text()


def test_features_that_changed_length_since_are_refused(data: TrainingData, tmp_path: Path) -> None:
    broken = tmp_path / "train"
    broken.mkdir()
    for path in data.train.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    table = (broken / "utt2num_frames").read_text().splitlines()
    (broken / "utt2num_frames").write_text("".join(f"{line.split()[0]} 77\n" for line in table))
    with pytest.raises(DataError, match="but utt2num_frames says 77"):
        train(
            tiny_config("training.epochs=1"), TrainingData(train=broken, dev=data.dev, tokenizer=data.tokenizer), tmp_path / "exp"
        )


def test_an_utterance_without_a_transcript_is_named(data: TrainingData, tmp_path: Path) -> None:
    broken = tmp_path / "train"
    broken.mkdir()
    for path in data.train.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    lines = (broken / "text").read_text().splitlines()
    (broken / "text").write_text("".join(line + "\n" for line in lines[1:]))
    with pytest.raises(DataError, match=rf"text: utterance {lines[0].split()[0]} of feats.scp is missing"):
        load_manifest(broken)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_feature_is_one_sentence_from_a_loader_process_too(
    data: TrainingData, tmp_path: Path, workers: int
) -> None:
    broken = copied(data, tmp_path / "train")
    (broken.train / "feats.scp").write_text((data.train / "feats.scp").read_text().replace("feats.ark:", "feats.ark:1"))
    with pytest.raises(DataError, match=r"^\S+feats\.ark:\d+: s\d-\d+: [^\n]*$"):
        train(tiny_config(f"training.loader_workers={workers}"), broken, tmp_path / "exp")


@pytest.mark.parametrize("changed", ["transcripts", "features"])
def test_an_experiment_is_not_continued_with_another_training_set(data: TrainingData, tmp_path: Path, changed: str) -> None:
    ours = copied(data, tmp_path / "train")
    train(tiny_config("training.epochs=1"), ours, tmp_path / "exp")
    if changed == "transcripts":
        first, *others = (ours.train / "text").read_text().splitlines()
        (ours.train / "text").write_text("\n".join([f"{first} A", *others]) + "\n")
    else:
        with ArkWriter(ark=ours.train / "global_cmvn.ark", scp=ours.train / "global_cmvn.scp") as writer:
            writer.write("global", 2 * read_matrix(f"{data.train / 'global_cmvn.ark'}", dtype=np.float64))
    with pytest.raises(TrainingError, match="training set"):
        train(tiny_config("training.epochs=2"), ours, tmp_path / "exp")
    assert len(history(tmp_path / "exp")) == 1


def test_a_missing_tokenizer_is_named(data: TrainingData, tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match="no such file; make the tokenizer"):
        train(tiny_config(), TrainingData(train=data.train, dev=data.dev, tokenizer=tmp_path / "none"), tmp_path / "exp")


def test_several_gpus_in_one_process_are_refused_with_the_way_to_start_them() -> None:
    with pytest.raises(TrainingError, match="torchrun --nproc-per-node 2"):
        distributed.start(2)


def test_a_training_begins_where_what_a_kill_left_of_another_still_runs_for_a_moment(tmp_path: Path) -> None:
    code = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); time.sleep(1)"
    command = [sys.executable, "-c", code, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as loader:
        assert loader.stdout is not None and loader.stdout.readline()
        with only_one_training(tmp_path):
            assert loader.wait() == 0


def test_a_second_training_in_the_same_directory_is_refused(
    data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "LOCK_SECONDS", 0.2)
    with only_one_training(tmp_path / "exp"), pytest.raises(TrainingError, match="another process is training here"):
        train(tiny_config("training.epochs=1"), data, tmp_path / "exp")
    train(tiny_config("training.epochs=1"), data, tmp_path / "exp")


# ------------------------------------------------------------------------------------------------ checkpoints


def test_what_a_kill_left_of_a_checkpoint_does_not_pile_up(data: TrainingData, tmp_path: Path) -> None:
    train(tiny_config("training.epochs=1"), data, tmp_path / "exp")
    (tmp_path / "exp" / "checkpoints" / ".last.pt.new.abc.tmp").write_bytes(b"torn")
    train(tiny_config("training.epochs=1"), data, tmp_path / "exp")
    assert not list((tmp_path / "exp" / "checkpoints").glob(".*"))


def test_a_torn_checkpoint_falls_back_to_the_previous_one_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_checkpoint(tmp_path, {"step": 1})
    save_checkpoint(tmp_path, {"step": 2})
    load_checkpoint(tmp_path)
    assert not caplog.records
    (tmp_path / "last.pt").write_bytes((tmp_path / "last.pt").read_bytes()[:100])
    state = load_checkpoint(tmp_path)
    assert state is not None
    assert state["step"] == 1
    (said,) = caplog.messages
    assert said.startswith(f"warning: {tmp_path / 'last.pt'}: ") and said.endswith("; previous.pt is taken instead")


def test_only_unreadable_checkpoints_are_an_error_that_names_them(tmp_path: Path) -> None:
    (tmp_path / "last.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(TrainingError, match=r"last\.pt"):
        load_checkpoint(tmp_path)


def test_a_checkpoint_that_would_execute_code_is_not_loaded(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return (Path(tmp_path / "executed").touch, ())

    torch.save({"format": 1, "model": Evil()}, tmp_path / "last.pt")
    with pytest.raises(TrainingError):
        load_checkpoint(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, {"step": 1})

    def full_disk(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(TrainingError, match="No space left on device"):
        save_checkpoint(tmp_path, {"step": 2})
    state = load_checkpoint(tmp_path)
    assert state is not None
    assert state["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


# ------------------------------------------------------------------------------------------------ averaging, schedule


def test_average_is_the_mean_of_the_chosen_epochs(tmp_path: Path) -> None:
    exp = tmp_path
    (exp / "checkpoints").mkdir()
    entries = [{"epoch": e, "dev": {"acc": acc, "loss": 1.0}} for e, acc in [(1, 0.2), (2, 0.9), (3, 0.4), (4, 0.8)]]
    (exp / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    for epoch in (1, 2, 3, 4):
        torch.save({"w": torch.full((3,), float(epoch))}, epoch_path(exp, epoch))
    assert average_checkpoints(exp, AverageConfig(num=2, by="dev_acc")) == [2, 4]
    assert torch.equal(torch.load(exp / "model.pt")["w"], torch.full((3,), 3.0))
    assert average_checkpoints(exp, AverageConfig(num=3, by="last")) == [2, 3, 4]
    epoch_path(exp, 4).unlink()
    with pytest.raises(ExperimentError, match="epoch-0004"):
        average_checkpoints(exp, AverageConfig(num=2, by="last"))


def test_schedules_warm_up_to_the_peak_and_fall_as_their_names_say() -> None:
    def at(name: str, step: int, progress: float = 0.0) -> float:
        return learning_rate(ScheduleConfig(name=name, warmup_steps=100, final_ratio=0.1), peak=2.0, step=step, progress=progress)

    for name in ("inverse_sqrt", "cosine", "constant"):
        assert at(name, 50) == pytest.approx(1.0)
        assert at(name, 100) == pytest.approx(2.0)
    assert at("inverse_sqrt", 400) == pytest.approx(1.0)
    assert at("cosine", 400, 1.0) == pytest.approx(0.2)
    assert at("cosine", 100, 0.25) == pytest.approx(2.0)  # no jump where a long warm-up ends
    assert at("cosine", 250, 0.625) == pytest.approx(1.1)
    assert at("constant", 10_000) == 2.0
    assert math.isfinite(learning_rate(ScheduleConfig(warmup_steps=0), peak=1.0, step=1, progress=0.0))


def test_weight_decay_spares_biases_and_norms() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    decayed, spared = build_optimizer(model, OptimizerConfig(weight_decay=0.1), torch.device("cpu")).param_groups
    assert [p.ndim for p in decayed["params"]] == [2]
    assert decayed["weight_decay"] == 0.1
    assert {p.ndim for p in spared["params"]} == {1}
    assert spared["weight_decay"] == 0.0


def test_weights_of_another_shape_are_refused(data: TrainingData, tmp_path: Path) -> None:
    exp = tmp_path / "exp"
    train(tiny_config("training.epochs=1"), data, exp)
    torch.save({"x": torch.zeros(1)}, exp / "model.pt")
    with pytest.raises(ExperimentError, match="another shape"):
        Experiment.open(exp).load_model()
    with pytest.raises(ExperimentError, match="no such weights"):
        Experiment.open(exp).load_model(exp / "nothing.pt")


def test_a_directory_that_is_no_experiment_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match=r"config\.yaml is missing"):
        Experiment.open(tmp_path)


def test_speaker_statistics_are_used_and_missed_when_absent(data: TrainingData, tmp_path: Path) -> None:
    config = tiny_config("training.epochs=1", "features.cmvn=speaker")
    train(config, data, tmp_path / "exp")
    broken = tmp_path / "train"
    broken.mkdir()
    for path in data.train.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    with ArkWriter(ark=broken / "cmvn.ark", scp=broken / "cmvn.scp") as writer:
        writer.write("s0", read_matrix(f"{data.train / 'global_cmvn.ark'}", dtype=np.float64))
    with pytest.raises(SpeechtxError, match="no CMVN statistics for speaker s1"):
        train(config, TrainingData(train=broken, dev=data.dev, tokenizer=data.tokenizer), tmp_path / "exp2")
