"""`backend: auto` on a GPU never chooses a kernel that would refuse; what it chooses on a CPU is tested with the penalties."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from speechtx.attention.backend import choose_backend
from speechtx.config.penalty import PenaltyConfig

WINDOW = PenaltyConfig(shape="log", window=64)
GAUSSIAN = PenaltyConfig(shape="gaussian", sigma=5.0)


@pytest.mark.parametrize(
    ("config", "changes", "expected"),
    [
        (PenaltyConfig(shape="log"), {}, "sdpa"),
        (WINDOW, {"window": 64}, "flex"),
        (WINDOW, {"window": 64, "length": 800}, "sdpa"),
        (WINDOW, {"window": 64, "dropout": 0.1}, "sdpa"),
        (WINDOW, {"window": 64, "head_dim": 8}, "sdpa"),
        (GAUSSIAN, {"head_dim": 36}, "fold"),
        (GAUSSIAN, {"head_dim": 64}, "sdpa"),
        (GAUSSIAN.model_copy(update={"learnable": "head"}), {"head_dim": 36}, "sdpa"),
        (GAUSSIAN, {"head_dim": 36, "causal": True}, "sdpa"),
    ],
)
def test_auto_on_a_gpu_takes_a_kernel_that_can(config: PenaltyConfig, changes: dict[str, Any], expected: str) -> None:
    case: dict[str, Any] = {"dtype": torch.bfloat16, "length": 2000, "window": None, "head_dim": 64, "dropout": 0.0}
    case |= {"padded": True, "causal": False, **changes}
    assert choose_backend("auto", config, site="encoder_self", device=torch.device("cuda"), **case) == expected
