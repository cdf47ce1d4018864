"""Folded penalties give what the plain kernel gives with the dense bias, in values and in the gradients of q, k and v."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from speechtx.attention.fold import (
    CausalLinearFold,
    GaussianFold,
    TwoPassLinear,
    gaussian_fold_dims,
    keeps_flash_tier,
)
from speechtx.attention.fold_columns import cut_gaussian, gaussian_columns, linear_columns, operand_type
from speechtx.attention.kernels import attend, attend_eager
from speechtx.config.errors import ConfigError

HEADS, DIM = 4, 64
EXACT = torch.tensor([2.0**-4, 2.0**-7, 2.0**-10, 2.0**-13])  # times sqrt(64) still powers of two: sigma 2.8 to 64
SLOPES = torch.tensor([0.25, 0.0625, 0.0, 0.3])  # one head does not pay, one slope is no power of two


def inputs(
    batch: int, queries: int, keys: int, dtype: torch.dtype = torch.float64, seed: int = 0, dim: int = DIM
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = (queries, keys, keys, queries)
    return [torch.randn(batch, HEADS, size, dim, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


def run(kernel, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, **kwargs) -> list[Tensor]:
    """Output and the gradients of q, k and v."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = kernel(*leaves, **kwargs)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def assert_parity(bias, arguments: list[Tensor], dense: Tensor, tolerance: float) -> None:
    """Against the plain kernel in float64 on the same numbers."""
    plain = run(attend_eager, *(x.double() for x in arguments), bias=dense.double())
    for name, fast, expected in zip(("out", "dq", "dk", "dv"), run(bias.attend, *arguments), plain, strict=True):
        assert fast.dtype == arguments[0].dtype and fast.isfinite().all()
        torch.testing.assert_close(fast.double(), expected, atol=tolerance, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


def padding(lens: list[int], length: int) -> Tensor:
    return torch.arange(length) < torch.tensor(lens).unsqueeze(1)


def frames(length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.arange(length, dtype=dtype).unsqueeze(0)


def cross_fold(queries: int, keys: int, lens: list[int], token_lens: list[int], dtype=torch.float64) -> GaussianFold:
    """Tokens spread evenly over each utterance's frames: real coordinates, one row an utterance."""
    ends, counts = torch.tensor(lens, dtype=dtype)[:, None], torch.tensor(token_lens, dtype=dtype)[:, None]
    x = (torch.arange(queries, dtype=dtype) + 0.5) * ends / counts - 0.5
    y = frames(keys, dtype).expand(len(lens), keys)
    return GaussianFold(x, y, torch.tensor([0.05, 0.01, 0.0, 0.3], dtype=dtype), padding(lens, keys))


# ---------------------------------------------------------------------------------------------------------- Gaussian


def test_a_square_gaussian_equals_the_plain_kernel_in_float64() -> None:
    position = frames(150, torch.float64)
    bias = GaussianFold(position, position, torch.tensor([1 / 18, 1 / 200, 1 / 1800, 1 / 20000], dtype=torch.float64))
    assert bias.dense().dtype == torch.float64 and bias.dense().shape == (1, 4, 150, 150)
    assert_parity(bias, inputs(2, 150, 150), bias.dense(), 1e-10)


@pytest.mark.parametrize("length", [60, 300])
def test_in_float32_the_error_is_that_of_centred_coordinates(length: int) -> None:
    strength = 0.05
    position = frames(length) + 1e4  # a common shift costs nothing: coordinates are centred
    bias = GaussianFold(position, position, torch.tensor([strength]))
    error_of_logits = 4 * 2.0**-24 * strength * (length / 2) ** 2
    # a logit's error e changes an output by at most 2 e max|v|, a gradient by a few times that; 1e-5 is float32 anyhow
    assert_parity(bias, inputs(1, length, length, torch.float32), bias.dense(), 20 * error_of_logits + 1e-5)


def test_real_coordinates_lengths_and_padding_need_no_mask() -> None:
    bias = cross_fold(23, 180, lens=[180, 95, 140], token_lens=[23, 11, 17])
    arguments = inputs(3, 23, 180)
    assert_parity(bias, arguments, bias.dense(), 1e-10)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # raises where the fused kernel cannot be used
        bias.attend(*(x.requires_grad_() for x in arguments[:3]))


def test_what_lies_on_padded_frames_changes_nothing() -> None:
    bias = cross_fold(7, 40, lens=[40, 11], token_lens=[7, 3])
    q, k, v, _ = inputs(2, 7, 40)
    other_k, other_v = k.clone(), v.clone()
    other_k[1, :, 11:] = 50.0
    other_v[1, :, 11:] = -1e6
    assert torch.equal(bias.attend(q, k, v), bias.attend(q, other_k, other_v))


def test_padded_queries_far_from_every_visible_key_still_see_no_padding() -> None:
    position = frames(900)
    bias = GaussianFold(position, position, torch.tensor([0.5]), padding([3], 900))  # 0.5 * 900^2 is more than any fixed -BIG
    arguments = inputs(1, 900, 900, torch.float32)
    out, _, dk, dv = run(bias.attend, *arguments)
    assert (dv[:, :, 3:] == 0).all() and (dk[:, :, 3:] == 0).all()
    torch.testing.assert_close(out[:, :, -1], arguments[2][:, :, 2])  # of three visible keys the last is by far the nearest


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_an_utterance_of_padding_gets_zeros_and_finite_gradients(dtype: torch.dtype) -> None:
    bias = GaussianFold(frames(9), frames(9), EXACT, padding([9, 0], 9))
    out, *grads = run(bias.attend, *inputs(2, 9, 9, dtype))
    assert (out[1] == 0).all() and (out[0] != 0).any()
    for grad in grads:
        assert grad.isfinite().all() and (grad[1] == 0).all() and (grad[0] != 0).any()


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_shape_length_and_type_equals_the_plain_kernel(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    queries, keys = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 40))
    lens = data.draw(st.lists(st.integers(0, keys), min_size=1, max_size=3))
    token_lens = [data.draw(st.integers(1, queries)) for _ in lens]
    bias = cross_fold(queries, keys, lens, token_lens)
    furthest = (bias.x - keys / 2).abs().max().item() + keys / 2  # queries beyond the utterance's tokens lie far out
    rounding = 4 * 2.0**-24 * 0.3 * furthest**2
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-5 + 2 * rounding, torch.bfloat16: 6e-2, torch.float16: 8e-3}[dtype]
    arguments = inputs(len(lens), queries, keys, dtype, seed=data.draw(st.integers(0, 1000)), dim=8)
    assert_parity(bias, arguments, bias.dense(), tolerance)


