"""A broken data directory must be refused, with the file, the line and the entry named."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from speechtx.config.errors import DataError
from speechtx.data.kaldi_dir import validate_data_dir
from speechtx.data.kaldi_table import read_segments, read_table, read_utt2spk, write_table


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A valid directory of four utterances of two speakers, with features."""
    data = tmp_path / "data"
    data.mkdir()
    utts = {"ann-1": "ann", "ann-2": "ann", "bob-1": "bob", "bob-2": "bob"}
    for utt in utts:
        (tmp_path / f"{utt}.wav").write_bytes(b"RIFF")
    (tmp_path / "feats.ark").write_bytes(bytes(100))
    tables = {
        "wav.scp": {utt: f"{tmp_path}/{utt}.wav" for utt in utts},
        "text": dict.fromkeys(utts, "one two"),
        "utt2spk": utts,
        "spk2utt": {"ann": "ann-1 ann-2", "bob": "bob-1 bob-2"},
        "feats.scp": {utt: f"{tmp_path}/feats.ark:{10 * i}" for i, utt in enumerate(utts)},
        "utt2num_frames": dict.fromkeys(utts, "98"),
        "utt2dur": dict.fromkeys(utts, "1.0"),
        "cmvn.scp": {"ann": f"{tmp_path}/feats.ark:3", "bob": f"{tmp_path}/feats.ark:50"},
    }
    for name, values in tables.items():
        write_table(data / name, values)
    return data


def use_segments(data: Path) -> None:
    """Makes the four utterances segments of two recordings."""
    wavs = read_table(data / "wav.scp")
    write_table(data / "wav.scp", {"tape1": wavs["ann-1"], "tape2": wavs["bob-1"]})
    (data / "segments").write_text("ann-1 tape1 0 1.5\nann-2 tape1 1.5 -1\nbob-1 tape2 0.00 1e1\nbob-2 tape2 3 4\n")


