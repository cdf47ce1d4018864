"""With `shape: none` nothing has changed: AN4's model trains to the same bits as before there were other penalties."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from io import BytesIO
from pathlib import Path

import pytest

BEFORE = "27e2f14"  # the last commit with a bias in the encoder's self-attention only

# Runs with whichever speechtx is first on the path: the model of egs/an4, dropout on, few frames so that it is quick.
TRAIN = """
import hashlib
import torch
import speechtx
from speechtx.config.load import load_config
from speechtx.config.schema import TrainConfig
from speechtx.model import convolution
from speechtx.model.recognizer import Recognizer
from speechtx.training.optim import build_optimizer
import sys

assert speechtx.__file__.startswith(sys.argv[2]), speechtx.__file__
config = load_config(sys.argv[1], TrainConfig, ["model.attention_penalty.encoder_self.shape=none"])
torch.manual_seed(1)
model = Recognizer(config=config.model, num_mel_bins=80, vocab_size=100).train()
# Two convolutions have since changed the layout in which they compute, and with it the last bits; both get one.
convolution.DepthwiseConv.forward = lambda self, x: convolution.depthwise_plain(x, self.weight, self.bias)
model.encoder.subsampling.conv1.register_forward_pre_hook(lambda _, args: args[0].clone(memory_format=torch.contiguous_format))
optimizer = build_optimizer(model, config.training.optimizer, torch.device("cpu"))
for step in range(20):
    feats, lens = torch.randn(3, 60 + 8 * (step % 3), 80), torch.tensor([60, 50, 33])
    losses = model(feats, lens, torch.randint(1, 99, (3, 5)), torch.tensor([5, 4, 2]))
    losses.total.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
    optimizer.step()
    optimizer.zero_grad()
digest = hashlib.sha256()
for name, value in sorted(model.state_dict().items()):
    digest.update(name.encode() + value.numpy().tobytes())
print(digest.hexdigest(), float(losses.total))
"""


def test_the_an4_model_with_shape_none_trains_to_the_same_bits_as_before(repo: Path, tmp_path: Path) -> None:
    archive = subprocess.run(["git", "-C", repo, "archive", BEFORE, "speechtx"], capture_output=True, check=False)
    if archive.returncode != 0:
        pytest.skip(f"no git history that reaches commit {BEFORE} here")
    with tarfile.open(fileobj=BytesIO(archive.stdout)) as tar:
        tar.extractall(tmp_path, filter="data")
    # A configuration that both can read: the penalty's own keys are set by the script.
    config = tmp_path / "train.yaml"
    config.write_text((repo / "tests/unit/reference/an4_train_before.yaml").read_text())
    results = []
    for root in (tmp_path, repo):
        environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        run = subprocess.run(
            [sys.executable, "-P", "-c", TRAIN, str(config), str(root)],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        assert run.returncode == 0, run.stderr
        results.append(run.stdout)
    assert results[0] == results[1] != ""