# ---------------------------------------------------------------------------------------------------------- 16 bit


def folded_bias(q: Tensor, k: Tensor, accumulate: torch.dtype) -> Tensor:
    """What a kernel adds to scale^-1 * logits: the columns' products, summed one after the other in `accumulate`."""
    total = torch.zeros(1, dtype=accumulate)
    for column in range(q.shape[-1]):
        total = total + q[..., :, None, column].to(accumulate) * k[..., None, :, column].to(accumulate)
    return total


@pytest.mark.parametrize(("length", "dims"), [(500, 3), (513, 3), (514, 7), (2000, 7), (2048, 7)])
def test_in_bfloat16_the_bias_of_a_power_of_two_is_exact(length: int, dims: int) -> None:
    assert gaussian_fold_dims(EXACT, length=length, head_dim=DIM, dtype=torch.bfloat16) == dims
    query = torch.zeros(1, HEADS, 1, DIM, dtype=torch.bfloat16)
    columns = gaussian_columns(frames(length), frames(length), EXACT, None, None, like=query, dims=None)
    assert columns.q.dtype == columns.k.dtype == torch.bfloat16 and columns.k.shape[-1] == dims
    y = torch.arange(length, dtype=torch.float64) - round((length - 1) / 2)
    some = torch.tensor([*range(0, length, 31), length - 1])  # queries, the outermost among them
    lam, x = EXACT.double().view(1, -1, 1, 1) * DIM**0.5, y[some, None]
    expected = lam * (x.square() - (x - y).square())
    for accumulate in (torch.float64, torch.float32):  # float32 is what tensor cores and the CPU's kernel sum in
        assert (folded_bias(columns.q[:, :, some], columns.k, accumulate).double() - expected).abs().max().item() == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [500, 2000])
