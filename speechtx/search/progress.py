"""How far a decoding is: utterances, rate, real-time factor so far and time left."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tqdm import tqdm

from speechtx.search.parts import Decoded

_LOG_SECONDS = 30.0  # between two lines of progress where there is no terminal

log = logging.getLogger(__name__)


class Progress:
    """A bar on a terminal, elsewhere a line now and then, and a file for whoever watches several jobs.

    Args:
        name: shown before the numbers.
        total: results to come.
        path: holds one line `DONE TOTAL AUDIO_SECONDS DECODE_SECONDS` while the work lasts.
    """

    def __init__(self, *, name: str, total: int, path: Path) -> None:
        self.name, self.total, self.path = name, total, path
        self.count, self.audio, self.seconds = 0, 0.0, 0.0
        self.start = self.reported = time.monotonic()
        self.bar = tqdm(total=total, desc=name, unit="utt", disable=None, dynamic_ncols=True)
        self._write()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.close()
        if kind is None:
            self.path.unlink(missing_ok=True)

    def add(self, results: Sequence[Decoded]) -> None:
        """Counts what was decoded."""
        self.count += len(results)
        self.audio += sum(result.audio_seconds for result in results)
        self.seconds += sum(result.decode_seconds for result in results)
        rtf = f"{self.seconds / self.audio:.4f}" if self.audio else "-"
        self.bar.set_postfix_str(f"RTF {rtf}", refresh=False)
        self.bar.update(len(results))
        self._write()
        now = time.monotonic()
        if self.bar.disable and now - self.reported > _LOG_SECONDS:
            left = (now - self.start) / self.count * (self.total - self.count)
            rate = self.count / (now - self.start)
            log.info("%s: %d of %d utterances, %.1f/s, RTF %s, %.0f s left", self.name, self.count, self.total, rate, rtf, left)
            self.reported = now

    def _write(self) -> None:
        self.path.write_text(f"{self.count} {self.total} {self.audio:.3f} {self.seconds:.3f}\n")
