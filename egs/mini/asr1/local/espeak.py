"""eSpeak NG through ctypes: one voice in, 16 bit samples out.

The library and its data come out of the PyPI package `espeakng-loader` (GPL-3.0; only this recipe's stage 1 loads it). The API
used is the one of `espeak-ng/speak_lib.h`, in its synchronous mode: samples arrive through a callback while `espeak_Synth` runs.

eSpeak keeps state from one utterance to the next (flutter, oscillator phases), which no call resets: the same sentence sounds
the same but differs in its samples. Whoever wants reproducible audio therefore starts a fresh process for each voice and says
the same things in the same order.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import tempfile
from pathlib import Path
from types import ModuleType

import numpy as np

from speechtx.config.errors import DataError

_SYNCHRONOUS = 2  # AUDIO_OUTPUT_SYNCHRONOUS
_DONT_EXIT = 0x8000  # espeakINITIALIZE_DONT_EXIT: report failure instead of ending the process
_UTF8 = 1  # espeakCHARS_UTF8
_IPA = 0x02  # espeakPHONEMES_IPA
_RATE, _PITCH, _RANGE, _WORDGAP = 1, 3, 4, 7  # espeak_PARAMETER
_LONGEST_PATH = 120  # eSpeak copies the path of its data into a buffer of 160 bytes and appends file names
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class Espeak:
    """The library, initialised; there can be one in a process.

    Attributes:
        sample_rate: of what `say` returns, in Hz (22050).

    Raises:
        DataError: `espeakng-loader` is not installed, or the library does not start.
    """

    def __init__(self) -> None:
        package = _package()
        try:
            self._lib = ctypes.CDLL(package.get_library_path())
        except OSError as error:
            raise DataError(f"eSpeak NG cannot be loaded on this machine: {error}") from error
        self._declare()
        self._short = None
        data = Path(package.get_data_path())
        if len(os.fsencode(data)) > _LONGEST_PATH:
            self._short = tempfile.TemporaryDirectory(prefix="espeak")
            link = Path(self._short.name) / "espeak-ng-data"
            link.symlink_to(data, target_is_directory=True)
            data = link
        self.sample_rate: int = self._lib.espeak_Initialize(_SYNCHRONOUS, 0, os.fsencode(data), _DONT_EXIT)
        if self.sample_rate <= 0:
            raise DataError(f"eSpeak NG does not start with its data in {data}")
        self._chunks: list[bytes] = []
        self._callback = _CALLBACK(self._receive)  # kept: the library holds only a pointer
        self._lib.espeak_SetSynthCallback(self._callback)

    def _declare(self) -> None:
        lib = self._lib
        lib.espeak_Initialize.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_int]
        lib.espeak_Info.argtypes = [ctypes.c_void_p]
        lib.espeak_Info.restype = ctypes.c_char_p
        lib.espeak_SetVoiceByName.argtypes = [ctypes.c_char_p]
        lib.espeak_SetParameter.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int]
        unsigned = ctypes.c_uint
        lib.espeak_Synth.argtypes = [
            ctypes.c_char_p, ctypes.c_size_t, unsigned, ctypes.c_int, unsigned, unsigned, ctypes.c_void_p, ctypes.c_void_p,
        ]  # fmt: skip
        lib.espeak_TextToPhonemes.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_int, ctypes.c_int]
        lib.espeak_TextToPhonemes.restype = ctypes.c_char_p

    def _receive(self, samples: ctypes._Pointer[ctypes.c_short], count: int, _events: object) -> int:
        if count > 0 and samples:
            self._chunks.append(ctypes.string_at(samples, 2 * count))
        return 0

    @property
    def version(self) -> str:
        """eSpeak NG's version, such as `1.52`."""
        return self._lib.espeak_Info(None).decode()

    def set_voice(self, name: str) -> None:
        """Chooses language and variant, such as `en-us+f3`.

        Raises:
            DataError: there is no such language. (An unknown variant is not reported by eSpeak; `variants` lists them.)
        """
        if self._lib.espeak_SetVoiceByName(name.encode()) != 0:
            raise DataError(f"eSpeak NG has no voice {name!r}")

    def set_style(self, *, rate: int, pitch: int, pitch_range: int, word_gap: int) -> None:
        """Sets the manner of speaking.

        Args:
            rate: words a minute, 80 to 450.
            pitch: 0 to 100; 50 is the voice's own.
            pitch_range: 0 (monotone) to 100.
            word_gap: pause between words, in units of 10 ms at normal speed.
        """
        for parameter, value in ((_RATE, rate), (_PITCH, pitch), (_RANGE, pitch_range), (_WORDGAP, word_gap)):
            self._lib.espeak_SetParameter(parameter, value, 0)

    def say(self, text: str) -> np.ndarray:
        """Speaks `text`; int16 samples (N,) at `sample_rate`.

        Raises:
            DataError: eSpeak reports a failure or produces nothing.
        """
        self._chunks.clear()
        data = text.encode()
        status = self._lib.espeak_Synth(data, len(data) + 1, 0, 1, 0, _UTF8, None, None)
        self._lib.espeak_Synchronize()
        samples = np.frombuffer(b"".join(self._chunks), dtype=np.int16)
        if status != 0 or not samples.size:
            raise DataError(f"eSpeak NG could not say {text!r} (status {status}, {samples.size} samples)")
        return samples

    def phonemes(self, text: str) -> str:
        """How `text` is pronounced, in IPA."""
        buffer = ctypes.create_string_buffer(text.encode())
        rest = ctypes.c_void_p(ctypes.addressof(buffer))
        clauses = []
        while rest.value:
            clauses.append(self._lib.espeak_TextToPhonemes(ctypes.byref(rest), _UTF8, _IPA).decode())
        return " ".join(clauses)


def variants() -> list[str]:
    """Names of the voice variants that come with the library, such as `f3`.

    Raises:
        DataError: `espeakng-loader` is not installed.
    """
    return sorted(path.name for path in Path(_package().get_data_path(), "voices", "!v").iterdir())


def _package() -> ModuleType:
    try:
        return importlib.import_module("espeakng_loader")
    except ImportError as error:
        raise DataError(
            "the synthesiser is missing: Python package espeakng-loader. Run tools/install.sh, or pip install espeakng-loader"
        ) from error
