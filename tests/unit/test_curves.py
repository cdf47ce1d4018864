from __future__ import annotations

import json
from pathlib import Path

import pytest
from matplotlib.image import imread

from speechtx.bin.main import main
from speechtx.config.errors import ExperimentError
from speechtx.report.curves import plot_curves, read_metrics


def epoch(number: int, att: float = 1.0) -> dict:
    part = {"loss": 3.0 / number, "ctc": 4.0 / number, "att": att / number, "acc": 1 - 1 / (number + 1)}
    return {"epoch": number, "step": 10 * number, "lr": 1e-3, "train": part, "dev": part, "seconds": 1.0, "grad_norm": 1.0}


def write(path: Path, epochs: list[dict]) -> Path:
    path.write_text("".join(json.dumps(e) + "\n" for e in epochs))
    return path


@pytest.mark.parametrize(("count", "att"), [(1, 1.0), (50, 0.0)])  # att 0: a model without a decoder
def test_the_picture_is_a_png_with_something_in_it(tmp_path: Path, count: int, att: float) -> None:
    write(tmp_path / "metrics.jsonl", [epoch(n, att) for n in range(1, count + 1)])
    plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    pixels = imread(tmp_path / "curves.png")
    assert pixels.shape[0] > 500 and pixels.shape[1] > 800 and pixels[..., :3].std() > 0.05
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_a_missing_empty_or_broken_file_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(ExperimentError, match=r"metrics\.jsonl: missing"):
        read_metrics(path)
    with pytest.raises(ExperimentError, match="holds no epoch"):
        read_metrics(write(path, []))
    for broken in ({"epoch": 2}, {**epoch(2), "lr": "fast"}, [1]):
        with pytest.raises(ExperimentError, match=r"metrics\.jsonl:2: not an epoch"):
            read_metrics(write(path, [epoch(1), broken]))


def test_the_verb_writes_into_the_experiment_and_fails_with_a_message(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["curves", str(tmp_path)]) == 1
    assert "metrics.jsonl: missing" in capsys.readouterr().err
    write(tmp_path / "metrics.jsonl", [epoch(1), epoch(2)])
    assert main(["curves", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "curves.png") and (tmp_path / "curves.png").is_file()