def test_in_16_bit_any_other_sigma_only_moves_frames_by_a_hundredth(dtype: torch.dtype, length: int) -> None:
    strength = 1 / (2 * torch.tensor([3.0, 10.0, 30.0, 100.0], dtype=torch.float64) ** 2)
    assert gaussian_fold_dims(strength, length=length, head_dim=DIM, dtype=dtype) == 7
    x = torch.arange(length, dtype=torch.float64)[None] - length // 2
    q, k = cut_gaussian(x, x, strength, head_dim=DIM, dtype=dtype)
    assert torch.equal(q, q.to(dtype).double()) and torch.equal(k, k.to(dtype).double())
    unit = (strength * DIM**0.5).sqrt().view(-1, 1)  # of the coordinates in which lam is 1
    queries, keys, squares = q[0, ..., [0, 2]].sum(-1) / 2, k[0, ..., :2].sum(-1), -256 * k[0, ..., 4:].sum(-1)
    for held in (queries, keys):
        assert 0 < (held / unit - x).abs().max() < 0.01
    balance = (squares - keys.square()).abs() / DIM**0.5  # in logits: what a 2-dim fold gets wrong by more than 1
    assert (balance <= 1e-6 * squares + 1e-4).all()


@pytest.mark.parametrize(("strength", "length"), [(EXACT, 500), (EXACT, 1200), (torch.tensor([1 / 18, 0.005, 0.0, 5e-5]), 500)])
def test_bfloat16_is_as_good_as_with_the_bias_added_inside_the_kernel(strength: Tensor, length: int) -> None:
    bias = GaussianFold(frames(length), frames(length), strength)
    arguments = inputs(1, length, length, torch.bfloat16)
    plain = attend_eager(*(x.double() for x in arguments[:3]), bias=bias.dense().double())
    error = (bias.attend(*arguments[:3]).double() - plain).abs().max()
    inside = (attend_eager(*arguments[:3], bias=bias.dense()).double() - plain).abs().max()
    assert error < 1.5 * inside < 0.05
    assert_parity(bias, arguments, bias.dense(), 6e-2)


def test_two_dims_in_16_bit_are_refused_and_would_have_been_garbage() -> None:
    arguments = inputs(1, 500, 500, torch.bfloat16)[:3]
    position = frames(500)
    with pytest.raises(ConfigError, match="loses all precision"):
        GaussianFold(position, position, EXACT, dims=2).attend(*arguments)
    x = position - 250
    q, k = (torch.stack(pair, -1)[:, None].bfloat16() for pair in ((2 * x, torch.ones_like(x)), (x, -x.square())))
    expected = (x[0][:, None].square() - (x[0][:, None] - x[0]).square()).double()
    assert (folded_bias(q, k, torch.float64) - expected).abs().max() / 16 > 1  # a sigma of 2.8, as in EXACT


def test_three_dims_are_refused_where_they_would_round() -> None:
    q, k, v, _ = inputs(1, 500, 500, torch.bfloat16)
    exact = GaussianFold(frames(500), frames(500), EXACT, dims=3)
    assert exact.attend(q, k, v).shape == q.shape
    for bias in (
        GaussianFold(frames(500) * 1.5, frames(500), EXACT, dims=3),
        GaussianFold(frames(500), frames(500), EXACT * 1.1, dims=3),
    ):
        with pytest.raises(ConfigError, match="power of two"):
            bias.attend(q, k, v)
    with pytest.raises(ConfigError, match="2, 3 or 7"):
        GaussianFold(frames(5), frames(5), EXACT, dims=4)


def test_float16_refuses_what_exceeds_its_range() -> None:
    q, k, v, _ = inputs(1, 9, 9, torch.float16)
    with pytest.raises(ConfigError, match="range"):
        GaussianFold(frames(9) * 1e6, frames(9) * 1e6, EXACT).attend(q, k, v)


def test_under_autocast_the_fold_is_cut_for_the_type_that_is_multiplied() -> None:
    bias = GaussianFold(frames(400), frames(400), EXACT)
    q, k, v, _ = inputs(1, 400, 400, torch.float32)
    plain = attend_eager(q, k, v, bias=bias.dense())
    with torch.autocast("cpu", torch.bfloat16):
        out = bias.attend(q, k, v)
        slopes = TwoPassLinear(SLOPES)
        linear = slopes.attend(q, k, v)
    assert out.dtype == linear.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), plain, atol=5e-2, rtol=0)
    torch.testing.assert_close(linear.float(), attend_eager(q, k, v, bias=slopes.dense(400)), atol=5e-2, rtol=0)


