"""Memory: the worst batch is tried first and leaves no trace; running out names the batch and the way out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from toy_corpus import make_training_data, tiny_config

from speechtx.config.errors import TrainingError
from speechtx.data.manifest import load_manifest
from speechtx.training import distributed, memory, worst_batch
from speechtx.training.checkpoint import load_checkpoint
from speechtx.training.distributed import World
from speechtx.training.prepare import TrainingData
from speechtx.training.train import train
from speechtx.training.trainer import Trainer

CPU_MESSAGE = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    return make_training_data(tmp_path_factory.mktemp("toy"))


def limit_memory(
    monkeypatch: pytest.MonkeyPatch, *, padded_frames: int, error: BaseException | None = None, from_step: int = 0
) -> list[int]:
    """Lets every batch of more padded frames fail to be allocated; returns the sizes that were tried."""
    original, tried = Trainer.forward, []

    def forward(self, batch):
        if self.model.training and self.step >= from_step:
            tried.append(batch.feats.shape[0] * batch.feats.shape[1])
            if tried[-1] > padded_frames:
                raise error or RuntimeError(CPU_MESSAGE)
        return original(self, batch)

    monkeypatch.setattr(Trainer, "forward", forward)
    return tried


def test_the_scan_reports_a_peak_and_leaves_no_trace(data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config("training.epochs=1", "model.encoder.norm=batch")
    train(config, data, tmp_path / "scanned")
    log = (tmp_path / "scanned" / "train.log").read_text()
    assert "memory: " in log and "utterances padded to " in log and " GiB at their peak" in log
    monkeypatch.setattr(worst_batch, "scan", lambda trainer: None)
    train(config, data, tmp_path / "plain")
    scanned, plain = (load_checkpoint(tmp_path / name / "checkpoints")["model"] for name in ("scanned", "plain"))
    assert all(torch.equal(scanned[name], plain[name]) for name in plain)


def test_the_scan_leaves_no_layer_out_and_training_does_again(
    data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, rates = Trainer.forward, []

    def forward(self, batch):
        if self.model.training:
            rates.append(max(self.model.encoder.depth_rates))
        return original(self, batch)

    scan, scanned = worst_batch.scan, []

    def counted(trainer):
        scan(trainer)
        scanned.append(len(rates))

    monkeypatch.setattr(Trainer, "forward", forward)
    monkeypatch.setattr(worst_batch, "scan", counted)
    train(tiny_config("training.epochs=1", "model.encoder.stochastic_depth=0.5"), data, tmp_path / "exp")
    assert scanned[0] > 0 and all(rate == 0.0 for rate in rates[: scanned[0]])
    assert len(rates) > scanned[0] and all(rate == 0.5 for rate in rates[scanned[0] :])


def test_the_scan_tries_the_slowest_and_the_fastest_tempo_that_can_be_drawn(
    data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []
    monkeypatch.setattr(worst_batch, "fits", lambda trainer, batch: tried.append(batch) or True)
    config = tiny_config(
        "training.epochs=1",
        "training.perturb.tempo=0.5",
        "training.consistency.weight=0.1",
        "training.frames_per_batch=600",
        "training.max_frames=600",
    )
    train(config, data, tmp_path)
    frames = {utterance.id: utterance.num_frames for utterance in load_manifest(data.train)}
    rates = [{round(frames[key] / length, 1) for key, length in zip(b.ids, b.feat_lens.tolist(), strict=True)} for b in tried]
    assert {0.5} in rates and {1.5} in rates
    for batch in tried:
        assert batch.feats.shape[1] == batch.feat_lens.max()
        assert len(set(batch.ids)) * batch.feats.shape[1] <= 600
    assert max(batch.feats.shape[1] for batch in tried) == 2 * max(frames.values())


@pytest.mark.parametrize("tempo", [0.0, 0.5])
def test_a_batch_that_does_not_fit_is_refused_with_the_number_that_does(
    data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tempo: float
) -> None:
    config = ("training.epochs=1", "training.max_frames=150", f"training.perturb.tempo={tempo}")
    limit_memory(monkeypatch, padded_frames=300)
    with pytest.raises(TrainingError, match=r"does not fit, but \d+ of them do: set training\.frames_per_batch to") as failed:
        train(tiny_config(*config), data, tmp_path / "exp")
    fitting = int(str(failed.value).split("frames_per_batch to ")[1].split()[0])
    assert 150 <= fitting <= 300
    train(tiny_config(*config, f"training.frames_per_batch={fitting}"), data, tmp_path / "e2")


def test_processes_that_share_batches_are_advised_the_frames_of_all_of_them(
    data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(rank=0, size=2, device=torch.device("cpu"), share_batches=True)
    monkeypatch.setattr(distributed, "start", lambda ngpu, share_batches: world)
    for name in ("sum", "share", "sum_gradients", "barrier"):  # the other process is not there
        monkeypatch.setattr(World, name, lambda self, values=None: values)
    limit_memory(monkeypatch, padded_frames=300)
    config = ("training.epochs=1", "training.max_frames=150")
    with pytest.raises(TrainingError, match=r"but 3 of them do: set training\.frames_per_batch to") as failed:
        train(tiny_config(*config, "training.frames_per_batch=1600"), data, tmp_path / "exp")
    fitting = int(str(failed.value).split("frames_per_batch to ")[1].split()[0])
    assert 300 < fitting <= 600
    train(tiny_config(*config, f"training.frames_per_batch={fitting}"), data, tmp_path / "e2")


def test_one_utterance_that_does_not_fit_is_named(data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_memory(monkeypatch, padded_frames=10)
    with pytest.raises(
        TrainingError, match=r"nor does its longest utterance alone \(s\d-\d+, \d+ frames\).*training\.max_frames"
    ):
        train(tiny_config(), data, tmp_path / "exp")


@pytest.mark.parametrize(
    "error",
    [RuntimeError(CPU_MESSAGE), MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")],
    ids=["cpu", "python", "cuda"],
)
def test_running_out_of_memory_names_and_saves_the_batch(
    data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    limit_memory(monkeypatch, padded_frames=0, error=error, from_step=2)
    exp = tmp_path / "exp"
    with pytest.raises(
        TrainingError, match=r"step 3: out of memory on cpu .*What to do: lower training\.frames_per_batch"
    ) as failed:
        train(tiny_config(), data, exp)
    saved = torch.load(exp / "oom_batch.pt", weights_only=True)
    assert saved["ids"][0] in str(failed.value)
    assert f"{len(saved['ids'])} utterances padded to {saved['feats'].shape[1]} frames" in str(failed.value)
    assert saved["feats"].shape[0] == len(saved["ids"]) == len(saved["token_lens"])


def test_other_errors_of_a_step_stay_what_they_are(data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_memory(monkeypatch, padded_frames=0, error=RuntimeError("a bug"), from_step=1)
    with pytest.raises(RuntimeError, match=r"^a bug$"):
        train(tiny_config(), data, tmp_path / "exp")
    assert not (tmp_path / "exp" / "oom_batch.pt").exists()


def test_the_peak_of_memory_sees_an_allocation_and_forgets_it_when_reset() -> None:
    device = torch.device("cpu")
    memory.reset_peak(device)
    before = memory.peak_memory(device)
    block = torch.ones(30, 2**20)  # 120 MiB
    assert memory.peak_memory(device) > before + 0.1
    assert memory.peak_memory(device) < memory.total_memory(device)
    del block


def test_a_process_that_has_no_batch_has_no_worst_one() -> None:
    rows = SimpleNamespace(spans=[(5, 9)] * 5)

    class Idle:
        world = World(rank=1, size=2, device=torch.device("cpu"), share_batches=True)
        epoch = 1
        train_corpus = SimpleNamespace(at_epoch=lambda epoch: rows)

        def groups(self, lengths: list[int]) -> list[list[list[int]]]:
            assert lengths in ([5] * 5, [9] * 5)
            return [[[3]], [[4]]]

    assert worst_batch.worst_batches(Idle()) == []  # type: ignore[arg-type]
