from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from speechtx.attention import blocks
from speechtx.attention.blocks import BlockBias
from speechtx.attention.kernels import attend_eager

DIM = 8


def inputs(batch: int, heads: int, length: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """q, k, v and the gradient of the output, laid out as the projections leave them: views of (B, T, H * d)."""
    generator = torch.Generator().manual_seed(seed)
    flat = [torch.randn(batch, length, heads, DIM, generator=generator, dtype=torch.float64) for _ in range(4)]
    return [x.to(dtype).transpose(1, 2) for x in flat]


def log_penalty(window: int, heads: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """-s log(1 + |offset|) (H, 2W+1), another s in every head and, so that left and right cannot be confused, to the right."""
    offset = torch.arange(-window, window + 1, dtype=torch.float64)
    strength = torch.linspace(1.0, 2.0, heads, dtype=torch.float64)[:, None] * (1 + 0.5 * (offset > 0))
    return (-strength * offset.abs().log1p()).to(dtype)


def mask_of(lens: list[int], length: int) -> Tensor:
    return torch.arange(length) < torch.tensor(lens).unsqueeze(1)


def run(kernel, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, by_offset: Tensor) -> list[Tensor]:
    """Output and the gradients of q, k, v and by_offset."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v, by_offset)]
    out = kernel(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def eager(mask: Tensor | None):
    return lambda q, k, v, table: attend_eager(q, k, v, bias=BlockBias(table, mask).dense(q.shape[2]))


def local(mask: Tensor | None):
    return lambda q, k, v, table: BlockBias(table, mask).attend(q, k, v, dropout=0.0)


def through_sdpa(mask: Tensor | None):
    """What runs on GPU and under dropout, here on CPU."""
    return lambda q, k, v, table: blocks._attend_by_sdpa(q, k, v, table, mask, 0.0)


def assert_same(fast: list[Tensor], plain: list[Tensor], tolerance: float) -> None:
    for name, a, b in zip(("out", "dq", "dk", "dv", "dby_offset"), fast, plain, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


# ---------------------------------------------------------------------------------------------------- equal to plain


@settings(deadline=None, max_examples=60)
@given(
    lens=st.lists(st.integers(0, 150), min_size=1, max_size=3),
    heads=st.integers(1, 3),
    shared=st.booleans(),
    window=st.integers(0, 40),
    padded=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    kernel=st.sampled_from([local, through_sdpa]),
    seed=st.integers(0, 1000),
)
def test_blocks_equal_plain_attention_for_any_sizes(lens, heads, shared, window, padded, dtype, kernel, seed) -> None:
    length = max(*lens, 1)
    mask = mask_of(lens, length) if padded else None
    table = log_penalty(window, 1 if shared else heads, dtype)
    arguments = (*inputs(len(lens), heads, length, dtype, seed), table)
    # the table's gradient sums B * H * T terms
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    assert_same(run(kernel(mask), *arguments), run(eager(mask), *arguments), tolerance)


@settings(deadline=None, max_examples=30)
@given(st.data(), st.integers(1, 90), st.integers(0, 20), st.sampled_from([local, through_sdpa]))
def test_any_keys_and_any_offsets_may_be_hidden(data, length, window, kernel) -> None:
    """Holes in the mask, offsets at -inf (a causal window among them): rows may lose all their keys in any place."""
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=2 * length, max_size=2 * length))).view(2, length)
    hidden = torch.tensor(data.draw(st.lists(st.booleans(), min_size=2 * window + 1, max_size=2 * window + 1)))
    table = log_penalty(window, 2, torch.float64).masked_fill(hidden, -math.inf)
    arguments = (*inputs(2, 2, length), table)
    fast, plain = run(kernel(mask), *arguments), run(eager(mask), *arguments)
    assert all(torch.isfinite(x).all() for x in fast)
    assert_same(fast, plain, 1e-10)


@pytest.mark.parametrize("kernel", [local, through_sdpa])
@pytest.mark.parametrize("window", [16, 32, 33, 128, 129])
def test_every_block_size_equals_plain_attention(kernel, window: int) -> None:
    mask = mask_of([300, 171], 300)
    arguments = (*inputs(2, 2, 300), log_penalty(window, 2, torch.float64))
    assert_same(run(kernel(mask), *arguments), run(eager(mask), *arguments), 1e-10)


@pytest.mark.parametrize("kernel", [local, through_sdpa])
@pytest.mark.parametrize(("length", "window"), [(1, 0), (1, 5), (2, 1), (7, 6), (7, 7), (64, 64), (65, 1000)])
def test_a_window_beyond_the_ends_is_full_attention(kernel, length: int, window: int) -> None:
    q, k, v, grad = inputs(2, 2, length)
    table = torch.zeros(1, 2 * window + 1, dtype=torch.float64)
    fast = run(kernel(None), q, k, v, grad, table)
    if window >= length - 1:
        torch.testing.assert_close(fast[0], attend_eager(q, k, v), atol=1e-12, rtol=0)
    assert_same(fast, run(eager(None), q, k, v, grad, table), 1e-10)


@pytest.mark.parametrize("kernel", [local, through_sdpa])
def test_gradients_are_the_derivatives(kernel) -> None:
    """Against finite differences, not against another implementation."""
    q, k, v, _ = (x.requires_grad_() for x in inputs(2, 2, 9))
    table = log_penalty(3, 2, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(kernel(mask_of([9, 5], 9)), (q, k, v, table))


@pytest.mark.parametrize("kernel", [local, through_sdpa])
def test_a_long_sequence_crosses_groups_of_blocks(kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_GROUP", 1)  # one block a group: every span overlaps that of the next group
    arguments = (*inputs(1, 2, 333), log_penalty(20, 2, torch.float64))
    assert_same(run(kernel(None), *arguments), run(eager(None), *arguments), 1e-10)


# ------------------------------------------------------------------------------------------------- what must not leak


@pytest.mark.parametrize("kernel", [local, through_sdpa])
def test_a_query_without_any_key_gets_zero_and_no_nan_gradient(kernel) -> None:
    mask = mask_of([0, 4, 40], 40)
    out, *grads = run(kernel(mask), *inputs(3, 2, 40, torch.float32), log_penalty(3))
    assert (out[0] == 0).all() and (out[1, :, 7:] == 0).all()
    assert (out[1, :, :7] != 0).all() and (out[2] != 0).all()  # a padded query within W of data does see it
    for gradient in grads:
        assert torch.isfinite(gradient).all()
    for gradient in grads[:3]:
        assert (gradient[0] == 0).all()


@pytest.mark.parametrize("kernel", [local, through_sdpa])
def test_neither_padding_nor_neighbours_in_the_batch_nor_far_keys_change_a_result(kernel) -> None:
    q, k, v, _ = inputs(3, 2, 70)
    lens = [70, 50, 3]
    table = log_penalty(5, 2, torch.float64)
    out = kernel(mask_of(lens, 70))(q, k, v, table)
    for row, size in enumerate(lens):
        alone = kernel(None)(*(x[row : row + 1, :, :size] for x in (q, k, v)), table)
        torch.testing.assert_close(out[row : row + 1, :, :size], alone, atol=1e-12, rtol=0)
    changed = v.clone()
    changed[:, :, 30] += 1
    moved = (kernel(None)(q, k, changed, table) != kernel(None)(q, k, v, table)).any(dim=-1)
    assert moved[:, :, 25:36].all() and not moved[:, :, :25].any() and not moved[:, :, 36:].any()


def test_a_broken_utterance_does_not_spoil_the_others() -> None:
    q, k, v, grad = inputs(3, 2, 50)
    good = run(local(None), q, k, v, grad, log_penalty(4, 1, torch.float64))
    v[1] = math.nan
    bad = run(local(None), q, k, v, grad, log_penalty(4, 1, torch.float64))
    for a, b in zip(good[:4], bad[:4], strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[2], b[2])
    assert bad[0][1].isnan().all()


# --------------------------------------------------------------------------------------- precision, compile, dropout


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_low_precision_queries_with_a_float32_penalty(dtype: torch.dtype, tolerance: float) -> None:
    """The table is not rounded to q's type, and softmax is in float32: the same as the plain twin, which also does so."""
    mask = mask_of([100, 31], 100)
    arguments = (*inputs(2, 2, 100, dtype), log_penalty(20, 2))
    assert_same(run(local(mask), *arguments), run(eager(mask), *arguments), tolerance)


def test_autocast_does_not_reach_inside() -> None:
    arguments = (*inputs(2, 2, 100, torch.bfloat16), log_penalty(20, 2))
    plain = run(local(None), *arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = run(local(None), *arguments)
    assert all(torch.equal(a, b) for a, b in zip(plain, mixed, strict=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("padded", [False, True])
def test_a_compiled_model_computes_the_same_without_a_graph_break(padded: bool) -> None:
    mask = mask_of([90, 17], 90) if padded else None
    arguments = (*inputs(2, 2, 90), log_penalty(6, 2, torch.float64))
    compiled = torch.compile(lambda q, k, v, table: 2 * local(mask)(q, k, v, table), backend="aot_eager", fullgraph=True)
    twice = lambda *leaves: 2 * local(mask)(*leaves)  # noqa: E731
    for fast, plain in zip(run(compiled, *arguments), run(twice, *arguments), strict=True):
        assert torch.equal(fast, plain)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_operator_is_registered_as_pytorch_wants_it(dtype: torch.dtype) -> None:
    q, k, v, _ = (x.requires_grad_() for x in inputs(2, 2, 40, dtype))
    table = log_penalty(6, 2).requires_grad_()
    for mask in (None, mask_of([40, 9], 40)):
        torch.library.opcheck(torch.ops.speechtx.block_attention, (q, k, v, table, mask))


def test_dropout_drops_whole_weights_and_keeps_their_mean() -> None:
    torch.manual_seed(0)
    length = 500
    q = torch.zeros(1, 1, length, length)
    v = torch.eye(length)[None, None]  # the output is the weights themselves
    bias = BlockBias(torch.zeros(1, 11))
    weights = bias.attend(q, q, v, dropout=0.0)[0, 0]
    dropped = bias.attend(q, q, v, dropout=0.3)[0, 0]
    inside = weights > 0
    assert (dropped[inside] == 0).float().mean().item() == pytest.approx(0.3, abs=0.03)
    kept = inside & (dropped != 0)
    torch.testing.assert_close(dropped[kept], weights[kept] / 0.7)
    assert (dropped[~inside] == 0).all()


def test_learned_table_trains_under_dropout() -> None:
    q, k, v, grad = inputs(2, 2, 60)
    table = log_penalty(4, 2, torch.float64).requires_grad_()
    out = BlockBias(table, mask_of([60, 30], 60)).attend(q, k, v, dropout=0.5)
    (gradient,) = torch.autograd.grad(out, table, grad)
    assert torch.isfinite(gradient).all() and (gradient != 0).all()


# ------------------------------------------------------------------------------------------------------ cost and form


def test_memory_does_not_grow_with_the_square_of_the_length() -> None:
    """The bytes allocated by forward and backward, counted by PyTorch's profiler: eightfold length, at most ninefold peak."""

    def peak(length: int) -> int:
        q, k, v, grad = (x.requires_grad_() for x in inputs(1, 2, length, torch.float32))
        bias = BlockBias(log_penalty(16))
        with torch.profiler.profile(profile_memory=True) as profile:
            torch.autograd.grad(bias.attend(q, k, v, dropout=0.0), (q, k, v), grad)
        now = most = 0
        for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
            if event.name() == "[memory]":
                now += event.nbytes()
                most = max(most, now)
        return most

    small, large = peak(1000), peak(8000)
    assert small > 4 * 1000 * 2 * DIM  # the counter counts: at least the output is there
    assert large < 9 * small


def test_the_heads_join_without_a_copy() -> None:
    q, k, v, _ = inputs(2, 3, 20, torch.float32)
    assert BlockBias(log_penalty(4)).attend(q, k, v, dropout=0.0).transpose(1, 2).is_contiguous()


def test_dense_shows_the_window_the_penalty_and_the_padding() -> None:
    dense = BlockBias(torch.tensor([[-2.0, 0.0, -1.0]]), mask_of([3], 3)).dense()
    hidden = -math.inf
    assert dense.tolist() == [[[[0.0, -1.0, hidden], [-2.0, 0.0, -1.0], [hidden, -2.0, 0.0]]]]
    assert BlockBias(torch.zeros(4, 3), mask_of([3, 2], 3)).dense().shape == (2, 4, 3, 3)
    assert BlockBias(torch.zeros(1, 3, dtype=torch.bfloat16)).dense(3).dtype == torch.float32
    assert BlockBias(torch.zeros(1, 3, dtype=torch.float64)).dense(3).dtype == torch.float64
    with pytest.raises(ValueError, match="needs the length"):
        BlockBias(torch.zeros(1, 3)).dense()


@pytest.mark.parametrize(
    ("by_offset", "mask", "message"),
    [
        (torch.zeros(1, 4), None, r"2W\+1"),
        (torch.zeros(5), None, r"2W\+1"),
        (torch.zeros(1, 5, dtype=torch.long), None, "must be float"),
        (torch.zeros(1, 5), torch.ones(2, 9), "mask must be bool"),
        (torch.zeros(1, 5), torch.ones(2, 1, 9, dtype=torch.bool), "mask must be bool"),
        (torch.zeros(1, 5), torch.ones(2, 8, dtype=torch.bool), "does not fit"),
        (torch.zeros(1, 5), torch.ones(1, 9, dtype=torch.bool), "does not fit"),
        (torch.zeros(3, 5), None, "3 heads"),
    ],
)
def test_wrong_shapes_are_refused_with_the_shape(by_offset: Tensor, mask: Tensor | None, message: str) -> None:
    q, k, v, _ = inputs(2, 2, 9)
    with pytest.raises(ValueError, match=message):
        BlockBias(by_offset, mask).attend(q, k, v, dropout=0.0)


def test_attention_to_another_sequence_is_refused() -> None:
    q, k, v, _ = inputs(2, 2, 9)
    with pytest.raises(ValueError, match="square"):
        BlockBias(torch.zeros(1, 5)).attend(q[:, :, :4], k, v, dropout=0.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 4e-2), (torch.float16, 1e-2)])
def test_blocks_equal_plain_attention_on_a_gpu(dtype: torch.dtype, tolerance: float) -> None:
    mask = mask_of([200, 77, 0], 200).cuda()
    arguments = [x.cuda() for x in (*inputs(3, 2, 200, dtype), log_penalty(20, 2))]
    fast, plain = run(local(mask), *arguments), run(eager(mask), *arguments)
    assert_same(fast[:4], plain[:4], tolerance)
