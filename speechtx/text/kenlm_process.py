"""KenLM in a process of its own.

KenLM follows the offsets in a binary file unchecked. That makes it fast, and a damaged file a crash, at any time and not only
when it is opened: no check beforehand short of reading every table would find all damage. So this process never opens such a
file. Another one does, and if it crashes, hangs or answers with what is no probability, there is an error with the file's
name, here. That protects from damage; a file built to do harm does it in that other process, which runs with the same rights.
"""

from __future__ import annotations

import importlib.util
import os
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np

from speechtx.config.errors import ConfigError, DataError

_SECONDS, _BYTES_PER_SECOND = 60.0, 20e6  # how long an answer may take; opening takes longer the larger the file
_LOWEST, _HIGHEST = -1e9, 1.0  # log10 of a probability, with room for quantised back-off weights

BEGIN, NOTHING = -2, -1  # in the place of a word in a context


class KenlmProcess:
    """A KenLM model that answers for a fixed list of words.

    Args:
        path: of the file.
        words: that are asked for.
        length: words of a context; the model's order less one is all that it can see.

    Attributes:
        known: (words,) bool, which of them the model lists.

    Raises:
        ConfigError: the module `kenlm` is not installed.
        DataError: KenLM cannot read the file.
    """

    def __init__(self, path: Path, *, words: Sequence[str], length: int) -> None:
        if importlib.util.find_spec("kenlm") is None:
            raise ConfigError(
                f"{path}: a binary file of KenLM needs its Python module: {sys.executable} -m pip install 'kenlm>=0.3,<1' "
                "(compiled with a C++ compiler and CMake); or give the ARPA file that it was made from, which needs nothing"
            )
        self.path, self.length = path, length
        self._num_words = len(words)
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the process
        worker = Path(__file__).with_name("kenlm_worker.py")
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(worker), str(path.absolute()), str(length)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            bufsize=0,
        )
        weakref.finalize(self, _stop, self._process, self._errors)
        listed = "\0".join(words).encode("utf-8")
        self._send(struct.pack("i", len(listed)) + listed)
        seconds = _SECONDS + path.stat().st_size / _BYTES_PER_SECOND
        self.known = np.frombuffer(self._receive(len(words), seconds), dtype=np.bool_)

    def log10_probs(self, contexts: np.ndarray) -> np.ndarray:
        """log10 P(word | context) (K, words) float32 of contexts (K, length): word numbers, oldest first, BEGIN, NOTHING.

        Raises:
            DataError: the file is damaged: KenLM crashes, does not answer, or answers with what is no probability.
        """
        self._send(struct.pack("i", len(contexts)) + np.ascontiguousarray(contexts, dtype=np.int32).tobytes())
        answer = self._receive(4 * len(contexts) * self._num_words, _SECONDS + len(contexts))
        rows = np.frombuffer(answer, dtype=np.float32).reshape(len(contexts), self._num_words)
        if not bool(((rows > _LOWEST) & (rows < _HIGHEST)).all()):
            raise DataError(f"{self.path}: damaged: it holds what is no logarithm of a probability; build it again")
        return rows

    def _send(self, message: bytes) -> None:
        assert self._process.stdin is not None
        view = memoryview(message)
        try:
            while view:
                view = view[self._process.stdin.write(view) :]
        except BrokenPipeError:
            raise self._failure() from None

    def _receive(self, size: int, seconds: float) -> bytes:
        assert self._process.stdout is not None
        descriptor, until = self._process.stdout.fileno(), time.monotonic() + seconds
        answer = bytearray()
        while len(answer) < size:
            if not select.select([descriptor], [], [], max(0.0, until - time.monotonic()))[0]:
                self._process.kill()
                raise DataError(f"{self.path}: damaged: KenLM did not answer within {seconds:.0f} s; build it again")
            part = os.read(descriptor, size - len(answer))
            if not part:
                raise self._failure()
            answer += part
        return bytes(answer)

    def _failure(self) -> DataError:
        """Why the process ended."""
        code = self._process.wait()
        if code < 0:
            name = signal.Signals(-code).name
            return DataError(f"{self.path}: damaged: it crashes KenLM ({name}); build it again from the ARPA file")
        self._errors.seek(0)
        last = self._errors.read().decode("utf-8", "replace").strip().rpartition("\n")[2]
        return DataError(f"{self.path}: KenLM cannot read it: {last}")


def _stop(process: subprocess.Popen[bytes], errors: IO[bytes]) -> None:
    for stream in (process.stdin, process.stdout, errors):
        if stream is not None:
            stream.close()
    process.kill()
    process.wait()