def test_how_many_dims_a_fold_costs_is_known_beforehand() -> None:
    def dims(dtype: torch.dtype, strength: Tensor = EXACT, length: int = 400, head_dim: int = DIM) -> int:
        return gaussian_fold_dims(strength, length=length, head_dim=head_dim, dtype=dtype)

    assert dims(torch.float32) == dims(torch.float64) == 2
    assert dims(torch.bfloat16) == 3 and dims(torch.bfloat16, EXACT * 3) == 7
    assert dims(torch.float16, length=2000) == 3  # 11 bits
    sigma = math.sqrt(math.sqrt(32) / 2) * 2**1.5  # heads of 32: lam * sqrt(32) is a power of two
    assert dims(torch.bfloat16, torch.tensor([1 / (2 * sigma**2)]), head_dim=32) == 3
    assert dims(torch.bfloat16, torch.tensor([0.0])) == 3


@pytest.mark.parametrize(
    ("head_dim", "dims", "same"), [(64, 7, False), (56, 7, True), (61, 3, True), (48, 7, True), (256, 2, False), (300, 2, False)]
)
def test_a_fold_is_free_only_inside_a_tier_of_head_widths(head_dim: int, dims: int, same: bool) -> None:
    assert keeps_flash_tier(head_dim, dims) is same


def test_what_is_learned_cannot_be_folded() -> None:
    learned = EXACT.clone().requires_grad_()
    with pytest.raises(ValueError, match="strength requires a gradient"):
        GaussianFold(frames(9), frames(9), learned)
    with pytest.raises(ConfigError, match="x requires a gradient"):
        GaussianFold(frames(9).requires_grad_(), frames(9), EXACT)
    for make in (lambda: CausalLinearFold(learned, 9), lambda: TwoPassLinear(learned)):
        with pytest.raises(ConfigError, match="slopes requires a gradient"):
            make()


def test_shapes_that_disagree_are_refused() -> None:
    with pytest.raises(ConfigError, match="wants x"):
        GaussianFold(frames(9)[0], frames(9), EXACT)
    with pytest.raises(ConfigError, match="wants x"):
        GaussianFold(frames(9).expand(2, 9), frames(9).expand(3, 9), EXACT)
    with pytest.raises(ConfigError, match="mask"):
        GaussianFold(frames(9), frames(9), EXACT, padding([5], 8))
    with pytest.raises(ConfigError, match="mask"):
        CausalLinearFold(SLOPES, 9, torch.ones(1, 9))
    with pytest.raises(ConfigError, match="built for 9"):
        CausalLinearFold(SLOPES, 9).attend(*inputs(1, 8, 8)[:3])


def test_dropout_drops_weights_of_the_folded_kernel_too() -> None:
    torch.manual_seed(0)
    q, k = torch.zeros(1, 1, 2000, 8), torch.zeros(1, 1, 10, 8)
    v = torch.eye(10)[None, None, :, :8].contiguous()
    bias = GaussianFold(frames(2000), frames(10), torch.zeros(1))
    out = bias.attend(q, k, v, dropout=0.3)
    assert (out == 0).float().mean().item() == pytest.approx(0.3, abs=0.05)
    assert out.mean().item() == pytest.approx(0.1, abs=0.01)


def test_columns_are_built_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr("speechtx.attention.fold.gaussian_columns", lambda *a, **k: calls.append(1) or gaussian_columns(*a, **k))
    bias = GaussianFold(frames(9), frames(9), EXACT)
    for dtype in (torch.float32, torch.float32, torch.bfloat16, torch.float32):
        attend(*inputs(1, 9, 9, dtype)[:3], bias=bias)
    assert len(calls) == 2  # one a type


# ---------------------------------------------------------------------------------------------------------- linear


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=3),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from(["causal", "two passes"]),
    st.booleans(),
    st.integers(0, 1000),
)
def test_linear_penalties_equal_the_plain_kernel(lens: list[int], dtype: torch.dtype, kind: str, left: bool, seed: int) -> None:
    length = max(*lens, 1)
    mask = padding(lens, length)
    mask = mask.flip(1) if left else mask  # padding on the left leaves causal queries without any key
    bias = CausalLinearFold(SLOPES, length, mask) if kind == "causal" else TwoPassLinear(SLOPES, mask)
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3}[dtype]
    dense = bias.dense()
    assert dense.shape == (len(lens), HEADS, length, length)
    assert_parity(
        bias, inputs(len(lens), length, length, dtype, seed, dim=8), dense_in_float64(dense, kind, length, mask), tolerance
    )


