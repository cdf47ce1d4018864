"""Several processes of one training on this machine; on several hosts they are started by torchrun or Slurm instead."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from speechtx.config.errors import TrainingError
from speechtx.config.schema import TrainingConfig
from speechtx.data.kaldi_table import read_table

POLL_SECONDS = 0.1
GRACE_SECONDS = 3.0  # from the first failure to the end of the others, who may be about to say what it is
LAST_LINES = 20
ERROR = "speechtx train: error: "  # how `speechtx.bin.main` begins
MOST_PROCESSES = 4  # that --procs 0 starts; each has the model, its optimiser and a loader in memory
LEAST_UTTERANCES = 2  # of a step, for each of them


def processes_that_pay(train: Path, config: TrainingConfig) -> int:
    """How many processes should share the batches of each step on this machine's processors.

    Two processes of one thread take steps faster than one process of two threads, which waits for itself after every small
    operation; but each needs enough of a step to work on.

    Args:
        train: the training data directory, after stage 2.
        config: how large batches and steps are.

    Raises:
        DataError: utt2num_frames is missing or malformed.
    """
    lengths = [int(frames) for frames in read_table(train / "utt2num_frames", check_entries=True).values()]
    usable = [frames for frames in lengths if config.min_frames <= frames <= config.max_frames]
    if not usable:  # training will say what is wrong
        return 1
    utterances = config.accum_steps * min(config.max_utts_per_batch, config.frames_per_batch / statistics.mean(usable))
    return max(1, min(len(os.sched_getaffinity(0)), MOST_PROCESSES, int(utterances) // LEAST_UTTERANCES))


def launch(command: Sequence[str], *, processes: int, log_dir: Path) -> None:
    """Runs `command` in several processes, who find each other by the variables that torchrun sets, until all are done.

    The first one's progress is shown; errors of process N, and what others print, are in `log_dir/train.N.log`.

    Args:
        command: of each process.
        processes: how many; the machine's processors are divided among them unless OMP_NUM_THREADS says otherwise.
        log_dir: made if it is not there.

    Raises:
        TrainingError: one failed, and the others were ended; the message is its error, or its exit status and its last lines.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    logs = [log_dir / f"train.{rank}.log" for rank in range(processes)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(_terminated_like_interrupted())
        port, ranks = _free_port(), []
        try:
            for rank, log in enumerate(logs):
                stream = stack.enter_context(log.open("w", encoding="utf-8"))
                shown = None if rank == 0 else stream
                environment = _environment(rank, processes, port)
                ranks.append(subprocess.Popen(command, env=environment, stdout=shown, stderr=stream))
            failed = _wait(ranks)
        finally:
            _end(ranks)
    if failed is None:
        sys.stderr.write(logs[0].read_text(encoding="utf-8", errors="replace"))  # warnings
        return
    for log in logs:
        text = log.read_text(encoding="utf-8", errors="replace")
        if ERROR in text:
            raise TrainingError(text.rpartition(ERROR)[2].strip())
    tail = "\n  ".join(logs[failed].read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:])
    raise TrainingError(
        f"process {failed} of {processes} ended with {_describe(ranks[failed].returncode)}, and the others were ended; run the "
        f"same command again to continue from the newest checkpoint. The end of {logs[failed]}:\n  {tail or '(empty)'}"
    )


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Waits for all; the first that failed, if one did."""
    while True:
        codes = [process.poll() for process in ranks]
        for rank, code in enumerate(codes):
            if code:
                return rank
        if all(code == 0 for code in codes):
            return None
        time.sleep(POLL_SECONDS)


def _end(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """Lets the others say what they have to say, and ends them."""
    for end in (lambda process: None, subprocess.Popen.terminate, subprocess.Popen.kill):
        for process in ranks:
            if process.poll() is None:
                end(process)
        deadline = time.monotonic() + GRACE_SECONDS
        while any(process.poll() is None for process in ranks) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)


def _environment(rank: int, processes: int, port: int) -> dict[str, str]:
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    ours = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    # The loopback interface: gloo would look for the one that the host's name leads to, which many a laptop's does not.
    defaults = {"OMP_NUM_THREADS": str(threads), "GLOO_SOCKET_IFNAME": socket.if_indextoname(1)}
    return {**defaults, **os.environ, **{name: str(value) for name, value in ours.items()}}


def _describe(code: int) -> str:
    if code < 0:
        return f"signal {signal.Signals(-code).name}" + (" (out of memory?)" if -code == signal.SIGKILL else "")
    return f"exit status {code}"


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """Ends the block by an exception when SIGTERM comes, so that no process is left alone."""

    def stop(*_: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
