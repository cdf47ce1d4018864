"""Training as real processes: killed without warning and started again, and shared between two."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from toy_corpus import REGULARISERS, TINY, make_training_data

from speechtx.experiment.experiment import Experiment
from speechtx.training.checkpoint import load_checkpoint
from speechtx.training.distributed import World
from speechtx.training.monitor import Monitor
from speechtx.training.prepare import TrainingData, build_corpora
from speechtx.training.trainer import Trainer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    return make_training_data(tmp_path_factory.mktemp("toy"))


def command(data: TrainingData, exp: Path, *overrides: str, torchrun: int = 1, procs: int = 1) -> list[str]:
    config = exp.parent / "train.yaml"
    config.write_text(TINY)
    start = [sys.executable, "-m"]
    if torchrun > 1:
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(torchrun), "-m"]
    paths = ["--train", str(data.train), "--dev", str(data.dev), "--tokenizer", str(data.tokenizer), "--exp", str(exp)]
    sets = [word for override in overrides for word in ("--set", override)]
    return [*start, "speechtx.bin.main", "train", "--config", str(config), *paths, *sets, "--procs", str(procs)]


def model_of(exp: Path) -> dict[str, torch.Tensor]:
    state = load_checkpoint(exp / "checkpoints")
    assert state is not None
    return state["model"]


def test_kill_9_at_random_moments_ends_with_the_same_bits(data: TrainingData, tmp_path: Path) -> None:
    overrides = ("training.epochs=20", "training.checkpoint_minutes=1e-9")
    subprocess.run(command(data, tmp_path / "straight", *overrides), check=True, capture_output=True)
    exp = tmp_path / "killed"
    rng = random.Random(1)
    kills = 0
    while kills < 2:
        process = subprocess.Popen(command(data, exp, *overrides), stdout=subprocess.DEVNULL, start_new_session=True)
        before = (exp / "checkpoints" / "last.pt").stat().st_mtime_ns if (exp / "checkpoints" / "last.pt").exists() else 0
        while process.poll() is None:  # let it get past its first new checkpoint, then hit at a random moment
            path = exp / "checkpoints" / "last.pt"
            if path.exists() and path.stat().st_mtime_ns > before:
                break
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.3))
        if process.poll() is not None:
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills, "the training ended before it could be killed: make it longer"
    subprocess.run(command(data, exp, *overrides), check=True, capture_output=True)
    straight, killed = model_of(tmp_path / "straight"), model_of(exp)
    assert straight.keys() == killed.keys()
    assert all(torch.equal(straight[name], killed[name]) for name in straight)


@pytest.mark.parametrize("overrides", [[], REGULARISERS], ids=["plain", "with every regulariser"])
def test_two_processes_compute_what_one_does_with_the_same_global_batch(
    data: TrainingData, tmp_path: Path, overrides: list[str]
) -> None:
    subprocess.run(command(data, tmp_path / "one", "training.accum_steps=2", *overrides), check=True, capture_output=True)
    subprocess.run(command(data, tmp_path / "two", *overrides, torchrun=2), check=True, capture_output=True)
    losses = []
    for name in ("one", "two"):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([value for line in lines for part in ("train", "dev") for value in json.loads(line)[part].values()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5, abs=1e-5)
    assert json.loads((tmp_path / "two" / "run.json").read_text())["processes"] == 2


def losses_of(exp: Path) -> list[float]:
    lines = (exp / "metrics.jsonl").read_text().splitlines()
    return [value for line in lines for part in ("train", "dev") for value in json.loads(line)[part].values()]


NO_DROPOUT = [f"model.{part}dropout=0" for site in ("encoder", "decoder") for part in (f"{site}.", f"{site}.positional_")]


def test_processes_that_share_batches_take_the_steps_of_one_and_training_moves_between_them(
    data: TrainingData, tmp_path: Path
) -> None:
    """Dropout is off: which of its random numbers a frame gets depends on the process that computes it."""
    subprocess.run(command(data, tmp_path / "one", "training.epochs=3", *NO_DROPOUT), check=True, capture_output=True)
    moved = tmp_path / "moved"
    for epochs, procs in ((1, 0), (2, 1), (3, 2)):
        subprocess.run(
            command(data, moved, f"training.epochs={epochs}", *NO_DROPOUT, procs=procs), check=True, capture_output=True
        )
    assert losses_of(tmp_path / "one") == pytest.approx(losses_of(moved), rel=1e-5, abs=1e-5)
    chosen = min(2, len(os.sched_getaffinity(0)))  # a batch has utterances for two
    assert json.loads((moved / "run.json").read_text())["processes"] == chosen
    assert (moved / "log" / "train.1.log").is_file()


def test_processes_that_have_whole_batches_draw_what_one_draws(data: TrainingData, tmp_path: Path) -> None:
    """A batch's random numbers are those of its place in the step, whichever process computes it; dropout is on."""
    even = ["training.frames_per_batch=100000", "training.max_utts_per_batch=6"]  # four batches, none of which is left over
    regularised = ["training.epochs=2", "training.accum_steps=2", *even, *REGULARISERS]
    subprocess.run(command(data, tmp_path / "one", *regularised), check=True, capture_output=True)
    subprocess.run(command(data, tmp_path / "two", *regularised, procs=2), check=True, capture_output=True)
    assert losses_of(tmp_path / "one") == pytest.approx(losses_of(tmp_path / "two"), rel=1e-5, abs=1e-5)


