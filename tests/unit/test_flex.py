"""FlexAttention with a looked-up penalty gives what the plain kernel gives; on CPU forward only, gradients in tests/gpu."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from speechtx.attention.flex import FlexBias
from speechtx.attention.kernels import attend, attend_eager
from speechtx.config.errors import ConfigError

HEADS = 3


def inputs(batch: int, length: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, HEADS, length, 8, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]


def table(length: int, rows: int = HEADS, seed: int = 0) -> Tensor:
    """Any penalty by offset, not a symmetric one: a wrong sign of the offset must show."""
    return -torch.rand(rows, 2 * length - 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 5


def padding(lens: list[int], length: int) -> Tensor:
    return torch.arange(length) < torch.tensor(lens).unsqueeze(1)


@settings(deadline=None, max_examples=10)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=3),
    st.sampled_from([None, 0, 1, 7, 100]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1, HEADS]),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_any_window_padding_and_causality_equals_the_plain_kernel(
    lens: list[int], window: int | None, causal: bool, padded: bool, rows: int, dtype: torch.dtype
) -> None:
    length = max(*lens, 1)
    bias = FlexBias(table(length, rows), window, padding(lens, length) if padded else None, causal)
    arguments = inputs(len(lens), length, dtype)
    plain = attend_eager(*(x.double() for x in arguments), bias=bias.dense())
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 4e-2}[dtype]
    out = attend(*arguments, bias=bias)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), plain, atol=tolerance, rtol=0)


def test_the_dense_form_is_the_literal_formula() -> None:
    by_offset, mask = table(6), padding([6, 4], 6)
    dense = FlexBias(by_offset, 2, mask, True).dense()
    assert dense.shape == (2, HEADS, 6, 6)
    for b, h, i, j in torch.cartesian_prod(torch.arange(2), torch.arange(HEADS), torch.arange(6), torch.arange(6)).tolist():
        visible = mask[b, j] and i - 2 <= j <= i
        assert dense[b, h, i, j].item() == (by_offset[h, j - i + 5].item() if visible else -torch.inf)


def test_an_utterance_of_padding_gets_zeros() -> None:
    out = FlexBias(table(9), None, padding([9, 0], 9)).attend(*inputs(2, 9))
    assert (out[1] == 0).all() and (out[0] != 0).any() and out.isfinite().all()


def listed(num: Tensor, indices: Tensor) -> set[tuple[int, int, int]]:
    return {
        (b, row, int(column))
        for b, counts in enumerate(num[:, 0])
        for row, count in enumerate(counts.tolist())
        for column in indices[b, 0, row, :count]
    }


def blocks(mask: BlockMask) -> tuple[set[tuple[int, int, int]], set[tuple[int, int, int]]]:
    """Which blocks the kernel computes with the mask, and which without."""
    return listed(mask.kv_num_blocks, mask.kv_indices), listed(mask.full_kv_num_blocks, mask.full_kv_indices)


@pytest.mark.parametrize("length", [1, 128, 300, 640, 700])
@pytest.mark.parametrize(
    ("window", "causal"), [(None, True), (40, False), (128, False), (200, True), (10**4, False), (None, False)]
)
@pytest.mark.parametrize("shares", [(1.0, 0.4, 0.0), None])
def test_the_blocks_found_from_their_corners_are_those_that_pytorch_finds(
    length: int, window: int | None, causal: bool, shares: tuple[float, ...] | None
) -> None:
    mask = None if shares is None else padding([int(share * length) for share in shares], length)
    ours = FlexBias(table(length), window, mask, causal).block_mask
    if ours is None:
        assert window is None and not causal and mask is None
        return
    batch = None if mask is None else len(mask)
    theirs = create_block_mask(ours.mask_mod, batch, None, length, length, device="cpu")
    (some, every), (their_some, their_every) = blocks(ours), blocks(theirs)
    assert every == their_every and some >= their_some
    superfluous = some - their_some - their_every  # where a window and an utterance end in one block; one a row at most
    assert len(superfluous) == len({(b, row) for b, row, _ in superfluous}) and (mask is not None or not superfluous)
    assert ours.seq_lengths == theirs.seq_lengths


def test_a_window_skips_most_blocks_of_a_long_utterance() -> None:
    assert FlexBias(table(3000), 128).block_mask.sparsity() > 85
    assert FlexBias(table(3000)).block_mask is None


def test_the_block_mask_is_built_once_for_all_layers() -> None:
    bias = FlexBias(table(9), 3)
    assert bias.block_mask is bias.block_mask


def test_gradients_on_cpu_are_refused_and_inference_is_not() -> None:
    q, k, v = inputs(1, 9)
    q.requires_grad_()
    with pytest.raises(ConfigError, match="no backward pass on CPU"):
        FlexBias(table(9)).attend(q, k, v)
    with pytest.raises(ConfigError, match="no backward pass on CPU"):
        FlexBias(table(9).requires_grad_()).attend(q.detach(), k, v)
    with torch.no_grad():
        out = FlexBias(table(9).requires_grad_()).attend(q, k, v)
    torch.testing.assert_close(out, attend_eager(q.detach(), k, v, bias=FlexBias(table(9)).dense()))


def test_inference_on_cpu_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FlexBias(table(9), 3).attend(*inputs(1, 9))


def test_what_the_kernel_cannot_do_is_refused() -> None:
    q, k, v = inputs(1, 9)
    with pytest.raises(ConfigError, match="dropout"):
        FlexBias(table(9)).attend(q, k, v, dropout=0.1)
    with pytest.raises(ConfigError, match="built for 8"):
        FlexBias(table(8)).attend(q, k, v)
    with pytest.raises(ConfigError, match="built for 9"):
        FlexBias(table(9)).attend(q, k[:, :, :5], v[:, :, :5])
    with pytest.raises(ConfigError, match="2 heads"):
        FlexBias(table(9, rows=2)).attend(q, k, v)
    for make, message in (
        (lambda: FlexBias(torch.zeros(3, 8)), "2T-1"),
        (lambda: FlexBias(table(9), None, padding([5], 8)), "mask"),
        (lambda: FlexBias(table(9), None, torch.ones(1, 9)), "mask"),
        (lambda: FlexBias(table(9), -1), "window"),
    ):
        with pytest.raises(ConfigError, match=message):
            make()


def test_another_length_or_padding_is_not_compiled_again() -> None:
    counter = CompileCounter()
    compiled = torch.compile(flex_attention, dynamic=True, backend=counter)
    for lens in ([600, 200], [600, 100], [411, 7], [555, 130]):
        bias = FlexBias(table(max(lens)), 40, padding(lens, max(lens)))
        arguments = inputs(2, max(lens))
        out = compiled(*arguments, score_mod=bias.score_mod(HEADS), block_mask=bias.block_mask)
        torch.testing.assert_close(out, attend_eager(*arguments, bias=bias.dense()))
    assert counter.frame_count == 1
