"""The benchmark of training runs, alternates real processes, and counts what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import train as benchmark
from benchmarks.train_teams import Worker
from benchmarks.train_worker import Spec, build_speechtx, make_batch, work
from speechtx.config.load import load_config
from speechtx.config.schema import TrainConfig
from speechtx.model.recognizer import Recognizer


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


def test_a_quick_run_writes_the_page_from_processes_of_their_own(tmp_path) -> None:
    benchmark.main(["--quick", "--parts", "steps", "recipe", "front_ends", "gpu", "--out", str(tmp_path)])
    text = (tmp_path / "train.md").read_text(encoding="utf-8")
    assert text.startswith("# How fast training is\n\n`python -m benchmarks.train --quick")
    assert text.count("\n## ") == 4
    assert "| speechtx, conv1d | 12,0" in text and "nan" not in text
    assert ("not measured" in text.split("On a GPU")[1]) is not torch.cuda.is_available()


def test_the_an4_shape_is_espnets() -> None:
    with torch.device("meta"):
        sizes = {name: count(Spec("speechtx", shape, [], device="meta")) for name, shape in benchmark.SHAPES.items()}
    assert sizes == {"AN4": 27_115_580, "small": 3_103_692}


def test_the_recipes_conformer_is_the_one_that_egs_an4_trains(repo: Path) -> None:
    trained = load_config(repo / "egs/an4/asr1/conf/train.yaml", TrainConfig).model
    trained = trained.model_copy(update={"intermediate_ctc": None})  # a small output more, in training alone
    with torch.device("meta"):
        model = Recognizer(config=trained, num_mel_bins=80, vocab_size=benchmark.RECIPE.vocab)
    assert count(Spec("speechtx", benchmark.RECIPE, [], device="meta")) == sum(p.numel() for p in model.parameters())


def count(spec: Spec) -> int:
    return sum(p.numel() for p in build_speechtx(spec).model.parameters())


def test_a_worker_counts_attention_on_a_cpu_too() -> None:
    spec = Spec("speechtx", benchmark.TINY, [([40, 35], [3, 2])], 1)
    answers: list[dict] = []
    questions = iter(["flops 0\n", ""])
    with FlopCounterMode(display=False) as without:
        work(spec, lambda: next(questions), answers.append)
    assert answers[1]["flops"] > without.get_total_flops() > 0


def test_a_worker_counts_the_operations_of_a_step_and_times_its_parts() -> None:
    spec = Spec("speechtx", benchmark.TINY, [([40, 35], [3, 2])], 1)
    answers: list[dict] = []
    questions = iter(["flops 0\n", "step 0\n", ""])
    work(Spec.from_json(spec.to_json()), lambda: next(questions), answers.append)
    built, counted, step = answers
    linear = 3 * 2 * 16 * 3 * 16 * 9 * 2  # queries, keys and values of 2 x 9 frames: forward and twice that backward
    assert counted["flops"] > linear
    assert step["wall"] == pytest.approx(sum(step[part] for part in ("forward", "backward", "gradients", "optimizer")))
    assert step["peak"] > 10 and built["parameters"] == count(spec)


def test_a_worker_that_dies_says_why() -> None:
    worker = Worker(Spec("nothing", benchmark.TINY, [], 1))
    with pytest.raises(RuntimeError, match="KeyError: 'nothing'"):
        worker.hear()
    worker.close()


def test_batches_have_the_lengths_of_the_corpus_and_what_ctc_can_emit() -> None:
    batches = benchmark.an4_batches(64, 2)
    assert [len(frames) for frames, _ in batches] == [64, 64]
    assert max(batches[0][0]) < min(batches[1][0])
    assert all(2 * tokens <= frames // 4 for frames_, tokens_ in batches for frames, tokens in zip(frames_, tokens_, strict=True))


def test_padding_of_tokens_is_what_every_toolkit_ignores() -> None:
    *_, tokens, lens = make_batch(([40, 35], [3, 1]), 30, "cpu")
    assert tokens[1].tolist()[1:] == [-1, -1] and lens.tolist() == [3, 1]
    assert all(1 < token < 29 for token in tokens[0].tolist())
