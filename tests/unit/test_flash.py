"""flash-attn's slopes, against a stand-in for the package that computes what its documentation says, position by position."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from speechtx.attention.flash import SlopeBias
from speechtx.attention.kernels import attend, attend_eager
from speechtx.config.errors import ConfigError

SLOPES = torch.tensor([0.25, 0.0625, 0.0])


def flash_attn_func(  # the package's names and defaults
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """softmax(scale q k - slope |i + T_k - T_q - j|) v over i + T_k - T_q - left <= j <= i + T_k - T_q + right."""
    assert q.dtype in (torch.float16, torch.bfloat16) and alibi_slopes is not None
    assert alibi_slopes.dtype == torch.float32 and alibi_slopes.shape == (q.shape[2],) and alibi_slopes.is_contiguous()
    queries, keys, heads = q.shape[1], k.shape[1], q.shape[2]
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    left, right = window_size[0], 0 if causal else window_size[1]
    out = torch.zeros_like(q)
    for h in range(heads):
        for i in range(queries):
            middle = i + keys - queries
            seen = [j for j in range(keys) if (left < 0 or j >= middle - left) and (right < 0 or j <= middle + right)]
            logits = scale * (k[:, seen, h].float() @ q[:, i, h].float().unsqueeze(-1)).squeeze(-1)
            logits = logits - alibi_slopes[h] * torch.tensor([abs(middle - j) for j in seen])
            weights = torch.nn.functional.dropout(logits.softmax(-1), dropout_p)
            out[:, i, h] = (weights.unsqueeze(1) @ v[:, seen, h].float()).squeeze(1).to(q.dtype)
    return out


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module: Any = ModuleType("flash_attn")
    module.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return module


def inputs(length: int = 11, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, length, 8, generator=generator).to(dtype) for _ in range(4)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("slopes", [SLOPES, torch.tensor([0.1])])
@pytest.mark.parametrize(("window", "causal"), [(None, False), (None, True), (3, False), (3, True), (0, False)])
def test_the_package_is_asked_for_what_the_plain_kernel_computes(
    package: ModuleType, dtype: torch.dtype, slopes: Tensor, window: int | None, causal: bool
) -> None:
    q, k, v, grad = (x.requires_grad_() for x in inputs(dtype=dtype))
    bias = SlopeBias(slopes, window, causal)
    fast, plain = attend(q, k, v, bias=bias), attend_eager(q.double(), k.double(), v.double(), bias=bias.dense(11).double())
    assert fast.shape == q.shape and fast.dtype == dtype
    torch.testing.assert_close(fast.double(), plain, atol=2e-2, rtol=0)
    gradients = (torch.autograd.grad(out, (q, k, v), grad.to(out.dtype)) for out in (fast, plain))
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours.double(), expected.double(), atol=6e-2, rtol=0)


def test_the_dense_form_is_the_literal_formula() -> None:
    dense = SlopeBias(SLOPES, 2, True).dense(5)
    for h, i, j in torch.cartesian_prod(torch.arange(3), torch.arange(5), torch.arange(5)).tolist():
        assert dense[0, h, i, j].item() == (-SLOPES[h].item() * (i - j) if i - 2 <= j <= i else -torch.inf)
    with pytest.raises(ConfigError, match="length"):
        SlopeBias(SLOPES).dense()


def test_dropout_reaches_the_package(package: ModuleType) -> None:
    q, k, v, _ = inputs()
    torch.manual_seed(0)
    assert not torch.allclose(SlopeBias(SLOPES).attend(q, k, v, dropout=0.5), SlopeBias(SLOPES).attend(q, k, v))


def test_without_the_package_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # what `import` sees where it is not installed
    with pytest.raises(ConfigError, match="needs the package flash-attn"):
        SlopeBias(SLOPES).attend(*inputs()[:3])
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))  # another version, without that function
    with pytest.raises(ConfigError, match="needs the package flash-attn"):
        SlopeBias(SLOPES).attend(*inputs()[:3])


def test_padding_is_refused_because_padded_keys_would_be_seen() -> None:
    with pytest.raises(ConfigError, match="padded keys"):
        SlopeBias(SLOPES, mask=torch.ones(2, 11, dtype=torch.bool))


def test_what_the_kernel_cannot_do_is_refused(package: ModuleType) -> None:
    q, k, v, _ = inputs()
    with pytest.raises(ConfigError, match=r"bfloat16 and float16, not torch\.float32"):
        SlopeBias(SLOPES).attend(q.float(), k.float(), v.float())
    with pytest.raises(ConfigError, match="square"):
        SlopeBias(SLOPES).attend(q, k[:, :, :5], v[:, :, :5])
    with pytest.raises(ConfigError, match="2 slopes, but 3 heads"):
        SlopeBias(SLOPES[:2]).attend(q, k, v)
    with pytest.raises(ConfigError, match="no gradient"):
        SlopeBias(SLOPES.clone().requires_grad_())
    with pytest.raises(ConfigError, match="window"):
        SlopeBias(SLOPES, -1)
    with pytest.raises(ConfigError, match="slopes must be"):
        SlopeBias(SLOPES[None])
