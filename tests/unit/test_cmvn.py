"""CMVN: statistics add up, normalisation does what its name says, and nothing divides by zero."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from speechtx.config.errors import DataError
from speechtx.frontend.cmvn import VARIANCE_FLOOR, CmvnStats, apply_cmvn

feats_matrices = hnp.arrays(np.float32, st.tuples(st.integers(2, 60), st.just(4)), elements=st.floats(-20, 20, width=32))


@given(feats=feats_matrices, data=st.data())
def test_statistics_of_parts_add_up_to_those_of_the_whole(feats: np.ndarray, data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, len(feats) - 1))
    whole, parts = CmvnStats.from_feats(feats), CmvnStats.from_feats(feats[:cut]) + CmvnStats.from_feats(feats[cut:])
    np.testing.assert_allclose(parts.to_matrix(), whole.to_matrix(), rtol=1e-12, atol=1e-9)


@given(feats=feats_matrices)
def test_kaldis_layout_survives_a_round_trip(feats: np.ndarray) -> None:
    matrix = CmvnStats.from_feats(feats).to_matrix()
    assert matrix.shape == (2, 5)
    assert matrix.dtype == np.float64
    assert matrix[0, -1] == len(feats)
    np.testing.assert_allclose(matrix[0, :-1], feats.sum(axis=0, dtype=np.float64), atol=1e-9)
    np.testing.assert_allclose(matrix[1, :-1], (feats.astype(np.float64) ** 2).sum(axis=0), rtol=1e-12)
    assert np.array_equal(CmvnStats.from_matrix(matrix).to_matrix(), matrix)


@given(feats=feats_matrices)
def test_normalised_features_have_mean_zero_and_variance_one(feats: np.ndarray) -> None:
    stats = CmvnStats.from_feats(feats)
    normalised = apply_cmvn(feats, stats, norm_vars=True)
    assert normalised.dtype == np.float32
    wide = normalised.astype(np.float64)
    moving = feats.var(axis=0, dtype=np.float64) > 2 * VARIANCE_FLOOR
    np.testing.assert_allclose(wide.mean(axis=0)[moving], 0.0, atol=2e-4)
    np.testing.assert_allclose(wide.var(axis=0)[moving], 1.0, atol=1e-3)
    assert np.isfinite(normalised).all()


def test_without_variance_normalisation_only_the_mean_moves() -> None:
    feats = np.random.default_rng(0).normal(3.0, 5.0, (50, 4)).astype(np.float32)
    shifted = apply_cmvn(feats, CmvnStats.from_feats(feats), norm_vars=False)
    np.testing.assert_allclose(shifted, feats - feats.mean(axis=0), atol=1e-5)


def test_a_bin_that_never_changes_becomes_zero_not_nan() -> None:
    feats = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    feats[:, 2] = -15.942385
    normalised = apply_cmvn(feats, CmvnStats.from_feats(feats), norm_vars=True)
    assert np.isfinite(normalised).all()
    np.testing.assert_allclose(normalised[:, 2], 0.0, atol=1e-3)


def test_means_stay_exact_over_many_frames() -> None:
    """Ten million frames of -15.9 would drift by per cents if summed in float32."""
    block = CmvnStats.from_feats(np.full((100_000, 1), -15.9, np.float32))
    total = block
    for _ in range(99):
        total = total + block
    assert total.mean[0] == pytest.approx(float(np.float32(-15.9)), rel=1e-12)
    assert total.variance[0] == VARIANCE_FLOOR


def test_the_input_is_not_changed() -> None:
    feats = np.ones((3, 4), np.float32)
    apply_cmvn(feats, CmvnStats.from_feats(feats), norm_vars=True)
    assert (feats == 1).all()


@pytest.mark.parametrize(
    ("matrix", "why"),
    [
        (np.zeros((3, 5)), "2 rows"),
        (np.zeros(5), "2 rows"),
        (np.zeros((2, 5)), "count of 0.0"),
        (np.full((2, 5), np.nan), "finite"),
    ],
)
def test_matrices_that_are_no_statistics_are_refused(matrix: np.ndarray, why: str) -> None:
    with pytest.raises(DataError, match=why):
        CmvnStats.from_matrix(matrix)


def test_another_number_of_bins_is_refused() -> None:
    stats = CmvnStats.from_feats(np.ones((3, 4), np.float32))
    with pytest.raises(DataError, match="4 bins"):
        apply_cmvn(np.ones((3, 5), np.float32), stats, norm_vars=True)
    with pytest.raises(DataError, match="4 and 5 bins"):
        _ = stats + CmvnStats.from_feats(np.ones((3, 5), np.float32))
