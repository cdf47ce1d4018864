"""The benchmark runs, and compares things that compute the same."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks import attention, kernels, memory, side_by_side


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_a_quick_run_writes_every_table_and_the_plot(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(memory, "memory_in_new_process", memory.peak_memory)  # each new process imports PyTorch
    attention.main(["--quick", "--out", str(tmp_path)])
    text = (tmp_path / "attention.md").read_text(encoding="utf-8")
    assert text.count("\n## ") == len(attention.MEASURE)
    assert text.splitlines()[2].startswith("`python -m benchmarks.attention --quick")
    assert ("not measured" in text) is not torch.cuda.is_available()
    assert "nan" not in text
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")
    assert "Machine: " in capsys.readouterr().out


def test_candidates_of_one_table_compute_the_same_gradients() -> None:
    torch.manual_seed(0)
    gradients = {name: run() for name, run in kernels.alone_candidates(2, 40).items()}  # shorter than the window
    # Each candidate draws its own output gradient, so only one drawn for all can be compared.
    q, k, v = attention.qkv(2, 200)
    dense, blocks = attention.window_bias(200), attention.block_bias()
    torch.testing.assert_close(
        attention.attend(q, k, v, bias=dense), attention.attend(q, k, v, bias=blocks), atol=1e-5, rtol=1e-5
    )
    assert all(len(values) == 3 and all(g.isfinite().all() for g in values) for values in gradients.values())


@pytest.mark.parametrize("step", [1, 3])
def test_the_loop_of_bands_builds_the_staircase_that_a_table_by_offset_builds_at_once(step: int) -> None:
    site = attention.AttentionPenalty(attention.PenaltyConfig(shape="linear", step=step), num_layers=1, num_heads=1)
    torch.testing.assert_close(attention.band_loop((17, 17), step=step), attention.dense_self_bias(site.by_offset(0, 17))[0, 0])


def test_a_ratio_is_that_of_runs_side_by_side_so_drift_does_not_change_it() -> None:
    assert side_by_side.ratio({"a": [2.0, 20.0, 200.0], "b": [1.0, 10.0, 100.0]}, "a", "b") == 2.0


def test_memory_of_the_dense_bias_is_counted() -> None:
    growth = memory.peak_memory("sdpa", 2000, 1)
    assert math.isfinite(growth) and growth > 2000 * 2000 * 4 / 2**20


@pytest.mark.parametrize("row", ["sdpa", "fold"])
def test_the_code_of_the_gpu_table_runs(row: str) -> None:
    assert float(attention.backend_ratio(row, 48, side_by_side.QUICK, device="cpu", dtype=torch.float32)) > 0
