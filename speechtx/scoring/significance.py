"""How sure an error rate is: bootstrap over utterances (Bisani and Ney, ICASSP 2004).

Utterances are drawn with replacement, and the rate is taken over each draw as errors over reference units.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from speechtx.config.errors import ScoringError

DRAWS = 10_000
_SEED = 20_040_517  # fixed, so that the same counts always give the same interval
_CHUNK = 4_000_000  # drawn indices held at a time


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two systems on the same utterances.

    Attributes:
        difference: rate of A minus rate of B, percent absolute; negative where A is better.
        low, high: 95 % interval of the difference.
        a_better: share of the draws in which A has the lower rate; ties count half.
    """

    difference: float
    low: float
    high: float
    a_better: float

    @property
    def significant(self) -> bool:
        """The interval does not hold zero."""
        return self.low > 0 or self.high < 0


def bootstrap_interval(errors: npt.ArrayLike, reference: npt.ArrayLike, *, draws: int = DRAWS) -> tuple[float, float]:
    """The 95 % interval of the error rate in percent.

    Args:
        errors: (N,) errors of every utterance.
        reference: (N,) reference units of every utterance.
        draws: number of bootstrap draws.

    Raises:
        ScoringError: no utterances, lengths that differ, or no reference units.
    """
    counts = _matrix([errors], reference)
    low, high = np.percentile(_rates(counts, draws)[0], [2.5, 97.5])
    return float(low), float(high)


def paired_bootstrap(
    errors_a: npt.ArrayLike, errors_b: npt.ArrayLike, reference: npt.ArrayLike, *, draws: int = DRAWS
) -> Comparison:
    """Compares two systems; every draw takes the same utterances for both.

    Args:
        errors_a: (N,) errors of system A.
        errors_b: (N,) errors of system B on the same utterances in the same order.
        reference: (N,) reference units.
        draws: number of bootstrap draws.

    Raises:
        ScoringError: as `bootstrap_interval`.
    """
    counts = _matrix([errors_a, errors_b], reference)
    rate_a, rate_b = _rates(counts, draws)
    low, high = np.percentile(rate_a - rate_b, [2.5, 97.5])
    total = counts.sum(axis=0)
    return Comparison(
        difference=float(100.0 * (total[0] - total[1]) / total[2]),
        low=float(low),
        high=float(high),
        a_better=float(np.mean(rate_a < rate_b) + 0.5 * np.mean(rate_a == rate_b)),
    )


def _matrix(errors: list[npt.ArrayLike], reference: npt.ArrayLike) -> npt.NDArray[np.int64]:
    columns = [np.asarray(column, dtype=np.int64) for column in (*errors, reference)]
    if len({column.shape for column in columns}) != 1 or columns[0].ndim != 1:
        raise ScoringError(f"error and reference counts differ in shape: {[column.shape for column in columns]}")
    if columns[-1].sum() <= 0:
        raise ScoringError("no reference units to bootstrap over")
    return np.stack(columns, axis=1)


def _rates(counts: npt.NDArray[np.int64], draws: int) -> npt.NDArray[np.float64]:
    """(systems, draws) rates in percent. A draw of nothing but empty references has no rate and is left out."""
    rng = np.random.default_rng(_SEED)
    step = max(1, _CHUNK // len(counts))
    sums = [
        counts[rng.integers(len(counts), size=(min(step, draws - start), len(counts)))].sum(axis=1)
        for start in range(0, draws, step)
    ]
    drawn = np.concatenate(sums)
    drawn = drawn[drawn[:, -1] > 0]
    return np.asarray(100.0 * drawn[:, :-1] / drawn[:, -1:], dtype=np.float64).T
