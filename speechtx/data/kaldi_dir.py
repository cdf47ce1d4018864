"""A data directory with Kaldi's contracts: reading, writing and validating it; docs/data_dir.md describes the files."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path

from speechtx.config.errors import DataError
from speechtx.data.kaldi_checks import check_data_dir
from speechtx.data.kaldi_table import TABLES, format_table, read_table

Tables = dict[str, dict[str, str]]
"""The tables of a directory by file name, each a dict from key to value."""

CARRIED = ("fbank.yaml", "global_cmvn.ark")
"""Files beside the tables that belong to the features."""


@dataclass(frozen=True, kw_only=True)
class DataDirSummary:
    """What a valid directory holds, and warnings about it."""

    utterances: int
    speakers: int
    recordings: int
    warnings: tuple[str, ...]


def spk2utt_of(utt2spk: Mapping[str, str]) -> dict[str, str]:
    """The inverse of `utt2spk`: speaker to its utterances, in C order, separated by spaces."""
    utterances: dict[str, list[str]] = {}
    for utt in sorted(utt2spk):
        utterances.setdefault(utt2spk[utt], []).append(utt)
    return {speaker: " ".join(utts) for speaker, utts in sorted(utterances.items())}


def restrict(tables: Mapping[str, Mapping[str, str]], utterances: Set[str]) -> Tables:
    """Keeps some utterances, the recordings they are cut from and the speakers who said them."""
    speakers = {tables["utt2spk"][utt] for utt in utterances}
    segments = tables.get("segments")
    recordings: Set[str] = utterances
    if segments is not None:
        recordings = {segments[utt].split(" ", 1)[0] for utt in utterances if utt in segments}
    keep: dict[str, Set[str]] = {"utterance": utterances, "recording": recordings, "speaker": speakers}
    return {
        name: {key: value for key, value in values.items() if key in keep[TABLES[name].keys]} for name, values in tables.items()
    }


def read_data_dir(path: str | Path) -> Tables:
    """Reads every table of a directory that is there; `utt2spk` must be.

    Raises:
        DataError: no such directory, no `utt2spk` or an empty one, or a table that is wrong by itself; whether tables agree with
            each other is the validator's question.
    """
    path = Path(path)
    if not path.is_dir():
        raise DataError(f"{path}: no such data directory")
    tables = {name: read_table(path / name, check_entries=True) for name in TABLES if (path / name).exists()}
    if "utt2spk" not in tables:
        raise DataError(f"{path / 'utt2spk'}: no such file; a data directory needs one line 'utterance speaker' per utterance")
    if not tables["utt2spk"]:
        raise DataError(f"{path / 'utt2spk'}: no utterances")
    return tables


def write_data_dir(dest: str | Path, tables: Mapping[str, Mapping[str, str]], carried: Mapping[str, Path]) -> None:
    """Writes a data directory; `spk2utt` is derived from `utt2spk`.

    A new directory appears whole or not at all. In one that exists already only the files of a data directory are replaced
    or removed; `utt2spk` goes first and comes back last, so that an interruption cannot pass for a complete directory.

    Args:
        dest: the directory, made with its parents.
        tables: the tables by file name.
        carried: files to copy, by their name in `dest` (see `CARRIED`).

    Raises:
        DataError: `dest` is a file, or cannot be written.
    """
    dest = Path(dest)
    contents = {**tables, "spk2utt": spk2utt_of(tables["utt2spk"])}
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{dest.name}.", dir=dest.parent) as staging:
            new = Path(staging) / "new"
            new.mkdir()
            for name, values in contents.items():
                (new / name).write_bytes(format_table(values))
            for name, source in carried.items():
                shutil.copyfile(source, new / name)
            if not dest.exists():
                os.replace(new, dest)
                return
            (dest / "utt2spk").unlink(missing_ok=True)
            for name in sorted({*TABLES, *CARRIED} - {"utt2spk"}):
                if (new / name).exists():
                    os.replace(new / name, dest / name)
                else:
                    (dest / name).unlink(missing_ok=True)
            os.replace(new / "utt2spk", dest / "utt2spk")
    except OSError as err:
        raise DataError(f"{dest}: cannot be written: {err}") from None


def validate_data_dir(
    path: str | Path,
    *,
    feats: bool = False,
    text: bool = True,
    wav: bool = True,
    allow_pipes: bool = False,
    check_files: bool = True,
    speaker_order: bool = True,
    limit: int = 10,
) -> DataDirSummary:
    """Validates a data directory; the arguments are those of `check_data_dir`.

    Raises:
        DataError: lists the problems with file, line, entry and remedy.
    """
    findings, tables = check_data_dir(
        path,
        feats=feats,
        text=text,
        wav=wav,
        allow_pipes=allow_pipes,
        check_files=check_files,
        speaker_order=speaker_order,
        limit=limit,
    )
    count = findings.num_errors
    if count:
        raise DataError("\n".join([f"{path}: {count:,} problem{'s' * (count > 1)}", *findings.report()]))
    return DataDirSummary(
        utterances=len(tables["utt2spk"].values),
        speakers=len(tables["spk2utt"].values),
        recordings=len(tables["wav.scp"].values) if "wav.scp" in tables else 0,
        warnings=tuple(findings.report(warnings=True)),
    )
