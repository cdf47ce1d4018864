#!/usr/bin/env python3
"""Prints what is installed of what speechtx needs, and proves that the parts work. Standard library only.

    python3 tools/check_install.py            everything, each part tried out; exit status 1 if a required one is missing
    python3 tools/check_install.py --quick    the Python packages only, without importing them: silent when all are there
    python3 tools/check_install.py --sclite [PROGRAM]   sclite only

It runs with any Python from 3.11 on, before anything else is installed, and reports on the Python that runs it.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
MIN_PYTHON = (3, 11)
INSTALL = "tools/install.sh"
COLOURS = {"ok": "32", "optional": "33", "MISSING": "31", "BROKEN": "31"}


class NotThereError(Exception):
    """The part is not installed."""


class BrokenError(Exception):
    """The part is installed but does not do what it is needed for."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One thing speechtx needs; `probe` returns its version, or raises one of the errors above."""

    name: str
    why: str
    fix: str
    probe: Callable[[], str]
    required: bool = True


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    name: str
    status: str  # ok, optional, MISSING, BROKEN
    version: str
    why: str
    fix: str = ""

    @property
    def failed(self) -> bool:
        return self.status in ("MISSING", "BROKEN")


def examine(part: Part) -> Row:
    """Runs one probe; an exception of any kind is a row of the table, never a crash."""
    try:
        return Row(name=part.name, status="ok", version=part.probe(), why=part.why)
    except NotThereError as err:
        status = "MISSING" if part.required else "optional"
        return Row(name=part.name, status=status, version=str(err) or "-", why=part.why, fix=part.fix)
    except Exception as err:  # a shared library that does not load raises whatever it likes
        message = str(err).strip().splitlines()
        reason = message[0] if message else type(err).__name__
        status = "BROKEN" if part.required else "optional"
        return Row(name=part.name, status=status, version=reason, why=part.why, fix=part.fix)


# ------------------------------------------------------------------------------------------------------ python


def probe_python(version: tuple[int, ...] = tuple(sys.version_info[:3])) -> str:
    found = ".".join(map(str, version))
    if version[:2] < MIN_PYTHON:
        raise BrokenError(f"{found} is too old")
    return f"{found}, {'virtual environment ' + sys.prefix if sys.prefix != sys.base_prefix else 'no virtual environment'}"


def installed_version(distribution: str) -> str:
    """The version in a distribution's metadata, without importing it."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        raise NotThereError from None


def package(distribution: str, module: str, *, quick: bool, attempt: Callable[[], str] | None = None) -> Callable[[], str]:
    """A probe for a Python package: it is installed, it imports, and `attempt` (which may add words to the version) works."""

    def probe() -> str:
        version = installed_version(distribution)
        if importlib.util.find_spec(module) is None:
            raise BrokenError(f"{version} is registered, but there is no module {module}")
        if quick:
            return version
        importlib.import_module(module)
        words = attempt() if attempt else ""
        return f"{version}, {words}" if words else version

    return probe


def try_torch() -> str:
    import torch

    if not torch.equal(torch.ones(2, 2) @ torch.ones(2, 2), torch.full((2, 2), 2.0)):
        raise BrokenError(f"{torch.__version__}: a matrix product comes out wrong")
    if torch.cuda.is_available():
        return f"CUDA {torch.version.cuda} on {torch.cuda.get_device_name(0)}"
    if shutil.which("nvidia-smi") and torch.version.cuda is None:
        return f"CPU only, though this machine has an NVIDIA driver: {INSTALL} --cuda"
    return f"built for CUDA {torch.version.cuda}, but no GPU can be used here" if torch.version.cuda else "CPU"


def try_torchaudio() -> str:
    import torch
    import torchaudio.functional
    from torchaudio.compliance import kaldi

    wave = torch.sin(torch.arange(1600, dtype=torch.float32)).unsqueeze(0)
    if kaldi.fbank(wave, num_mel_bins=80).shape != (8, 80):
        raise BrokenError("compliance.kaldi.fbank does not give (8, 80) for 0.1 s")
    if torchaudio.functional.resample(wave, 16000, 8000).shape != (1, 800):
        raise BrokenError("functional.resample does not halve the number of samples")
    extension = importlib.import_module("torchaudio._extension")
    with_extension = getattr(extension, "_IS_TORCHAUDIO_EXT_AVAILABLE", False)
    return f"fbank and resample work, compiled extension {'on' if with_extension else 'off (not needed)'}"


def try_soundfile() -> str:
    import soundfile

    return f"libsndfile {soundfile.__libsndfile_version__}"


def try_espeak() -> str:
    import ctypes

    import espeakng_loader

    library = ctypes.CDLL(espeakng_loader.get_library_path())
    library.espeak_Info.restype = ctypes.c_char_p
    voices = len(list((Path(espeakng_loader.get_data_path()) / "voices" / "!v").glob("*")))
    if voices == 0:
        raise BrokenError(f"no voice variants in {espeakng_loader.get_data_path()}")
    return f"eSpeak NG {library.espeak_Info(None).decode().split()[0]}, {voices} voice variants"


# ------------------------------------------------------------------------------------------------------ sclite


def sclite_candidates() -> list[Path]:
    """Where sclite may lie, in the order of speechtx/scoring/sclite.py, which this file cannot import before it is installed."""
    named = os.environ.get("SPEECHTX_SCLITE")
    if named:
        return [Path(named)]
    on_path = shutil.which("sclite")
    places = [Path(on_path)] if on_path else []
    places += [REPO / "tools/sctk/bin/sclite", Path("/usr/lib/sctk/bin/sclite")]
    return [place for place in places if place.is_file() and os.access(place, os.X_OK)]


def verify_sclite(program: Path) -> str:
    """Shows that `program` is NIST's sclite: by its banner, and by counting a pair of lines right.

    Returns:
        The versions in its banner.

    Raises:
        BrokenError: it cannot be run, is another program, or counts wrong.
    """
    banner = _run([str(program)])
    versions = re.search(r"sclite Version: (\S+), SCTK Version: (\S+)", banner)
    if versions is None:
        raise BrokenError(f"{program} is not NIST's sclite: run without arguments it does not print its version")
    with tempfile.TemporaryDirectory() as folder:
        ref, hyp = Path(folder, "ref.trn"), Path(folder, "hyp.trn")
        ref.write_text("one two three four (spk-1)\nfive six (spk-2)\n", encoding="utf-8")
        hyp.write_text("one too three (spk-1)\nfive six seven (spk-2)\n", encoding="utf-8")
        report = _run([str(program), "-r", str(ref), "trn", "-h", str(hyp), "trn", "-i", "rm", "-o", "rsum", "stdout"])
    total = re.search(r"\|\s*Sum\s*\|([^|]*)\|([^|]*)\|", report)
    # 2 sentences, 6 words; 4 right, 1 substituted, 1 deleted, 1 inserted, 3 errors, 2 wrong sentences
    expected = ["2", "6", "4", "1", "1", "1", "3", "2"]
    if total is None or total.group(1).split() + total.group(2).split()[:6] != expected:
        raise BrokenError(f"{program} miscounts two lines with one substitution, one deletion and one insertion")
    return f"{versions.group(1)} (SCTK {versions.group(2)}), counts right: {program}"


def probe_sclite() -> str:
    candidates = sclite_candidates()
    if not candidates:
        try:
            importlib.metadata.version("sctk")
        except importlib.metadata.PackageNotFoundError:
            raise NotThereError from None
        raise NotThereError("PyPI's package `sctk` is installed, but that is a biology package, not NIST's")
    problems = []
    for program in candidates:
        try:
            return verify_sclite(program)
        except BrokenError as err:
            problems.append(str(err))
    raise BrokenError("; ".join(problems))


def _run(command: list[str]) -> str:
    """What a program prints on both streams, whatever its exit status: sclite's usage ends with 1."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as err:
        raise BrokenError(f"{command[0]} cannot be run: {err}") from None
    return done.stdout.decode("utf-8", errors="replace")