def replace(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(data: Path) -> None:
        content = (data / name).read_bytes()
        assert old.encode() in content, "the test must change something"
        (data / name).write_bytes(content.replace(old.encode(), new.encode(), 1))

    return change


def prepend(name: str, head: bytes) -> Callable[[Path], None]:
    return lambda data: (data / name).write_bytes(head + (data / name).read_bytes()) and None


def append(name: str, tail: bytes) -> Callable[[Path], None]:
    return lambda data: (data / name).write_bytes((data / name).read_bytes() + tail) and None


def segments(old: str, new: str) -> Callable[[Path], None]:
    def change(data: Path) -> None:
        use_segments(data)
        replace("segments", old, new)(data)

    return change


def remove(name: str) -> Callable[[Path], None]:
    return lambda data: (data / name).unlink()


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "no utt2spk": (remove("utt2spk"), "utt2spk: no such file"),
    "no spk2utt": (remove("spk2utt"), "spk2utt: no such file"),
    "no text": (remove("text"), "text: no such file"),
    "no wav.scp": (remove("wav.scp"), "wav.scp: no such file"),
    "empty text file": (lambda data: (data / "text").write_bytes(b"") and None, "text: no entries"),
    "unsorted": (append("text", b"aaa x\n"), "text:5: utterance aaa comes after bob-2; not sorted in C order"),
    "sorted without regard to case": (replace("text", "bob-2", "Bob-2"), "text:4: utterance Bob-2 comes after bob-1"),
    "duplicate key": (append("text", b"bob-2 one two\n"), "text:5: utterance bob-2 is already on line 4"),
    "two transcripts": (append("text", b"bob-2 three\n"), "text:5: utterance bob-2 is already on line 4; the two lines differ"),
    "missing transcript": (replace("text", "ann-2 one two\n", ""), "utt2spk:2: utterance ann-2 is not in text"),
    "unknown transcript": (replace("utt2spk", "bob-2 bob\n", ""), "text:4: utterance bob-2 is not in utt2spk"),
    "missing audio entry": (replace("wav.scp", "ann-1 ", "ann-0 "), "utt2spk:1: utterance ann-1 is not in wav.scp"),
    "empty text": (replace("text", "ann-2 one two", "ann-2"), "text:2: utterance ann-2: empty transcript"),
    "CRLF": (replace("text", "two\n", "two\r\n"), "text:1: Windows line ending"),
    "lone CR": (replace("text", "one two", "one\rtwo"), "text:1: carriage return inside"),
    "Latin-1": (lambda data: append("text", b"caf\xe9 un\n")(data), "text:5: caf\ufffd: byte 4 of the line is not UTF-8"),
    "UTF-16": (lambda data: (data / "text").write_bytes("ann-1 one\n".encode("utf-16")) and None, "text:1: NUL byte"),
    "BOM": (prepend("text", b"\xef\xbb\xbf"), "text:1: byte order mark"),
    "NUL": (append("utt2spk", b"z\0z z\n"), "utt2spk:5: NUL byte"),
    "trailing space": (replace("text", "two\n", "two \n"), "text:1: utterance ann-1: tabs, or blanks"),
    "leading space": (prepend("text", b" "), "text:1: utterance ann-1: tabs, or blanks"),
    "double space": (replace("text", "one two", "one  two"), "text:1: utterance ann-1: tabs, or blanks"),
    "tab": (replace("text", "ann-1 ", "ann-1\t"), "text:1: utterance ann-1: tabs, or blanks"),
    "blank line": (replace("text", "ann-2", "\nann-2"), "text:2: blank line"),
    "no-break space": (replace("text", "one two", "one\u00a0two"), "text:1: utterance ann-1: U+00A0 in the transcript"),
    "no speaker": (replace("utt2spk", "ann-1 ann", "ann-1"), "utt2spk:1: utterance ann-1: expected exactly one speaker"),
    "two speakers": (
        replace("utt2spk", "ann-1 ann", "ann-1 ann bob"),
        "utt2spk:1: utterance ann-1: expected exactly one speaker",
    ),
    "spk2utt disagrees": (
        replace("spk2utt", "ann-1 ann-2", "ann-1 bob-1"),
        "spk2utt:1: utterance bob-1 is listed for speaker ann",
    ),
    "spk2utt lacks one": (
        replace("spk2utt", "ann-1 ann-2", "ann-1"),
        "utt2spk:2: utterance ann-2 of speaker ann is not in spk2utt",
    ),
    "spk2utt repeats one": (
        replace("spk2utt", "ann-2", "ann-2 ann-2"),
        "spk2utt:1: utterance ann-2 is listed for speaker ann and",
    ),
    "spk2utt lacks speaker": (replace("spk2utt", "bob bob-1 bob-2\n", ""), "utt2spk:3: speaker bob is not in spk2utt"),
    "slash in id": (replace("utt2spk", "bob-2 ", "bob/2 "), "utt2spk:4: utterance bob/2: an id must not contain '/'"),
    "invisible in id": (
        replace("text", "bob-2 ", "bob-2\u200b "),
        "text:4: utterance 'bob-2\\u200b': an id must not contain U+200B",
    ),
    "audio file missing": (lambda data: os.unlink(data.parent / "bob-1.wav"), "bob-1.wav: no such file"),
    "audio file empty": (lambda data: (data.parent / "bob-1.wav").write_bytes(b"") and None, "bob-1.wav: the file is empty"),
    "audio file is a folder": (replace("wav.scp", "/bob-1.wav", ""), ": not a file"),
    "command in wav.scp": (replace("wav.scp", "/bob-1.wav", "/x touch |"), "wav.scp:3: recording bob-1: a command"),
    "command in feats.scp": (replace("feats.scp", "feats.ark:0", "x.ark |"), "feats.scp:1: utterance ann-1: a command"),
    "no feats": (replace("feats.scp", "ann-1", "ann-0"), "utt2spk:1: utterance ann-1 is not in feats.scp"),
    "archive truncated": (lambda data: os.truncate(data.parent / "feats.ark", 30), "feats.scp:4: utterance bob-2"),
    "frames of an unknown": (append("utt2num_frames", b"cat-1 7\n"), "utt2num_frames:5: utterance cat-1 is not in utt2spk"),
    "frames missing": (replace("utt2num_frames", "bob-2 98\n", ""), "utt2spk:4: utterance bob-2 is not in utt2num_frames"),
    "duration missing": (replace("utt2dur", "bob-2 1.0\n", ""), "utt2spk:4: utterance bob-2 is not in utt2dur"),
    "duration not a number": (replace("utt2dur", "1.0", "long"), "utt2dur:1: utterance ann-1: expected a positive number"),
    "duration NaN": (replace("utt2dur", "1.0", "nan"), "utt2dur:1: utterance ann-1: expected a positive number"),
    "duration zero": (replace("utt2dur", "1.0", "0"), "utt2dur:1: utterance ann-1: expected a positive number"),
    "frames not whole": (replace("utt2num_frames", "98", "9.8"), "utt2num_frames:1: utterance ann-1: expected a positive number"),
    "speed impossible": (
        lambda data: (data / "utt2speed").write_text("ann-1 90\n") and None,
        "utt2speed:1: utterance ann-1: expected",
    ),
    "speed of an unknown": (
        lambda data: (data / "utt2speed").write_text("x 1.1\n") and None,
        "utt2speed:1: utterance x is not in",
    ),
    "cmvn of a speaker missing": (replace("cmvn.scp", "bob", "bib"), "utt2spk:3: speaker bob is not in cmvn.scp"),
    "segment ends first": (segments("0 1.5", "2 1.5"), "segments:1: utterance ann-1: ends at 1.5 s, not after its start at 2 s"),
    "segment of no length": (segments("3 4", "4 4"), "segments:4: utterance bob-2: ends at 4 s"),
    "segment before 0": (segments("0 1.5", "-1 1.5"), "segments:1: utterance ann-1: starts at -1 s"),
    "segment in samples": (
        segments("3 4", "48000 640000"),
        "segments:4: utterance bob-2: ends at 640000 s, after more than 48 hours",
    ),
    "segment of three fields": (segments("tape2 3 4", "tape2 3"), "segments:4: utterance bob-2: expected 'recording start end'"),
    "segment of words": (segments("3 4", "three four"), "segments:4: utterance bob-2: start and end must be seconds"),
    "segment of unknown tape": (
        segments("tape2 3 4", "tape3 3 4"),
        "segments:4: utterance bob-2: recording tape3 is not in wav.scp",
    ),
}


