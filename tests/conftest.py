"""Shared by all tests: one thread a process, and the optional folder with real recordings."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before anything imports torch or NumPy: two pytest workers on two cores must not start four threads, and sums
# in a fixed order make bit-for-bit comparisons meaningful.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[variable] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _denormals_again() -> Iterator[None]:
    """Training switches the processor to flush denormal numbers to zero; the next test must not see that."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)


@pytest.fixture(scope="session")
def repo() -> Path:
    """The repository's root."""
    return REPO


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder `shared/data` beside the checkout, with the original AN4 and yesno archives; skips where it is absent."""
    path = REPO.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"no folder {path}: the archives of real corpora are not on this machine")
    return path