def dense_in_float64(dense: Tensor, kind: str, length: int, mask: Tensor) -> Tensor:
    """The literal formula, against which `dense()` is checked on the way."""
    offset = torch.arange(length)[None] - torch.arange(length)[:, None]
    bias = -SLOPES.double().view(1, -1, 1, 1) * offset.abs()
    hidden = ~mask[:, None, None, :]
    bias = bias.masked_fill(hidden | (offset > 0) if kind == "causal" else hidden, float("-inf"))
    torch.testing.assert_close(dense.double(), bias, atol=1e-5, rtol=0)
    return bias


@pytest.mark.parametrize("length", [1, 2, 400])
@pytest.mark.parametrize("kind", ["causal", "two passes"])
def test_linear_penalties_without_a_mask_equal_the_plain_kernel_in_float32(length: int, kind: str) -> None:
    bias = CausalLinearFold(SLOPES, length) if kind == "causal" else TwoPassLinear(SLOPES)
    dense = bias.dense() if kind == "causal" else bias.dense(length)
    assert_parity(bias, inputs(2, length, length, torch.float32), dense, 2e-5)


def test_the_causal_fold_takes_one_dim_and_never_a_mask() -> None:
    like = torch.zeros(1, HEADS, 1, DIM)
    for dtype, slopes, dims in ((torch.float32, SLOPES, 1), (torch.bfloat16, SLOPES[:3], 1), (torch.bfloat16, SLOPES, 3)):
        assert linear_columns(slopes, 500, None, None, like=like.to(dtype)).k.shape[-1] == dims
    arguments = [x.requires_grad_() for x in inputs(2, 50, 50, torch.float32)[:3]]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        CausalLinearFold(SLOPES, 50, padding([50, 20], 50)).attend(*arguments)


def test_the_causal_fold_sees_no_future() -> None:
    q, k, v, _ = inputs(1, 9, 9)
    changed = v.clone()
    changed[:, :, 5:] += 1
    bias = CausalLinearFold(SLOPES, 9)
    assert torch.equal(bias.attend(q, k, v)[:, :, :5], bias.attend(q, k, changed)[:, :, :5])
    assert not torch.equal(bias.attend(q, k, v), bias.attend(q, k, changed))


def test_two_passes_refuse_dropout_and_shapes_that_are_not_square() -> None:
    q, k, v, _ = inputs(1, 9, 9)
    with pytest.raises(ConfigError, match="dropout"):
        TwoPassLinear(SLOPES).attend(q, k, v, dropout=0.1)
    with pytest.raises(ConfigError, match="built for 9"):
        TwoPassLinear(SLOPES).attend(q, k[:, :, :5], v[:, :, :5])
    with pytest.raises(ConfigError, match="length"):
        TwoPassLinear(SLOPES).dense()


def test_two_passes_pass_gradcheck() -> None:
    arguments = [x.requires_grad_() for x in inputs(1, 6, 6, dim=4)[:3]]
    assert torch.autograd.gradcheck(TwoPassLinear(SLOPES.double(), padding([4], 6)).attend, arguments)


@pytest.mark.parametrize(
    "make",
    [lambda: GaussianFold(frames(20), frames(20), EXACT), lambda: CausalLinearFold(SLOPES, 20), lambda: TwoPassLinear(SLOPES)],
)
def test_a_compiled_model_gives_the_same(make) -> None:
    arguments, bias = inputs(1, 20, 20, torch.float32), make()
    compiled = torch.compile(lambda q, k, v: attend(q, k, v, bias=bias) * 2, backend="aot_eager")
    for fast, plain in zip(run(compiled, *arguments), run(lambda q, k, v: bias.attend(q, k, v) * 2, *arguments), strict=True):
        torch.testing.assert_close(fast, plain)


def test_under_tf32_float32_is_cut_as_16_bit_is(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu = SimpleNamespace(dtype=torch.float32, is_cuda=True)
    assert operand_type(on_gpu) == torch.float32
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert operand_type(on_gpu) == torch.bfloat16
        assert operand_type(torch.zeros(1)) == torch.float32  # a CPU has no TF32
    finally:
        torch.set_float32_matmul_precision(before)

    monkeypatch.setattr("speechtx.attention.fold_columns.operand_type", lambda q: torch.bfloat16)
    bias = GaussianFold(frames(300), frames(300), EXACT)
    arguments = inputs(1, 300, 300, torch.float32)
    assert_parity(bias, arguments, bias.dense(), 4 * 2 * 2.0**-24 * EXACT.max().item() * 150**2)
    with pytest.raises(ConfigError, match="TF32"):
        GaussianFold(frames(300), frames(300), EXACT, dims=2).attend(*arguments[:3])
