"""The decoding benchmark runs, in one process, and what it compares is the same thing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import decode, decode_bench, decode_reference, decode_tables, decode_worker, decode_workers
from benchmarks.decode_case import Case, random_case
from speechtx.search.reference import ctc_log_prob

COMMANDS = {"load": decode_worker.load, "search": decode_worker.search, "memory": decode_worker.memory}


class InThisProcess:
    """A `Worker` without a process: each of those would import PyTorch."""

    def __init__(self, *, module: str, case: Path, threads: int = 1, python: str = "") -> None:
        self.loaded = {"case": str(case), "threads": 1}
        self.versions = COMMANDS["load"](**self.loaded)["versions"]
        self.answers: list[dict] = []

    def ask(self, command: str, **arguments: object) -> dict:
        return json.loads(json.dumps(COMMANDS[command](**arguments)))

    def send(self, command: str, **arguments: object) -> None:
        self.answers.append(self.ask(command, **arguments))

    def receive(self) -> dict:
        return self.answers.pop(0)

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        pass


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_a_quick_run_writes_every_table_with_both_sides_and_the_plot(tmp_path, monkeypatch) -> None:
    for module in (decode_bench, decode_tables):
        monkeypatch.setattr(module, "Worker", InThisProcess)
    parts = [part for part in decode.MEASURE if part != "start"]  # new processes
    decode.main(["--quick", "--espnet-python", "stands-for-it", "--out", str(tmp_path), "--parts", *parts])
    text = (tmp_path / "decode.md").read_text(encoding="utf-8")
    assert text.count("\n## ") == len(parts) + 1  # growth has two
    assert "nan" not in text and "not measured" not in text
    assert (tmp_path / "decode.png").read_bytes().startswith(b"\x89PNG")


def test_a_forced_search_takes_the_reference_s_length_whatever_the_weights(tmp_path) -> None:
    case = random_case("tiny", [(60, 4), (45, 1)])
    decode_worker.load(str(case.save(tmp_path / "case.pt")), 1)
    for config in ({"beam": 3, "ctc_weight": 0.3}, {"beam": 1, "ctc_weight": 0.0}):
        found = decode_worker.search([0, 1], config, encode=False, forced=True)
        assert [len(tokens) for tokens in found["tokens"]] == [4, 1] and found["seconds"] > 0


def test_a_case_comes_back_from_its_file_with_the_same_model(tmp_path) -> None:
    case = random_case("tiny", [(40, 2)])
    again = Case.load(str(case.save(tmp_path / "case.pt")))
    feats, lens = case.feats[0].unsqueeze(0), torch.tensor([40])
    with torch.inference_mode():
        torch.testing.assert_close(again.recognizer().encode(feats, lens)[0], case.recognizer().encode(feats, lens)[0])


def test_a_worker_answers_lines_whatever_else_it_prints_and_its_death_is_an_error(tmp_path, monkeypatch) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "doubling.py").write_text(
        "print('hello from a library')\n"
        f"import sys; sys.path.insert(0, {str(decode_workers.ROOT)!r})\n"
        "from benchmarks.decode_workers import serve\n"
        "serve({'load': lambda case, threads: {'versions': 'x'}, 'double': lambda n: {'n': 2 * n}})\n"
    )
    monkeypatch.setattr(decode_workers, "ROOT", tmp_path)
    with decode_workers.Worker(module="doubling", case=tmp_path, python=sys.executable) as worker:
        assert worker.versions == "x"
        assert worker.ask("double", n=21) == {"n": 42}
        with pytest.raises(RuntimeError, match="doubling ended with status 1"):
            worker.ask("no such command")


def test_candidates_take_turns_and_the_first_turn_does_not_count() -> None:
    calls: list[str] = []

    def candidate(name: str):
        return lambda: float(calls.append(name) or len(calls))

    times = decode_workers.take_turns({"a": candidate("a"), "b": candidate("b")}, rounds=2)
    assert calls == ["a", "b"] * 3
    assert times["a"].rounds == [3.0, 5.0] and times["b"].rounds == [4.0, 6.0]


def test_the_exponent_of_cubic_growth_is_three() -> None:
    curve = {n: decode_workers.Times([7.0 * n**3]) for n in (1, 2, 5, 40)}
    assert decode_tables.exponent(curve) == pytest.approx(3.0)


def test_the_cache_of_the_plain_search_changes_no_score() -> None:
    rng = np.random.default_rng(0)
    fast = decode_reference.CtcExtensions()
    for frames in (1, 2, 9):
        log_probs = np.log(rng.dirichlet(np.ones(4), size=frames))
        prefix: tuple[int, ...] = ()
        for label in (2, 2, 1, 3):  # one of them repeated
            for labels in (prefix, *((*prefix, extra) for extra in (1, 2, 3))):
                for is_prefix in (True, False):
                    plain = ctc_log_prob(log_probs, labels, blank_id=0, prefix=is_prefix)
                    assert fast(log_probs, labels, blank_id=0, prefix=is_prefix) == pytest.approx(plain, abs=1e-11)
            prefix = (*prefix, label)
