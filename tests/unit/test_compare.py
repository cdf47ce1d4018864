"""`speechtx compare`: what each change of a configuration gave, over the same seeds, and nothing that cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_results import make_decoding, make_experiment

from speechtx.bin import main


def make(exp: Path, *, seed: int = 1, wrong: int = 1, config: str = "", fbank: str = "", dev: str = "dev") -> Path:
    """An experiment with `wrong` errors of 40 words on its dev set."""
    make_experiment(exp, seed=seed)
    run = json.loads((exp / "run.json").read_text())
    run["command"] = f"speechtx train --config conf/train.yaml --train data/train --dev data/{dev} --exp {exp} --seed {seed}"
    (exp / "run.json").write_text(json.dumps(run))
    (exp / "config.yaml").write_text(f"seed: {seed}\n{config}")
    (exp / "fbank.yaml").write_text(fbank)
    make_decoding(exp, "greedy", "dev", {f"v{i}": (10 - (i < wrong), int(i < wrong), 0, 0) for i in range(4)})
    return exp


def compare(*words: str | Path) -> int:
    return main.main(["compare", *map(str, words)])


def rows_of(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_seeds_are_one_row_and_a_change_is_told_by_its_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = "training:\n  specaugment: null\n  epochs: 7\n"
    exps = [make(tmp_path / f"base{seed}", seed=seed, wrong=seed) for seed in (1, 2)]
    exps += [make(tmp_path / f"wide{seed}", seed=seed, wrong=seed + 1, config=wide) for seed in (1, 2)]
    exps.append(make(tmp_path / "slow", seed=2, wrong=0, fbank="frame_shift_ms: 20.0\n"))
    assert compare(*exps, "--decoding", "greedy", "--out", tmp_path / "C.md") == 0
    rows = rows_of(capsys.readouterr().out)
    assert rows[0] == ["change", "seeds", "parameters", "hours", "greedy WER %", "against the first"]
    assert rows[2] == ["(the first)", "1 2", "1,234,567", "1.50", "3.75", ""]  # 1 and 2 errors of 40
    assert rows[3][0] == "training.epochs 7, training.specaugment null"
    assert rows[3][1:5] == ["1 2", "1,234,567", "1.50", "6.25"]
    assert rows[3][5].startswith("+2.50 (+0.00 to ")
    assert rows[4][:2] == ["fbank.frame_shift_ms 20.0", "2"]
    assert rows[4][4] == "0.00" and rows[4][5].startswith("-5.00 (")  # against seed 2 alone, which has 5.00
    page = (tmp_path / "C.md").read_text(encoding="utf-8")
    assert rows_of(page) == rows
    assert f"- {exps[0]}: seed 1, 2 epochs, git 0123456789ab, Some CPU, 2 threads" in page
    assert f"--decoding greedy --out {tmp_path / 'C.md'}" in page


def test_all_decodings_of_the_dev_set_are_compared_and_one_that_is_lacking_is_a_dash(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, other = make(tmp_path / "a"), make(tmp_path / "b", config="training:\n  epochs: 3\n")
    make_decoding(base, "lm", "dev", {"v0": (8, 1, 1, 0)})
    assert compare(base, other) == 0
    rows = rows_of(capsys.readouterr().out)
    assert rows[0][4::2] == ["decode WER %", "greedy WER %", "lm WER %"]
    assert rows[3][-2:] == ["-", ""]


def test_seeds_that_differ_give_no_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, other = make(tmp_path / "a", seed=1), make(tmp_path / "b", seed=2, config="training:\n  epochs: 3\n")
    assert compare(base, other, "--decoding", "greedy") == 0
    assert rows_of(capsys.readouterr().out)[3][-2:] == ["2.50", ""]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "a2"], "a2 have the same configuration and the same seed 1: omit one"),
        (["a", "other"], "watched on different sets, dev eval: choose one with --set"),
        (["a", "--set", "train"], "no experiment was scored on train; scored were dev test"),
        (["a", "--decoding", "beam"], "no decoding of dev is called beam; there are decode greedy"),
        (["a", "nothing"], "run.json: no such file"),
    ],
)
def test_what_cannot_be_compared_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    for name in ("a", "a2"):
        make(tmp_path / name)
    make(tmp_path / "other", config="training:\n  epochs: 3\n", dev="eval")
    given = [tmp_path / word if (tmp_path / word).is_dir() or word == "nothing" else word for word in words]
    assert compare(*given) == 1
    assert message in capsys.readouterr().err


def test_other_references_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, other = make(tmp_path / "a"), make(tmp_path / "b", config="training:\n  epochs: 3\n")
    path = other / "decode_dev_greedy" / "score_wer" / "score.json"
    path.write_text(path.read_text().replace('reference_sha256": "', 'reference_sha256": "0'))
    assert compare(base, other, "--decoding", "greedy") == 1
    assert "cannot be compared: reference_sha256" in capsys.readouterr().err