# ------------------------------------------------------------------------------------------------------- table


def packages(*, quick: bool) -> list[Part]:
    """Python and its packages, in the order of the table, under the names of setup.py."""

    def python(
        name: str,
        why: str,
        module: str = "",
        *,
        attempt: Callable[[], str] | None = None,
        required: bool = True,
        fix: str = INSTALL,
    ) -> Part:
        probe = package(name, module or name, quick=quick, attempt=attempt)
        return Part(name=name, why=why, probe=probe, required=required, fix=fix)

    return [
        Part(
            name="python",
            why="everything",
            probe=probe_python,
            fix="install Python 3.11 or newer (Debian: python3.11, python3.11-venv)",
        ),
        python("speechtx", "this package"),
        python("torch", "model, training, search", attempt=try_torch),
        python("numpy", "features"),
        python("kaldiio", "ark/scp archives (default; evaluation licence)"),
        python("kaldi_native_io", "ark/scp archives (Apache-2.0 alternative)"),
        python("kaldi-native-fbank", "filterbank features", "kaldi_native_fbank"),
        python("torchaudio", "second fbank backend", attempt=try_torchaudio, required=False),
        python("soundfile", "reading audio", attempt=try_soundfile),
        python("soxr", "resampling, speed perturbation"),
        python("sentencepiece", "tokenizer"),
        python("PyYAML", "configuration", "yaml"),
        python("pydantic", "configuration"),
        python("tqdm", "progress"),
        python("rich", "tables"),
        python("tensorboard", "training curves"),
        python("matplotlib", "figures"),
        python("espeakng-loader", "speech of egs/mini", "espeakng_loader", attempt=try_espeak, required=False),
    ]


def sclite_part(program: Path | None = None) -> Part:
    """The scorer: `program`, or the first that works of those found."""
    fix = "tools/install_sctk.sh (not PyPI's `sctk`, which is a biology package)"
    probe = partial(verify_sclite, program) if program else probe_sclite
    return Part(name="sclite", why="word error rates (NIST SCTK)", probe=probe, fix=fix)


def render(rows: Iterable[Row], *, colour: bool) -> str:
    """The table as text, columns as wide as their content, with a line on what to do under every row that is not ok."""
    rows = list(rows)
    name_width = max(len(row.name) for row in rows)
    version_width = min(60, max(len(row.version) for row in rows))
    lines = [f"{'part':<{name_width}}  status    {'version':<{version_width}}  needed for"]
    for row in rows:
        status = f"{row.status:<8}"
        if colour:
            status = f"\033[{COLOURS[row.status]}m{status}\033[0m"
        lines.append(f"{row.name:<{name_width}}  {status}  {row.version:<{version_width}}  {row.why}".rstrip())
        if row.fix:
            lines.append(f"{'':<{name_width}}  what to do: {row.fix}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the Python packages, without importing them")
    parser.add_argument("--sclite", nargs="?", const="", metavar="PROGRAM", help="sclite only: the one found, or this one")
    args = parser.parse_args(argv)
    if args.sclite is not None:
        chosen = [sclite_part(Path(args.sclite) if args.sclite else None)]
    else:
        chosen = packages(quick=args.quick) + ([] if args.quick else [sclite_part()])
    rows = [examine(part) for part in chosen]
    failed = [row for row in rows if row.failed]
    if failed or not args.quick:
        print(render(rows, colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ))
    if failed:
        names = ", ".join(row.name for row in failed)
        print(f"check_install.py: error: required but missing or broken: {names}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