def test_a_killed_process_ends_the_job_at_once_and_is_named(data: TrainingData, tmp_path: Path) -> None:
    exp = tmp_path / "exp"
    job = subprocess.Popen(
        command(data, exp, "training.epochs=100000", procs=2), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while not (exp / "checkpoints" / "last.pt").exists():
        assert job.poll() is None, "the training ended by itself"
        time.sleep(0.1)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    second = next(pid for pid in children if b"RANK=1\0" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes())
    os.kill(int(second), signal.SIGKILL)
    _, errors = job.communicate(timeout=60)
    assert job.returncode == 1
    assert "process 1 of 2 ended with signal SIGKILL" in errors and "Traceback" not in errors
    assert not any(Path(f"/proc/{pid}").exists() for pid in children), "a process was left alone"


def test_an_error_of_several_processes_is_printed_once(data: TrainingData, tmp_path: Path) -> None:
    done = subprocess.run(
        command(data, tmp_path / "exp", "training.max_frames=20", procs=2), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert done.stderr.count("none of 24 utterances can be used") == 1
    assert done.stderr.startswith("speechtx train: error: ")


def test_two_processes_with_batch_norm_judge_the_model_that_is_saved(data: TrainingData, tmp_path: Path) -> None:
    """Each process gathers running statistics of its own batches, but only one model is kept."""
    exp = tmp_path / "exp"
    subprocess.run(
        command(data, exp, "model.encoder.norm=batch", "training.epochs=1", torchrun=2), check=True, capture_output=True
    )
    opened = Experiment.open(exp)
    train, dev, _ = build_corpora(exp, data, opened.config)
    trainer = Trainer(
        config=opened.config,
        model=opened.new_model(),
        train=train,
        dev=dev,
        exp=exp,
        world=World(rank=0, size=1, device=torch.device("cpu")),
        monitor=Monitor(exp=exp, epochs=1, enabled=False),
    )
    trainer.resume()
    assert trainer.evaluate() == pytest.approx(trainer.history[0]["dev"], rel=1e-5)


def test_a_rank_that_fails_ends_the_job(data: TrainingData, tmp_path: Path) -> None:
    done = subprocess.run(
        command(data, tmp_path / "exp", "training.max_frames=20", torchrun=2), capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    assert "none of 24 utterances can be used" in done.stderr
