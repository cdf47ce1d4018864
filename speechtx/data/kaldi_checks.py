"""The checks of a data directory: each table by itself, then the tables against each other and against the disk.

Only tables are read. Of the audio and archives that they point to the checks look at existence and size, and no command
in `wav.scp` ever runs here.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from speechtx.config.errors import DataError
from speechtx.data.kaldi_table import FIX, TABLES, Kind, Table, is_pipe, parse_segment, scan_table

_LONG_SEGMENT = 3600.0
_ARCHIVE = re.compile(r"(?P<path>.*?)(?::(?P<offset>[0-9]{1,18}))?(?:\[[^\]]*\])?", re.DOTALL)


@dataclass(kw_only=True)
class Findings:
    """Problems found in a directory: all are counted, and of each kind in each file the first few are kept as messages."""

    limit: int = 10
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    counts: dict[tuple[str, str, bool], int] = field(default_factory=dict)

    def add(self, kind: str, where: Path, line: int | None, message: str, *, warning: bool = False) -> None:
        """Counts one problem; `kind` and the file decide which problems are of a sort."""
        key = (kind, str(where), warning)
        self.counts[key] = self.counts.get(key, 0) + 1
        if self.counts[key] <= self.limit:
            place = str(where) if line is None else f"{where}:{line}"
            (self.warnings if warning else self.errors).append(f"{place}: {message}")

    def report(self, *, warnings: bool = False) -> list[str]:
        """The messages, then one line for every sort of which there were more than the limit."""
        more = [
            f"{where}: and {count - self.limit:,} more like this ({kind})"
            for (kind, where, warning), count in self.counts.items()
            if warning == warnings and count > self.limit
        ]
        return (self.warnings if warnings else self.errors) + more

    @property
    def num_errors(self) -> int:
        """How many errors there are, kept or only counted."""
        return sum(count for (_, _, warning), count in self.counts.items() if not warning)


def check_data_dir(
    path: str | Path,
    *,
    feats: bool = False,
    text: bool = True,
    wav: bool = True,
    allow_pipes: bool = False,
    check_files: bool = True,
    speaker_order: bool = True,
    limit: int = 10,
) -> tuple[Findings, dict[str, Table]]:
    """Finds everything that is wrong with a data directory; tables that are there are checked whether required or not.

    Args:
        path: the directory.
        feats: require `feats.scp`.
        text: require `text`.
        wav: require `wav.scp`.
        allow_pipes: accept commands in `wav.scp`.
        check_files: look whether the files that tables point to exist.
        speaker_order: warn where utterances in order are not in order of their speakers too, which Kaldi's tools need.
        limit: how many problems of a sort to spell out in each file.
    """
    path = Path(path)
    findings = Findings(limit=limit)
    if not path.is_dir():
        findings.add("missing", path, None, "no such data directory")
        return findings, {}
    tables = {name: _scan(path / name, findings) for name in TABLES if (path / name).exists()}
    if not tables:
        findings.add("missing", path, None, "no data directory: none of wav.scp, text, utt2spk, ... is in it")
        return findings, {}
    _check_required(path, tables, findings, feats=feats, text=text, wav=wav)
    if "utt2spk" in tables:
        _check_utterances(tables, findings)
        _check_speakers(tables, findings, speaker_order=speaker_order)
        _check_recordings(tables, findings)
    _check_locations(tables, findings, allow_pipes=allow_pipes, check_files=check_files)
    return findings, tables


def _scan(path: Path, findings: Findings) -> Table:
    def add(kind: Kind, line: int, message: str) -> None:
        findings.add(kind, path, line, message, warning=kind == "no-newline")

    try:
        table = scan_table(path, report=add)
    except DataError as err:
        findings.add("unreadable", path, None, str(err).removeprefix(f"{path}: "))
        return Table(path=path)
    if not table.values:
        findings.add("empty", path, None, "no entries")
    return table


def _check_required(path: Path, tables: Mapping[str, Table], findings: Findings, *, feats: bool, text: bool, wav: bool) -> None:
    remedies = {
        "utt2spk": "write one line 'utterance speaker' per utterance",
        "spk2utt": f"{FIX}, which derives it from utt2spk",
        "text": "write one line 'utterance words' per utterance, or pass --no-text",
        "wav.scp": "write one line 'recording path' per recording, or pass --no-wav",
        "feats.scp": "compute features first, or pass --no-feats (speechtx data validate: leave out --feats)",
    }
    required = {"utt2spk": True, "spk2utt": True, "text": text, "wav.scp": wav, "feats.scp": feats}
    for name, needed in required.items():
        if needed and name not in tables:
            findings.add("missing", path / name, None, f"no such file; {remedies[name]}")


def _check_keys(table: Table, wanted: Table, findings: Findings, *, partial: bool = False, what: str, subject: str) -> None:
    """Reports keys that `wanted` has and `table` lacks (unless `partial`), and keys that only `table` has."""
    name, source = table.path.name, wanted.path.name
    remedy = "run `speechtx cmvn` again" if name == "cmvn.scp" else f"add it there, or {FIX}"
    if not partial:
        for key, line in wanted.lines.items():
            if key not in table.values:
                findings.add(f"not in {name}", wanted.path, line, f"{what} {key} is not in {name}; {remedy}")
    for key, line in table.lines.items():
        if key not in wanted.values:
            findings.add(f"not in {source}", table.path, line, f"{subject} {key} is not in {source}; add it there, or {FIX}")


def _check_utterances(tables: Mapping[str, Table], findings: Findings) -> None:
    for name, table in tables.items():
        direct = name == "wav.scp" and "segments" not in tables
        if direct or (TABLES[name].keys == "utterance" and name != "utt2spk"):
            # An utterance that utt2speed does not name keeps its speed, so that table may be partial.
            partial = name == "utt2speed"
            subject = "recording (no segments, so an utterance too)" if direct else "utterance"
            _check_keys(table, tables["utt2spk"], findings, partial=partial, what="utterance", subject=subject)


def _check_speakers(tables: Mapping[str, Table], findings: Findings, *, speaker_order: bool) -> None:
    utt2spk = tables["utt2spk"]
    speakers = Table(path=utt2spk.path, values={}, lines={})
    for utt, speaker in utt2spk.values.items():
        speakers.values.setdefault(speaker, "")
        speakers.lines.setdefault(speaker, utt2spk.lines[utt])
    for name, table in tables.items():
        if TABLES[name].keys == "speaker":
            _check_keys(table, speakers, findings, what="speaker", subject="speaker")
    if "spk2utt" in tables:
        _check_spk2utt(tables["spk2utt"], utt2spk, findings)
    previous = ""
    for utt, speaker in utt2spk.values.items() if speaker_order else ():
        if speaker < previous:
            message = f"utterance {utt} of speaker {speaker} comes after speaker {previous}: Kaldi's tools need each speaker id"
            message += " to be a prefix of its utterance ids; rename the utterances to begin with it"
            findings.add("speaker order", utt2spk.path, utt2spk.lines[utt], message, warning=True)
        previous = speaker


def _check_spk2utt(spk2utt: Table, utt2spk: Table, findings: Findings) -> None:
    listed: dict[str, str] = {}
    for speaker, value in spk2utt.values.items():
        line = spk2utt.lines[speaker]
        for utt in value.split():
            if utt in listed:
                message = f"utterance {utt} is listed for speaker {speaker} and for {listed[utt]}"
                findings.add("listed twice", spk2utt.path, line, f"{message}; {FIX}")
            elif utt2spk.values.get(utt) != speaker:
                real = f"gives it speaker {utt2spk.values[utt]}" if utt in utt2spk.values else "does not have it"
                message = f"utterance {utt} is listed for speaker {speaker}, but utt2spk {real}"
                findings.add("disagrees with utt2spk", spk2utt.path, line, f"{message}; {FIX}")
            listed[utt] = speaker
    for utt, line in utt2spk.lines.items():
        if utt not in listed:
            message = f"utterance {utt} of speaker {utt2spk.values[utt]} is not in spk2utt; {FIX}"
            findings.add("not in spk2utt", utt2spk.path, line, message)


def _check_recordings(tables: Mapping[str, Table], findings: Findings) -> None:
    segments, wav = tables.get("segments"), tables.get("wav.scp")
    if segments and wav:
        used = set()
        for utt, value in segments.values.items():
            line = segments.lines[utt]
            try:
                segment = parse_segment(value)
            except ValueError:
                continue  # reported by the scan
            used.add(segment.recording)
            if segment.recording not in wav.values:
                message = f"utterance {utt}: recording {segment.recording} is not in wav.scp; add it there, or {FIX}"
                findings.add("unknown recording", segments.path, line, message)
            if segment.end is not None and segment.end - segment.start > _LONG_SEGMENT:
                hours = (segment.end - segment.start) / 3600
                message = f"utterance {utt} lasts {hours:.1f} hours; times are in seconds, not samples"
                findings.add("long segment", segments.path, line, message, warning=True)
        for recording, line in wav.lines.items():
            if recording not in used:
                message = f"recording {recording} has no segment; {FIX} to drop it"
                findings.add("unused recording", wav.path, line, message, warning=True)
    if wav and "reco2file_and_channel" in tables:
        _check_keys(tables["reco2file_and_channel"], wav, findings, what="recording", subject="recording")


def _check_locations(tables: Mapping[str, Table], findings: Findings, *, allow_pipes: bool, check_files: bool) -> None:
    archives: dict[str, int | str] = {}  # size, or what is wrong: one look at an archive serves all its matrices
    places = [
        (table, key) for name in ("wav.scp", "feats.scp", "cmvn.scp") if (table := tables.get(name)) for key in table.values
    ]
    for table, key in _progress(places) if check_files else places:
        location, line = table.values[key], table.lines[key]
        what = f"{TABLES[table.path.name].keys} {key}"
        if is_pipe(location):
            if table.path.name == "wav.scp" and not allow_pipes:
                message = (
                    f"{what}: a command; commands run only with --allow-pipes, and only if you trust where this table is from"
                )
                findings.add("command", table.path, line, message)
            continue
        if not check_files or not location:
            continue
        if table.path.name == "wav.scp":
            found = _size(location)
            offset = 0
        else:
            match = _ARCHIVE.fullmatch(location)
            assert match is not None, "every part of the expression may be empty"
            location, offset = match["path"], int(match["offset"] or 0)
            if location not in archives:
                archives[location] = _size(location)
            found = archives[location]
        if isinstance(found, str):
            findings.add("file", table.path, line, f"{what}: {location}: {found}; or pass --no-files to skip this check")
        elif offset >= found:
            findings.add(
                "file", table.path, line, f"{what}: {location} has {found} bytes, but byte {offset} is asked for: truncated?"
            )


def _progress(places: list[tuple[Table, str]]) -> Iterable[tuple[Table, str]]:
    return tqdm(places, desc="looking for files", unit="file", delay=2, disable=None, leave=False)


def _size(location: str) -> int | str:
    """The size of a non-empty regular file, or what is wrong with it."""
    try:
        status = os.stat(location)
    except FileNotFoundError:
        relative = "" if location.startswith("/") else f" (looked for in {Path.cwd()})"
        return f"no such file{relative}; correct the path or remove the entry"
    except (OSError, ValueError) as err:
        return f"cannot be used: {err.strerror if isinstance(err, OSError) else err}"
    if not stat.S_ISREG(status.st_mode):
        return "not a file"
    return status.st_size or "the file is empty"
