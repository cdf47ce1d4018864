"""speechtx: Kaldi-style recipes for end-to-end speech recognition with a configurable attention penalty.

Importing the package is cheap on purpose: nothing here pulls in torch until `load_recognizer` is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "load_recognizer"]

if TYPE_CHECKING:
    from speechtx.search.transcribe import load_recognizer


def __getattr__(name: str) -> Any:
    if name == "load_recognizer":
        from speechtx.search.transcribe import load_recognizer

        return load_recognizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
