"""The whole mini recipe at smoke size, as a user runs it: killed in the middle, continued, repeated, changed."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from speechtx.bin.main import main
from speechtx.config.errors import ScoringError
from speechtx.config.penalty import PRESETS
from speechtx.scoring.sclite import find_sclite

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("mini_end_to_end"),
    pytest.mark.skipif(
        importlib.util.find_spec("espeakng_loader") is None, reason="espeakng-loader (extra `mini`) is not installed"
    ),
]

OPTIONS = ["--smoke", "--nj", "2", "--exp", "exp/tiny"]
for override in (
    "tokenizer.type=char",
    "model.encoder.type=transformer",
    "model.encoder.layers=1",
    "model.encoder.dim=32",
    "model.encoder.ff_dim=64",
    "model.encoder.subsampling.channels=8",
    "model.decoder.layers=1",
    "model.decoder.ff_dim=64",
    "training.frames_per_batch=4000",
    "training.schedule.name=inverse_sqrt",  # a cosine ends with the last epoch, so it cannot be prolonged
):
    OPTIONS += ["--set", override]
EPOCHS = 6


class Recipe:
    """A copy of egs/mini/asr1, and how to run it."""

    def __init__(self, *, path: Path) -> None:
        self.path = path
        self.exp = path / "exp/tiny"
        self.environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def start(self, *more: str, epochs: int = EPOCHS) -> subprocess.Popen[str]:
        command = ["./run.sh", *OPTIONS, "--set", f"training.epochs={epochs}", *more]
        log = (self.path / "out.log").open("w")
        return subprocess.Popen(
            command, cwd=self.path, env=self.environment, stdout=log, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )

    def run(self, *more: str, epochs: int = EPOCHS) -> dict[str, str]:
        """Runs to the end; returns what the header line of every stage says."""
        process = self.start(*more, epochs=epochs)
        try:
            status = process.wait(timeout=540)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        assert status == 0, self.output()
        return self.headers()

    def output(self) -> str:
        return (self.path / "out.log").read_text(errors="replace")

    def headers(self) -> dict[str, str]:
        return dict(re.findall(r"^\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] stage \d (\w+): (.*)$", self.output(), re.MULTILINE))


@pytest.fixture(scope="module")
def killed(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """The recipe, killed with all its processes while it trains."""
    try:
        find_sclite()
    except ScoringError as err:
        pytest.skip(f"no sclite on this machine: {err}")
    path = tmp_path_factory.mktemp("recipe") / "asr1"
    shutil.copytree(
        repo / "egs/mini/asr1", path, ignore=shutil.ignore_patterns("data", "exp", "corpus", "log", "utils", "__pycache__")
    )
    (path / "utils").symlink_to(repo / "utils")
    recipe = Recipe(path=path)
    process = recipe.start()
    metrics = recipe.exp / "metrics.jsonl"
    while not (metrics.is_file() and metrics.read_text().count("\n") >= 1):
        assert process.poll() is None, f"ended before one epoch was trained:\n{recipe.output()}"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return recipe


@pytest.fixture
def recipe(killed: Recipe) -> Recipe:
    """The recipe run to its end: by an earlier test or, for a test that runs alone, now."""
    if not (killed.exp / "RESULTS.md").is_file():
        killed.run()
    return killed


def trained_epochs(recipe: Recipe) -> int:
    return len((recipe.exp / "metrics.jsonl").read_text().splitlines())


def test_a_killed_recipe_continues_to_scores_of_sclite(killed: Recipe) -> None:
    recipe = killed
    assert not (recipe.exp / "model.pt").exists(), "it was to be killed before training ended"
    tokens = (recipe.path / "data/tokenizer/tiny/tokens.txt").stat().st_mtime_ns
    headers = recipe.run()
    assert list(headers) == ["check", "data", "fbank", "bpe", "train", "average", "decode", "score"]
    for stage in ("data", "fbank", "bpe"):
        assert headers[stage].startswith("up to date (finished 20"), stage
    assert (recipe.path / "data/tokenizer/tiny/tokens.txt").stat().st_mtime_ns == tokens
    assert headers["train"].endswith("again, because it did not finish")
    epochs = [json.loads(line)["epoch"] for line in (recipe.exp / "metrics.jsonl").read_text().splitlines()]
    assert epochs == list(range(1, EPOCHS + 1)), "every epoch once: what was trained before the kill is not trained again"
    results = (recipe.exp / "RESULTS.md").read_text()
    assert "Synthetic speech" in results
    for name in ("dev", "test"):
        folder = recipe.exp / f"decode_{name}_decode"
        references = (recipe.path / f"data/{name}/text").read_text().splitlines()
        hypotheses = (folder / "text").read_text().splitlines()
        assert [line.split()[0] for line in hypotheses] == [line.split()[0] for line in references]
        score = json.loads((folder / "score_wer/score.json").read_text())
        words = sum(len(line.split()) - 1 for line in references)
        assert re.search(rf"^\| {name} .*\| *\d+ / {words} \|", results, re.MULTILINE), results
        assert "sclite" in json.dumps(score).lower()
        assert (folder / "score_wer/result.sys").is_file()
    out = recipe.output()
    assert "| test |" in out and str(recipe.exp / "RESULTS.md") in out and str(recipe.exp / "curves.png") in out
    assert (recipe.exp / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_run_skips_every_stage(recipe: Recipe) -> None:
    before = {path: path.stat().st_mtime_ns for path in recipe.path.rglob("*") if path.is_file() and path.name != "out.log"}
    headers = recipe.run()
    for stage in ("data", "fbank", "bpe", "train", "average", "decode", "score"):
        assert headers[stage].startswith("up to date (finished 20"), (stage, headers)
    after = {path: path.stat().st_mtime_ns for path in recipe.path.rglob("*") if path.is_file() and path.name != "out.log"}
    assert after == before, "nothing was written"
    assert "| test |" in recipe.output()


def test_language_models_are_steps_of_stages_3_and_4_and_report_their_perplexity(recipe: Recipe) -> None:
    config = recipe.path / "conf/lm.yaml"
    config.write_text("ngram: {order: 3}\ntransformer:\n  layers: 1\n  dim: 16\n  ff_dim: 32\n  epochs: 1\n")
    try:
        stages = ("--stage", "bpe", "--stop-stage", "train")
        headers = recipe.run(*stages, epochs=trained_epochs(recipe))
        assert list(headers) == ["bpe", "ngram", "train", "transformer"]
        assert headers["train"].startswith("up to date"), "a language model is no reason to train the recogniser again"
        out = recipe.output()
        for kind in ("ngram", "transformer"):
            measured = json.loads((recipe.path / f"exp/lm/tiny/{kind}/perplexity.json").read_text())
            assert 1 < measured["per_token"] < measured["per_word"]
            assert f"data/dev: perplexity {measured['per_token']:.2f} a token, {measured['per_word']:.2f} a word" in out
        headers = recipe.run(*stages, epochs=trained_epochs(recipe))
        assert headers["ngram"].startswith("up to date") and headers["transformer"].startswith("up to date")
        choose_weights_on_dev(recipe)
    finally:
        config.unlink()


def choose_weights_on_dev(recipe: Recipe) -> None:
    """A decoding configuration of its own, tuned on dev with both language models; test is decoded with what came out."""
    conf = recipe.path / "conf"
    (conf / "decode_lm.yaml").write_text("beam: 3\nmax_len_ratio: 0.2\n")
    (conf / "tune_lm.yaml").write_text("lm_weight: [0.0, 0.2]\nngram_weight: [0.3]\n")
    try:
        stages = ("--stage", "decode", "--decode-config", "conf/decode_lm.yaml")
        headers = recipe.run(*stages, epochs=trained_epochs(recipe))
        assert list(headers) == ["tune", "decode", "score"]
        chosen = json.loads((recipe.exp / "tune_dev_decode_lm/tune.json").read_text())
        assert chosen["set"] == "dev" and len(chosen["points"]) == 2
        decoded = json.loads((recipe.exp / "decode_test_decode_lm/decode.json").read_text())
        assert decoded["config"] == chosen["config"] and decoded["ngram"]["path"] == "exp/lm/tiny/ngram"
        page = (recipe.exp / "RESULTS.md").read_text()
        assert re.search(r"^\| test +\| test +\| decode_lm: beam 3, CTC 0.3,.* n-gram 0.3 +\|", page, re.MULTILINE), page
        assert "The decoding weights of decode_lm were chosen on dev" in page
        headers = recipe.run(*stages, epochs=trained_epochs(recipe))
        assert all(headers[step].startswith("up to date") for step in ("tune", "decode", "score"))
    finally:
        for name in ("decode_lm.yaml", "tune_lm.yaml"):
            (conf / name).unlink()


def test_more_epochs_continue_the_training_and_score_again(recipe: Recipe) -> None:
    headers = recipe.run("--stage", "data", epochs=EPOCHS + 1)
    assert headers["bpe"].startswith("up to date")
    assert headers["train"].endswith("changed: training.epochs in conf/train.yaml")
    for stage in ("average", "decode", "score"):
        assert not headers[stage].startswith("up to date"), stage
    epochs = [json.loads(line)["epoch"] for line in (recipe.exp / "metrics.jsonl").read_text().splitlines()]
    assert epochs == list(range(1, EPOCHS + 2))
    assert not (recipe.path / "exp/tiny.old-1").exists()


def test_a_changed_decoding_configuration_only_decodes_and_scores(recipe: Recipe) -> None:
    config = recipe.path / "conf/decode.yaml"
    config.write_text(config.read_text().replace("method: beam", "method: ctc_greedy"))
    headers = recipe.run("--stage", "data", epochs=trained_epochs(recipe))
    assert headers["average"].startswith("up to date")
    assert headers["decode"].endswith("changed: method in conf/decode.yaml")
    assert "method ctc_greedy" in (recipe.exp / "RESULTS.md").read_text()


def test_another_model_trains_anew_and_keeps_the_old_experiment(recipe: Recipe) -> None:
    old = (recipe.exp / "config.yaml").read_bytes()
    headers = recipe.run("--stage", "data", "--stop-stage", "train", "--set", "model.label_smoothing=0.0", epochs=1)
    assert "model.label_smoothing in conf/train.yaml" in headers["train"]
    assert (recipe.path / "exp/tiny.old-1/config.yaml").read_bytes() == old
    assert (recipe.path / "exp/tiny.old-1/RESULTS.md").is_file()
    assert (recipe.exp / "metrics.jsonl").read_text().count("\n") == 1


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_of_the_penalty_trains_twenty_steps_and_decodes(recipe: Recipe, preset: str) -> None:
    """In one process, because starting one for each stage would take longer than the training."""
    data, exp = recipe.path / "data", recipe.path / "exp" / preset
    overrides = [option for option in OPTIONS[5:] if option != "--set"]
    overrides += [f"model.attention_penalty={{preset: {preset}}}", "training.loader_workers=0", "training.epochs=2"]
    overrides += ["training.frames_per_batch=1500", "training.max_frames=1500"]
    arguments = ["--train", data / "train", "--dev", data / "dev", "--tokenizer", data / "tokenizer/tiny", "--exp", exp]
    assert main(["train", "--config", f"{recipe.path}/conf/train.yaml", *map(str, arguments), *set_options(overrides)]) == 0
    last = json.loads((exp / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] >= 20 and all(map(math.isfinite, (last["train"]["loss"], last["dev"]["loss"])))
    assert f"preset: {preset}" in (exp / "config.yaml").read_text()
    assert main(["average", "--exp", str(exp)]) == 0
    arguments = ["--exp", exp, "--data", data / "test", "--config", recipe.path / "conf/decode.yaml", "--out", exp / "decode"]
    assert main(["decode", *map(str, arguments), "--set", "method=beam", "--set", "beam=2", "--set", "max_len_ratio=0.2"]) == 0
    assert main(["decode", "--merge", "--data", str(data / "test"), "--out", str(exp / "decode"), "--num-jobs", "1"]) == 0
    references = (data / "test/text").read_text().splitlines()
    assert len((exp / "decode/text").read_text().splitlines()) == len(references)


def set_options(overrides: list[str]) -> list[str]:
    return [word for override in overrides for word in ("--set", override)]
