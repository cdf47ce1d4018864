"""One table of a data directory: lines of `key value`, UTF-8, LF, sorted by key in C (byte) order, each key once.

One scanner reads every table. It hands each departure from the format to a callback and goes on, so the same code
serves readers that stop at the first fault (`read_table`), the validator that lists them all and the fixer that
repairs most. Nothing a table points to is opened here.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from speechtx.config.atomic import replacing
from speechtx.config.errors import DataError

Kind = Literal[
    "nul", "utf8", "bom", "crlf", "cr", "no-newline", "blank", "spacing", "id", "value", "duplicate", "conflict", "order"
]  # fmt: skip
Report = Callable[[Kind, int, str], None]
"""Receives what is wrong: the kind, the line number (from 1), and a message that names the entry and the remedy."""

FIX = "run utils/data/fix_data_dir.sh"
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")
_LONGEST_RECORDING = 48 * 3600.0


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A piece of a recording.

    Attributes:
        recording: key of `wav.scp`.
        start: seconds from the beginning of the recording.
        end: seconds, or None for the end of the recording (written -1 in the file, as in Kaldi's extract-segments).
    """

    recording: str
    start: float
    end: float | None


@dataclass(frozen=True, kw_only=True)
class TableSpec:
    """What the entries of one kind of table look like.

    Attributes:
        keys: what the keys identify.
        check: says what is wrong with a value, or None.
        verbatim: the value is one path or command in which runs of spaces mean something.
    """

    keys: Literal["utterance", "recording", "speaker"]
    check: Callable[[str], str | None]
    verbatim: bool = False


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table as read: values and line numbers by key, in the order of the file."""

    path: Path
    values: dict[str, str] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)


def read_table(path: str | Path, *, check_entries: bool = False) -> dict[str, str]:
    """Reads a table into a dict from key to the rest of the line, in the order of the file.

    Extra blanks around fields and an order that is not C order are tolerated; the validator reports them.

    Args:
        path: the table.
        check_entries: also refuse unusable ids and values that are not what the table's file name promises.

    Raises:
        DataError: the file is missing, not UTF-8, has a BOM, a carriage return, a NUL, a blank line or a key twice;
            the message names file and line.
    """
    path = Path(path)
    tolerated = {"spacing", "order", "no-newline"} | (set() if check_entries else {"id", "value"})

    def stop(kind: Kind, line: int, message: str) -> None:
        if kind not in tolerated:
            raise DataError(f"{path}:{line}: {message}")

    return scan_table(path, report=stop).values


def read_utt2spk(path: str | Path) -> dict[str, str]:
    """Reads `utt2spk`: utterance id to speaker id; entries are checked as well, see `read_table`."""
    return _read_named(path, "utt2spk")


def read_segments(path: str | Path) -> dict[str, Segment]:
    """Reads `segments`: utterance id to `Segment`.

    Raises:
        DataError: as `read_table`, or a line is not `utterance recording start end` with 0 <= start < end.
    """
    return {utt: parse_segment(value) for utt, value in _read_named(path, "segments").items()}


def _read_named(path: str | Path, name: str) -> dict[str, str]:
    if Path(path).name != name:
        raise ValueError(f"{path}: entries are checked by file name, and this one is not called {name}")
    return read_table(path, check_entries=True)


def parse_segment(value: str) -> Segment:
    """Parses `recording start end` (seconds; an end of -1 is the end of the recording); ValueError says what is wrong."""
    fields = value.split()
    if len(fields) != 3:
        raise ValueError(f"expected 'recording start end', found {_shown(value)}")
    start, end = _number(fields[1]), _number(fields[2])
    if start is None or end is None:
        raise ValueError(f"start and end must be seconds, found {_shown(value)}")
    if start < 0:
        raise ValueError(f"starts at {start:g} s, before the recording")
    if end == -1:
        return Segment(recording=fields[0], start=start, end=None)
    if end <= start:
        raise ValueError(f"ends at {end:g} s, not after its start at {start:g} s")
    if end > _LONGEST_RECORDING:
        raise ValueError(f"ends at {end:g} s, after more than 48 hours; times are in seconds, not samples or milliseconds")
    return Segment(recording=fields[0], start=start, end=end)


def scan_table(path: str | Path, *, report: Report) -> Table:
    """Reads a table, hands every departure from the format to `report`, and returns what could be understood.

    Of a key that occurs twice the first line counts. Values come back without surrounding blanks and, but for paths and
    commands, with single spaces.

    Args:
        path: the table; its file name selects the `TableSpec`.
        report: called with each fault; it may raise.

    Raises:
        DataError: the file cannot be opened at all.
    """
    path = Path(path)
    spec = TABLES.get(path.name, _ANY)
    table = Table(path=path)
    values, lines = table.values, table.lines
    previous = ""
    for number, raw in enumerate(_decoded_lines(path, report), start=1):
        line = raw
        if line.endswith("\r"):
            report("crlf", number, f"Windows line ending (carriage return); {FIX}")
            line = line.rstrip("\r")
        if "\r" in line:
            report("cr", number, "carriage return inside the line; it shows nowhere but becomes part of the entry, remove it")
        key, value = _split(line, verbatim=spec.verbatim)
        if not key:
            report("blank", number, f"blank line; {FIX}")
            continue
        if line != (f"{key} {value}" if value else key):
            report("spacing", number, f"{spec.keys} {_id(key)}: tabs, or blanks that are doubled, leading or trailing; {FIX}")
        if not is_valid_id(key):
            report("id", number, f"{spec.keys} {_id(key)}: {_id_problem(key)}")
        problem = spec.check(value)
        if problem:
            report("value", number, f"{spec.keys} {_id(key)}: {problem}")
        if key in values:
            kind: Kind = "duplicate" if values[key] == value else "conflict"
            remedy = FIX if kind == "duplicate" else "the two lines differ, remove the wrong one"
            report(kind, number, f"{spec.keys} {_id(key)} is already on line {lines[key]}; {remedy}")
            continue
        # Code point order of str equals byte order of UTF-8, which is what `LC_ALL=C sort` gives.
        if key < previous:
            report("order", number, f"{spec.keys} {_id(key)} comes after {_id(previous)}; not sorted in C order, {FIX}")
        previous = key
        values[key], lines[key] = value, number
    return table


def write_table(path: str | Path, values: Mapping[str, str]) -> None:
    """Writes a table sorted in C order, whole or not at all."""
    try:
        with replacing(path, "wb") as out:
            out.write(format_table(values))
    except OSError as err:
        raise DataError(f"{path}: cannot be written: {err.strerror}") from None


def format_table(values: Mapping[str, str]) -> bytes:
    """The bytes of a table: sorted by key in C order, UTF-8, LF."""
    return "".join(f"{key} {values[key]}\n" if values[key] else f"{key}\n" for key in sorted(values)).encode()


def is_valid_id(identifier: str) -> bool:
    """Whether an id is non-empty, printable, without blanks and without slashes (ids become parts of file names)."""
    return bool(identifier) and "/" not in identifier and " " not in identifier and identifier.isprintable()


def is_pipe(location: str) -> bool:
    """Whether a location in `wav.scp` or an scp is a command (Kaldi's `command |` or `| command`) and not a file."""
    return location.rstrip().endswith("|") or location.lstrip().startswith("|")


def _decoded_lines(path: Path, report: Report) -> list[str]:
    """The lines of a file without their newline; what cannot be decoded is reported and replaced."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as err:
        raise DataError(f"{path}: cannot be read: {err.strerror}") from None
    if data.startswith(b"\xef\xbb\xbf"):
        report("bom", 1, f"byte order mark (U+FEFF), which would become part of the first key; {FIX}")
        data = data[3:]
    if not data:
        return []
    lines = data.split(b"\n")
    if lines[-1]:
        report("no-newline", len(lines), f"the last line does not end with a newline: was the file cut short? If not, {FIX}")
    else:
        lines.pop()
    if b"\0" in data:
        for number, line in enumerate(lines, start=1):
            if b"\0" in line:
                report("nul", number, "NUL byte; the file is damaged or not text, write it again")
        lines = [line.replace(b"\0", b"") for line in lines]
    try:
        return b"\n".join(lines).decode("utf-8").split("\n")
    except UnicodeDecodeError:
        return [_decode(line, number, report) for number, line in enumerate(lines, start=1)]


def _decode(line: bytes, number: int, report: Report) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as err:
        key = line.split(b" ", 1)[0].decode("utf-8", errors="replace")
        report("utf8", number, f"{_id(key)}: byte {err.start + 1} of the line is not UTF-8; convert the file, e.g. with iconv")
        return line.decode("utf-8", errors="replace")


def _split(line: str, *, verbatim: bool) -> tuple[str, str]:
    """Key and value of a line, without the blanks around them and, unless `verbatim`, with single spaces in the value."""
    if "\t" not in line and "  " not in line and line[:1] != " " and line[-1:] != " ":
        key, _, value = line.partition(" ")
        return key, value
    key, *rest = re.split("[ \t]+", line.strip(" \t"), maxsplit=1)
    value = rest[0] if rest else ""
    return key, value if verbatim else re.sub("[ \t]+", " ", value)


def _number(text: str) -> float | None:
    # float() alone would take "nan", "1_000" and digits of other scripts.
    if not _NUMBER.fullmatch(text):
        return None
    number = float(text)
    return number if math.isfinite(number) else None


def _shown(value: str) -> str:
    return ascii(value if len(value) <= 80 else value[:77] + "...") if not value.isprintable() else repr(value[:80])


def _id(identifier: str) -> str:
    shown = identifier if len(identifier) <= 100 else identifier[:97] + "..."
    return shown if shown.isprintable() else ascii(shown)


def _id_problem(identifier: str) -> str:
    if "/" in identifier:
        return "an id must not contain '/', because ids become parts of file names; rename it"
    char = next(char for char in identifier if not char.isprintable())
    return f"an id must not contain U+{ord(char):04X}, which is not printable; rename it"


def _check_text(value: str) -> str | None:
    if not value:
        return f"empty transcript; write its words, or {FIX} to drop the utterance"
    if value.isprintable():
        return None
    for char in value:
        if unicodedata.category(char) in ("Zs", "Zl", "Zp", "Cc") and char != " ":
            return f"U+{ord(char):04X} in the transcript; only plain spaces may separate words"
    return None


def _check_utt2spk(value: str) -> str | None:
    if not value or " " in value:
        return f"expected exactly one speaker id, found {_shown(value)}"
    return None if is_valid_id(value) else f"speaker {_id(value)}: {_id_problem(value)}"


def _check_spk2utt(value: str) -> str | None:
    return None if value else f"no utterances; {FIX}, which writes spk2utt again"


def _check_segment(value: str) -> str | None:
    try:
        parse_segment(value)
    except ValueError as err:
        return str(err)
    return None


def _check_seconds(value: str) -> str | None:
    number = _number(value)
    return None if number is not None and number > 0 else f"expected a positive number of seconds, found {_shown(value)}"


def _check_frames(value: str) -> str | None:
    valid = re.fullmatch(r"[0-9]{1,12}", value) and int(value) > 0
    return None if valid else f"expected a positive number of frames, found {_shown(value)}"


def _check_speed(value: str) -> str | None:
    number = _number(value)
    valid = number is not None and 0.1 <= number <= 10
    return None if valid else f"expected a speed factor between 0.1 and 10, such as 0.9, found {_shown(value)}"


def _check_wav(value: str) -> str | None:
    return None if value else "no audio file; write its path after the id"


def _check_location(value: str) -> str | None:
    if not value:
        return "no location; compute the features again"
    return "a command instead of a file; commands in this table never run" if is_pipe(value) else None


def _check_file_and_channel(value: str) -> str | None:
    return None if len(value.split(" ")) == 2 else f"expected a file name and a channel, found {_shown(value)}"


def _check_gender(value: str) -> str | None:
    return None if value in ("m", "f") else f"expected m or f, found {_shown(value)}"


_ANY = TableSpec(keys="utterance", check=lambda value: None, verbatim=True)
TABLES: dict[str, TableSpec] = {
    "wav.scp": TableSpec(keys="recording", check=_check_wav, verbatim=True),
    "text": TableSpec(keys="utterance", check=_check_text),
    "utt2spk": TableSpec(keys="utterance", check=_check_utt2spk),
    "spk2utt": TableSpec(keys="speaker", check=_check_spk2utt),
    "segments": TableSpec(keys="utterance", check=_check_segment),
    "utt2speed": TableSpec(keys="utterance", check=_check_speed),
    "feats.scp": TableSpec(keys="utterance", check=_check_location, verbatim=True),
    "utt2num_frames": TableSpec(keys="utterance", check=_check_frames),
    "utt2dur": TableSpec(keys="utterance", check=_check_seconds),
    "cmvn.scp": TableSpec(keys="speaker", check=_check_location, verbatim=True),
    "reco2file_and_channel": TableSpec(keys="recording", check=_check_file_and_channel),
    "spk2gender": TableSpec(keys="speaker", check=_check_gender),
}
"""The tables of a data directory by file name; other files in the directory are none of our business."""