def test_a_correct_directory_passes(good: Path) -> None:
    summary = validate_data_dir(good, feats=True)
    assert (summary.utterances, summary.speakers, summary.recordings, summary.warnings) == (4, 2, 4, ())


def test_a_correct_directory_with_segments_passes(good: Path) -> None:
    use_segments(good)
    assert validate_data_dir(good, feats=True).recordings == 2
    assert read_segments(good / "segments")["ann-2"].end is None


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_directory_is_refused_by_file_line_and_entry(good: Path, case: str) -> None:
    change, expected = BROKEN[case]
    change(good)
    with pytest.raises(DataError) as caught:
        validate_data_dir(good)
    assert expected in str(caught.value)


def test_every_problem_is_listed_not_only_the_first(good: Path) -> None:
    for case in ("CRLF", "spk2utt disagrees", "duration NaN", "audio file missing"):
        BROKEN[case][0](good)
    with pytest.raises(DataError) as caught:
        validate_data_dir(good)
    for case in ("CRLF", "spk2utt disagrees", "duration NaN", "audio file missing"):
        assert BROKEN[case][1] in str(caught.value)


def test_problems_beyond_the_limit_are_counted(good: Path) -> None:
    with (good / "text").open("a") as out:
        out.writelines(f"cat-{i:04d} words\n" for i in range(1000))
    with pytest.raises(DataError, match=r"1,000 problems(.|\n)*and 997 more like this") as caught:
        validate_data_dir(good, limit=3)
    assert str(caught.value).count("\n") == 4


def test_an_empty_or_absent_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data directory"):
        validate_data_dir(tmp_path)
    with pytest.raises(DataError, match="no such data directory"):
        validate_data_dir(tmp_path / "nowhere")


