"""Several processes of one job: they find each other, end together, and the error that is shown is the one that matters."""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path

import pytest
import torch

from speechtx.config.errors import DataError, TrainingError
from speechtx.config.schema import TrainingConfig
from speechtx.training import launch as launch_module
from speechtx.training.distributed import World
from speechtx.training.launch import launch, processes_that_pay


def python(code: str) -> list[str]:
    return [sys.executable, "-c", f"import os, sys, time\nrank = int(os.environ['RANK'])\n{code}"]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_module, "GRACE_SECONDS", 0.5)


def test_processes_get_what_they_need_to_find_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"]
    code = f"open(r'{tmp_path}/' + str(rank), 'w').write(' '.join(os.environ[n] for n in {names}))"
    launch(python(code), processes=3, log_dir=tmp_path / "log")
    found = [(tmp_path / str(rank)).read_text().split() for rank in range(3)]
    assert [row[:4] for row in found] == [[str(rank), str(rank), "3", "127.0.0.1"] for rank in range(3)]
    assert len({row[4] for row in found}) == 1 and all(int(row[5]) >= 1 for row in found)


def test_processes_find_each_other_where_the_hosts_name_leads_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    code = f"open(r'{tmp_path}/name', 'w').write(os.environ['GLOO_SOCKET_IFNAME']) if rank == 0 else None"
    launch(python(code), processes=2, log_dir=tmp_path / "log")
    assert (tmp_path / "name").read_text() in ("lo", "lo0")
    assert (tmp_path / "name").read_text() in [name for _, name in socket.if_nameindex()]


@pytest.mark.parametrize(
    ("processors", "frames_per_batch", "expected"),
    [(1, 2000, 1), (2, 2000, 2), (8, 16000, 4), (8, 1300, 3), (8, 450, 1), (8, 400, 1)],
    ids=["one core", "two", "never more than four", "two utterances each", "batches of two", "batches of one or two"],
)
def test_as_many_processes_as_processors_and_batches_can_feed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processors: int, frames_per_batch: int, expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(processors)))
    (tmp_path / "utt2num_frames").write_text("a 100\nb 300\nc 200\nd 4\ne 9000\n")  # two are never trained on
    config = TrainingConfig(frames_per_batch=frames_per_batch, max_frames=400)
    assert processes_that_pay(tmp_path, config) == expected


def test_a_length_that_is_no_number_is_named_before_any_process_starts(tmp_path: Path) -> None:
    (tmp_path / "utt2num_frames").write_text("a 100\nb many\n")
    with pytest.raises(DataError, match=r"utt2num_frames:2: "):
        processes_that_pay(tmp_path, TrainingConfig())


def test_one_that_cannot_be_started_leaves_none_behind(tmp_path: Path) -> None:
    (tmp_path / "train.1.log").mkdir()  # the first process runs when the log of the second cannot be opened
    written = tmp_path / "pid"
    with pytest.raises(IsADirectoryError):
        launch(
            ["sh", "-c", f"echo $$ >'{written}.new'; mv '{written}.new' '{written}'; exec sleep 60"],
            processes=2,
            log_dir=tmp_path,
        )
    deadline = time.monotonic() + 2.0
    while not written.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    with pytest.raises((ProcessLookupError, FileNotFoundError)):  # or it was ended before it could write
        os.kill(int(written.read_text()), 0)


def test_one_that_fails_ends_the_others_and_its_last_lines_are_shown(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(
        TrainingError, match=r"process 1 of 2 ended with exit status 7, and the others(.|\n)*train\.1\.log:\n  last words"
    ):
        launch(python("if rank == 0: time.sleep(60)\nprint('last words'); sys.exit(7)"), processes=2, log_dir=tmp_path)
    assert time.monotonic() - started < 30


def test_one_that_is_killed_is_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"process 0 of 2 ended with signal SIGKILL \(out of memory\?\)"):
        launch(python("os.kill(os.getpid(), 9) if rank == 0 else time.sleep(60)"), processes=2, log_dir=tmp_path)


def test_an_error_that_one_explains_is_shown_instead_of_what_the_others_say_of_it(tmp_path: Path) -> None:
    code = "sys.stderr.write('speechtx train: error: no disk\\n' if rank == 1 else 'Connection closed by peer\\n'); sys.exit(1)"
    with pytest.raises(TrainingError, match=r"^no disk$"):
        launch(python(code), processes=2, log_dir=tmp_path)


def test_one_that_does_not_want_to_end_is_killed(tmp_path: Path) -> None:
    ready = str(tmp_path / "ready")
    code = f"""import signal
if rank == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    open({ready!r}, "w").close()
    time.sleep(60)
while not os.path.exists({ready!r}):
    time.sleep(0.05)
sys.exit(3)"""
    with pytest.raises(TrainingError, match="exit status 3"):
        launch(python(code), processes=2, log_dir=tmp_path / "log")


def test_shares_of_a_step_are_complete_and_disjoint() -> None:
    batches = [[0, 1, 2], [3], [4, 5]]

    def shares(share_batches: bool) -> list[list[list[int]]]:
        worlds = [World(rank=r, size=2, device=torch.device("cpu"), share_batches=share_batches) for r in (0, 1)]
        return [world.share_of(batches) for world in worlds]

    assert shares(False) == [[[0, 1, 2], [4, 5]], [[3]]]
    assert shares(True) == [[[0, 1, 2], [4]], [[3], [5]]]  # the first two are dealt out, the third is split
    batches.pop()
    assert shares(True) == [[[0, 1, 2]], [[3]]]
    batches.pop()
    assert shares(True) == [[[0, 2]], [[1]]]


def test_a_batch_is_split_only_where_a_step_has_fewer_batches_than_processes() -> None:
    together, apart = (World(rank=0, size=3, device=torch.device("cpu"), share_batches=share) for share in (True, False))
    assert [together.parts_of_batch(steps) for steps in (1, 2, 3, 4)] == [3, 3, 1, 1]
    assert apart.parts_of_batch(1) == 1
