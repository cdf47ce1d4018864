"""Keeps the memory of a step for the next one, instead of giving it back to the system in between."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LARGEST = 2**31 - 1  # an int


def keep_freed_memory() -> bool:
    """Lets glibc's malloc, which PyTorch's CPU tensors come from, keep what is freed, for this process from now on.

    By default memory of large tensors goes back to the system when they are freed, and a training step frees all of its
    activations: the next one pays for thousands of page faults, a tenth of its time. The process then stays as large as its
    largest step made it.

    Returns:
        Whether there is such a malloc; elsewhere nothing changes.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return mallopt is not None and all(mallopt(option, LARGEST) == 1 for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD))