def test_reading_a_directory_never_runs_its_commands(good: Path, tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    write_table(good / "wav.scp", dict.fromkeys(read_table(good / "wav.scp"), f"touch {trace} |"))
    with pytest.raises(DataError, match="--allow-pipes"):
        validate_data_dir(good)
    validate_data_dir(good, allow_pipes=True)
    assert not trace.exists()


def test_a_table_that_is_a_folder_or_unreadable_is_an_error_not_a_crash(good: Path) -> None:
    (good / "text").unlink()
    (good / "text").mkdir()
    with pytest.raises(DataError, match="text: cannot be read: Is a directory"):
        validate_data_dir(good)


def test_optional_requirements_can_be_dropped(good: Path) -> None:
    for name in ("text", "wav.scp", "feats.scp"):
        (good / name).unlink()
    validate_data_dir(good, text=False, wav=False)
    with pytest.raises(DataError, match=r"feats.scp: no such file; compute features first"):
        validate_data_dir(good, text=False, wav=False, feats=True)


def test_the_check_for_files_can_be_skipped(good: Path) -> None:
    os.unlink(good.parent / "bob-1.wav")
    validate_data_dir(good, check_files=False)


def test_speakers_out_of_order_are_a_warning_with_advice(good: Path) -> None:
    for name in ("utt2dur", "utt2num_frames", "feats.scp", "cmvn.scp"):
        (good / name).unlink()
    write_table(good / "utt2spk", {"ann-1": "zoe", "ann-2": "ann", "bob-1": "bob", "bob-2": "bob"})
    write_table(good / "spk2utt", {"ann": "ann-2", "bob": "bob-1 bob-2", "zoe": "ann-1"})
    (warning,) = validate_data_dir(good).warnings
    assert f"{good}/utt2spk:2: utterance ann-2 of speaker ann comes after speaker zoe" in warning and "prefix" in warning
    assert validate_data_dir(good, speaker_order=False).warnings == ()


def test_a_last_line_without_newline_is_a_warning(good: Path) -> None:
    (good / "text").write_bytes((good / "text").read_bytes()[:-1])
    (warning,) = validate_data_dir(good).warnings
    assert "text:4: the last line does not end with a newline" in warning


def test_unused_recordings_and_hour_long_segments_are_warnings(good: Path) -> None:
    use_segments(good)
    write_table(good / "wav.scp", {**read_table(good / "wav.scp"), "tape3": str(good.parent / "bob-2.wav")})
    replace("segments", "3 4", "3 16000")(good)
    first, second = sorted(validate_data_dir(good).warnings)
    assert "segments:4: utterance bob-2 lasts 4.4 hours" in first
    assert "wav.scp:3: recording tape3 has no segment" in second


def test_non_ascii_ids_sort_by_bytes(good: Path) -> None:
    # U+FF41 sorts before U+10400 in bytes, though UTF-16 order is the other way round.
    utts = {"z": "s", "é": "s", "ａ": "s", "𐐀": "s"}
    for name in ("wav.scp", "feats.scp", "utt2dur", "utt2num_frames", "cmvn.scp"):
        (good / name).unlink()
    for name in ("utt2spk", "text"):
        write_table(good / name, utts)
    write_table(good / "spk2utt", {"s": " ".join(utts)})
    assert list(read_table(good / "text")) == sorted(utts, key=lambda utt: utt.encode())
    validate_data_dir(good, wav=False)


def test_read_table_keeps_commands_and_paths_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "wav.scp").write_text("a sox  in.wav\t-t wav - |\nb my  file.wav\n")
    assert read_table(tmp_path / "wav.scp") == {"a": "sox  in.wav\t-t wav - |", "b": "my  file.wav"}


@pytest.mark.parametrize("content", [b"a x\na x\n", b"a x\r\n", b"\xef\xbb\xbfa x\n", b"a \xff\n", b"a \0\n", b"a x\n\nb y\n"])
def test_read_table_refuses_what_would_be_read_wrongly(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(DataError, match=r"text:\d+: "):
        read_table(tmp_path / "text")


def test_read_utt2spk_and_segments_name_the_utterance(tmp_path: Path) -> None:
    (tmp_path / "utt2spk").write_text("a\n")
    (tmp_path / "segments").write_text("a r 2 1\n")
    with pytest.raises(DataError, match="utterance a: expected exactly one speaker"):
        read_utt2spk(tmp_path / "utt2spk")
    with pytest.raises(DataError, match="utterance a: ends at 1 s"):
        read_segments(tmp_path / "segments")


def test_a_failed_write_leaves_the_old_table(tmp_path: Path) -> None:
    table = tmp_path / "text"
    write_table(table, {"a": "old"})
    with pytest.raises(UnicodeEncodeError):
        write_table(table, {"a": "\ud800"})
    assert read_table(table) == {"a": "old"}
    assert os.listdir(tmp_path) == ["text"]
