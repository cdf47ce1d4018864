"""Repairing a data directory: what has one right answer is repaired, the rest is refused with file and line."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from speechtx.config.errors import DataError
from speechtx.data.kaldi_checks import Findings
from speechtx.data.kaldi_dir import Tables, restrict, spk2utt_of
from speechtx.data.kaldi_table import TABLES, Kind, format_table, is_pipe, parse_segment, scan_table, write_table

BACKUP = ".backup"
_REPAIRS: dict[Kind, str] = {
    "bom": "byte order mark removed",
    "crlf": "lines with a Windows ending",
    "no-newline": "newline added at the end",
    "blank": "blank lines removed",
    "spacing": "lines with stray blanks",
    "duplicate": "repeated lines removed",
    "order": "lines moved into C order",
}


@dataclass(frozen=True, kw_only=True)
class FixReport:
    """What a repair did.

    Attributes:
        kept: number of utterances left.
        dropped: utterance to the reason why it went.
        repairs: number of repairs by 'file: what'.
        changed: names of the tables that were written anew; none if nothing was wrong.
        backup: where the tables lie as they were before, if any changed.
    """

    kept: int
    dropped: dict[str, str]
    repairs: dict[str, int]
    changed: tuple[str, ...]
    backup: Path | None


def fix_data_dir(path: str | Path, *, drop_missing_audio: bool = False) -> FixReport:
    """Sorts, cleans and reconciles the tables of a directory in place, and keeps the old ones in `.backup/`.

    An utterance stays if `utt2spk` and every other table of utterances that is there have a usable entry for it, and its
    recording is in `wav.scp`. `spk2utt` is derived anew. All tables are read and decided on before the first is written.

    Args:
        path: the directory.
        drop_missing_audio: also drop utterances whose audio file does not exist.

    Raises:
        DataError: something that only a person can decide (not UTF-8, NUL bytes, one key with two values, an unusable id),
            each with file and line; or no utterance would be left. Nothing is written then.
    """
    path = Path(path)
    if not path.is_dir():
        raise DataError(f"{path}: no such data directory")
    if not (path / "utt2spk").exists():
        raise DataError(
            f"{path / 'utt2spk'}: no such file, and nothing tells who speaks; write one line 'utterance speaker' each"
        )
    repairs: dict[str, int] = {}
    tables = _read(path, repairs)
    reasons = _unusable(tables, drop_missing_audio=drop_missing_audio)
    kept = tables["utt2spk"].keys() - reasons.keys()
    if not kept:
        examples = "".join(f"\n  {utt}: {reason}" for utt, reason in sorted(reasons.items())[:10])
        raise DataError(f"{path}: no utterance would be left, so nothing was changed:{examples}")
    tables = restrict(tables, kept)
    tables["spk2utt"] = spk2utt_of(tables["utt2spk"])
    changed = tuple(name for name, values in tables.items() if _bytes(path / name) != format_table(values))
    backup = _back_up(path) if changed else None
    for name in changed:
        write_table(path / name, tables[name])
    return FixReport(kept=len(kept), dropped=reasons, repairs=repairs, changed=changed, backup=backup)


def _read(path: Path, repairs: dict[str, int]) -> Tables:
    """Reads all tables but `spk2utt`, counts what is repaired on the way, and refuses what cannot be."""
    findings = Findings()
    tables: Tables = {}
    for name, spec in TABLES.items():
        if name == "spk2utt" or not (path / name).exists():
            continue

        def note(kind: Kind, line: int, message: str, name: str = name) -> None:
            if kind in _REPAIRS:
                repairs[f"{name}: {_REPAIRS[kind]}"] = repairs.get(f"{name}: {_REPAIRS[kind]}", 0) + 1
            elif kind != "value":  # an entry with an unusable value is dropped further on
                findings.add(kind, path / name, line, message)

        values = scan_table(path / name, report=note).values
        if name == "text":
            # str.split() also splits at no-break and ideographic spaces, which validation refuses.
            values = {utt: " ".join(words.split()) for utt, words in values.items()}
        # An utterance needs its entry, so its loss is reported; a bad entry of a speaker or a recording just goes.
        tables[name] = values if spec.keys == "utterance" else {key: v for key, v in values.items() if spec.check(v) is None}
    if findings.num_errors:
        listed = "\n".join(findings.report())
        raise DataError(f"{path}: nothing was changed, because these must be decided by hand first:\n{listed}")
    return tables


def _unusable(tables: Tables, *, drop_missing_audio: bool) -> dict[str, str]:
    """Which utterances cannot stay, and why, in C order."""
    reasons: dict[str, str] = {}
    utterance_tables = {name: values for name, values in tables.items() if TABLES[name].keys == "utterance"}
    everyone = set().union(*utterance_tables.values())
    wav, segments = tables.get("wav.scp"), tables.get("segments")
    if wav is not None and segments is None:
        everyone |= wav.keys()
    for utt in sorted(everyone):
        reason = next(filter(None, (_entry_problem(name, values, utt) for name, values in utterance_tables.items())), None)
        if reason is None and wav is not None:
            recording = parse_segment(segments[utt]).recording if segments is not None else utt
            if recording not in wav:
                reason = f"recording {recording} is not in wav.scp" if segments is not None else "not in wav.scp"
            elif drop_missing_audio and not is_pipe(wav[recording]) and not os.path.isfile(wav[recording]):
                reason = f"no such audio file: {wav[recording]}"
        if reason:
            reasons[utt] = reason
    return reasons


def _entry_problem(name: str, values: dict[str, str], utt: str) -> str | None:
    if utt not in values:
        # utt2speed names only those whose speed is changed.
        return None if name == "utt2speed" else f"not in {name}"
    problem = TABLES[name].check(values[utt])
    return f"{name}: {problem.split(';')[0]}" if problem else None


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _back_up(path: Path) -> Path:
    """Copies all tables to `.backup/`, which holds the state before the latest repair."""
    backup = path / BACKUP
    try:
        with tempfile.TemporaryDirectory(prefix=f"{BACKUP}.", dir=path) as staging:
            new = Path(staging) / "new"
            new.mkdir()
            for name in TABLES:
                if (path / name).exists():
                    shutil.copy2(path / name, new / name)
            if backup.exists():
                os.replace(backup, Path(staging) / "old")
            os.replace(new, backup)
    except OSError as err:
        raise DataError(f"{backup}: cannot be written, so nothing was changed: {err}") from None
    return backup
