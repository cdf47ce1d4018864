"""What a person sees of training."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from speechtx.training import monitor
from speechtx.training.monitor import LOG_EVERY_STEPS, SHOW_EVERY_SECONDS, Monitor


def test_without_a_terminal_a_long_epoch_shows_a_line_with_rate_and_eta_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(monitor.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    watch = Monitor(exp=tmp_path, epochs=2, stream=stream)
    watch.start_epoch(0)
    for index in range(1, 9):
        now[0] += SHOW_EVERY_SECONDS / 2.5  # the third step is the first one that is late enough
        averages = {"loss": 1.0, "ctc": 1.0, "att": 1.0, "acc": 0.5}
        watch.step(epoch=1, index=index, count=10, amount=1200, step=index, lr=1e-3, averages=averages)
    watch.close()
    lines = stream.getvalue().splitlines()
    assert [line.split("epoch 1/2")[1].split()[0] for line in lines] == ["3/10", "6/10"]
    assert "100 frames/s ETA 0:03:24" in lines[0]  # 17 steps of 12 s remain


def test_tensorboard_shows_steps_that_were_repeated_after_a_kill_once(tmp_path: Path) -> None:
    averages = {"loss": 1.0, "ctc": 1.0, "att": 1.0, "acc": 0.5}
    for steps in (range(1, 3 * LOG_EVERY_STEPS + 1), range(LOG_EVERY_STEPS + 10, 2 * LOG_EVERY_STEPS + 1)):
        watch = Monitor(exp=tmp_path, epochs=1, stream=io.StringIO())
        watch.start_epoch(steps[0] - 1)
        for step in steps:
            watch.step(epoch=1, index=step, count=200, amount=1, step=step, lr=1e-3, averages=averages)
        watch.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("step/loss")] == [LOG_EVERY_STEPS, 2 * LOG_EVERY_STEPS]


def test_what_the_model_logs_stands_in_the_training_log_while_training_lasts(tmp_path: Path) -> None:
    stream = io.StringIO()
    watch = Monitor(exp=tmp_path, epochs=1, stream=stream)
    logging.getLogger("speechtx.attention.backend").info("backend %s, %s", "blocks", "a window")
    watch.close()
    logging.getLogger("speechtx.attention.backend").info("nobody listens any more")
    log = (tmp_path / "train.log").read_text()
    assert log.endswith(" backend blocks, a window\n") and stream.getvalue() == log
