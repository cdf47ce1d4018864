"""Cepstral mean and variance normalisation, with Kaldi's statistics (transform/cmvn.cc)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from speechtx.config.errors import DataError

# A bin that hardly moves carries no information; dividing by its tiny deviation would blow rounding up to signal. Log mel
# energies of speech have variances above 1; Kaldi's floor of 1e-20 only avoids dividing by zero.
VARIANCE_FLOOR = 1e-4


@dataclass(frozen=True, eq=False)
class CmvnStats:
    """Sums over frames, in float64; statistics of parts add up to those of the whole."""

    count: float
    sums: np.ndarray  # (F,) float64
    squares: np.ndarray  # (F,) float64, sums of squares

    @classmethod
    def from_feats(cls, feats: np.ndarray) -> CmvnStats:
        """Statistics of one utterance's features (T, F)."""
        wide = np.asarray(feats, dtype=np.float64)
        return cls(float(len(wide)), wide.sum(axis=0), np.einsum("tf,tf->f", wide, wide))

    @classmethod
    def from_matrix(cls, matrix: np.ndarray) -> CmvnStats:
        """Reads Kaldi's layout: (2, F+1), sums and the count in row 0, sums of squares in row 1.

        Raises:
            DataError: the matrix has another shape, counts no frame, or holds NaN.
        """
        if matrix.ndim != 2 or matrix.shape[0] != 2 or matrix.shape[1] < 2:
            raise DataError(f"CMVN statistics must be a matrix of 2 rows and F+1 columns, found shape {matrix.shape}")
        wide = np.asarray(matrix, dtype=np.float64)
        if not np.isfinite(wide).all() or wide[0, -1] <= 0:
            raise DataError(f"CMVN statistics must be finite and count at least one frame, found a count of {wide[0, -1]}")
        return cls(float(wide[0, -1]), wide[0, :-1].copy(), wide[1, :-1].copy())

    def to_matrix(self) -> np.ndarray:
        """Kaldi's layout, (2, F+1) float64; see `from_matrix`."""
        return np.stack([np.append(self.sums, self.count), np.append(self.squares, 0.0)])

    def __add__(self, other: CmvnStats) -> CmvnStats:
        if self.sums.shape != other.sums.shape:
            raise DataError(f"CMVN statistics of {len(self.sums)} and {len(other.sums)} bins cannot be added")
        return CmvnStats(self.count + other.count, self.sums + other.sums, self.squares + other.squares)

    @property
    def mean(self) -> np.ndarray:
        """(F,) float64."""
        return self.sums / self.count

    @property
    def variance(self) -> np.ndarray:
        """(F,) float64, not below `VARIANCE_FLOOR`."""
        return np.maximum(self.squares / self.count - self.mean**2, VARIANCE_FLOOR)


def apply_cmvn(feats: np.ndarray, stats: CmvnStats, *, norm_vars: bool) -> np.ndarray:
    """Subtracts the mean and, with `norm_vars`, divides by the standard deviation.

    Args:
        feats: (T, F).
        stats: of the training set, the speaker or the utterance itself.

    Returns:
        (T, F) float32, a new array.

    Raises:
        DataError: features and statistics have different numbers of bins.
    """
    if feats.ndim != 2 or feats.shape[1] != len(stats.sums):
        raise DataError(f"features of shape {feats.shape} cannot be normalised by statistics of {len(stats.sums)} bins")
    normalised = feats - stats.mean.astype(np.float32)
    if norm_vars:
        normalised *= (1.0 / np.sqrt(stats.variance)).astype(np.float32)
    return normalised.astype(np.float32, copy=False)
