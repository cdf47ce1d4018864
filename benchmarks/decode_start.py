"""How long it takes from the command to the first hypothesis, in new processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import soundfile
import torch

from benchmarks.decode_bench import SPREAD, Bench
from benchmarks.decode_case import MEL_BINS, SHAPES
from benchmarks.decode_workers import ROOT, Times, take_turns
from speechtx.config.load import dump_config
from speechtx.config.schema import FbankConfig, FeaturesConfig, ModelConfig, TokenizerConfig, TrainConfig
from speechtx.data.kaldi_dir_ops import subset_data_dir
from speechtx.experiment.experiment import Experiment
from speechtx.text.tokenizer import train_tokenizer

PEER_IMPORTS = "; ".join(
    f"import {module}"
    for module in (
        "espnet2.asr.encoder.transformer_encoder",
        "espnet2.asr.decoder.transformer_decoder",
        "espnet2.asr.ctc",
        "espnet.nets.batch_beam_search",
        "espnet.nets.scorers.ctc",
    )
)


def measure_start(bench: Bench) -> None:
    """Wall and processor time of the shortest useful run."""
    exp = bench.exp or _made_up_experiment(bench.folder / "exp", SHAPES[bench.shapes[0]])
    audio = _audio(bench)
    ours = [sys.executable, "-m", "speechtx"]
    commands = {"import torch": [sys.executable, "-c", "import torch"]}
    commands["speechtx transcribe, one file"] = [*ours, "transcribe", str(exp), str(audio)]
    if bench.data is not None:
        one = bench.folder / "one"
        if not one.is_dir():
            subset_data_dir(bench.data, one, num=1, mode="first")
        commands["speechtx decode, one utterance"] = [*ours, "decode", "--exp", str(exp), "--data", str(one), "--out"]
    if bench.espnet is not None:
        commands["ESPnet2: the imports of its search alone"] = [bench.espnet, "-c", PEER_IMPORTS]
    processor: dict[str, list[float]] = {name: [] for name in commands}
    runs = {name: _run(command, processor[name], bench.folder) for name, command in commands.items()}
    times = take_turns(runs, rounds=min(bench.rounds, 5))
    goals = {name: "at most 4" if name.startswith("speechtx") else "-" for name in commands}
    goals["ESPnet2: the imports of its search alone"] = "(ESPnet2's ASR task was 11)"
    bench.report.add(
        "From the command to the end of the first hypothesis, seconds",
        ["command", "wall", "processor", "goal"],
        [[name, str(times[name]), str(Times(processor[name][1:])), goals[name]] for name in commands],
        f"New processes, files in the page cache, beam 10. Wall time means something on an idle machine only. {SPREAD}",
    )


def _run(command: Sequence[str], processor: list[float], folder: Path) -> Callable[[], float]:
    """Runs a command to its end: wall seconds; its processor seconds are appended."""

    def run() -> float:
        place = [str(folder / f"out-{time.monotonic_ns()}")] if command[-1] == "--out" else []
        before, start = os.times(), time.perf_counter()
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, *place], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
        wall, after = time.perf_counter() - start, os.times()
        processor.append(after.children_user + after.children_system - before.children_user - before.children_system)
        return wall

    return run


def _audio(bench: Bench) -> Path:
    """The data's first recording, or noise of 2.7 s."""
    if bench.data is not None and (bench.data / "wav.scp").is_file():
        line = (bench.data / "wav.scp").read_text(encoding="utf-8").split("\n", 1)[0]
        path = Path(line.split(maxsplit=1)[1])
        if path.is_file():
            return path
    path = bench.folder / "noise.wav"
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(43520), 16000)
    return path


def _made_up_experiment(path: Path, model: ModelConfig) -> Path:
    """An experiment directory with random weights."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    texts = [" ".join((letters[i:] + letters[:i], letters[: i + 1])) for i in range(len(letters))]
    train_tokenizer(texts, config=TokenizerConfig(type="char"), out_dir=path / "tokenizer")
    config = TrainConfig(model=model, features=FeaturesConfig(cmvn="utterance"))
    for name, section in (("config", config), ("fbank", FbankConfig(num_mel_bins=MEL_BINS))):
        (path / f"{name}.yaml").write_text(dump_config(section), encoding="utf-8")
    torch.manual_seed(0)
    torch.save(Experiment.open(path).new_model().state_dict(), path / "model.pt")
    return path
