"""From the command to the first hypothesis: nothing is loaded that recognising does not need."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from test_decode import make_data, make_exp, recording

import speechtx

HEAVY = {
    *("matplotlib", "tensorboard", "torch.utils.tensorboard", "pandas", "scipy", "sklearn", "rich", "torchaudio", "IPython"),
    *("torch._dynamo", "torch._inductor", "sympy", "triton", "kenlm", "espeakng_loader", "multiprocessing.managers"),
    *("speechtx.training", "speechtx.report", "speechtx.scoring.sclite", "speechtx.data.features"),
}
CPU_SECONDS = 4.0  # what a user may wait on an idle machine; processor time does not depend on who else is at work

PROGRAM = """
import json, sys
from speechtx.bin.main import main
status = main(sys.argv[1:])
print(json.dumps([status, sorted(sys.modules)]), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def exp(tmp_path_factory) -> Path:
    return make_exp(tmp_path_factory.mktemp("exp") / "asr")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "test", {"utt1": recording(1, 0.6)})


@pytest.mark.parametrize("verb", ["decode", "transcribe"])
def test_the_first_hypothesis_needs_no_heavy_module_and_little_time(exp, data, tmp_path, verb):
    arguments = {
        "decode": ["decode", "--exp", str(exp), "--data", str(data), "--out", str(tmp_path)],
        "transcribe": ["transcribe", str(exp), str(data / "utt1.wav")],
    }[verb]
    env = {**os.environ, "PYTHONPATH": str(Path(speechtx.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], env=env, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    status, modules = json.loads(done.stderr.splitlines()[-1])
    assert status == 0, done.stderr
    assert not HEAVY & set(modules), "load it where it is used, not where a search is loaded"
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < CPU_SECONDS
