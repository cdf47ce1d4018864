"""Writing a file whole or not at all: a temporary file in the same directory, flushed to disk, then renamed over the target."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def replacing(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """Opens a temporary file that becomes `path` when the block ends without an exception, and vanishes otherwise.

    Args:
        path: the file to create or replace; its directory must exist.
        mode: "w" (UTF-8 text, LF) or "wb".

    Raises:
        OSError: the directory is not writable or the disk is full; `path` keeps its old content.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    binary = "b" in mode
    try:
        with open(handle, mode, encoding=None if binary else "utf-8", newline=None if binary else "\n") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Writes a small UTF-8 text file whole or not at all."""
    with replacing(path) as stream:
        stream.write(text)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
