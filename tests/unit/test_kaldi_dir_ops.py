"""Fix, subset, combine, split, copy and speed perturbation must neither lose nor invent an utterance."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechtx.config.errors import DataError
from speechtx.data.kaldi_dir import Tables, read_data_dir, spk2utt_of, validate_data_dir, write_data_dir
from speechtx.data.kaldi_dir_fix import fix_data_dir
from speechtx.data.kaldi_dir_ops import combine_data_dirs, copy_data_dir, perturb_speed, split_data_dir, subset_data_dir
from speechtx.data.kaldi_table import read_table, write_table

ID = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S"), exclude_characters="/"), min_size=1, max_size=6)
WORD = st.text(st.characters(codec="utf-8", categories=("L", "M", "N", "P", "S")), min_size=1, max_size=6)


@st.composite
def data_dirs(draw: st.DrawFn, min_utts: int = 1) -> Tables:
    """Tables of a valid directory: any ids, any words, with or without segments and durations."""
    speakers = draw(st.lists(ID, min_size=1, max_size=4, unique=True))
    tails = draw(st.lists(ID, min_size=min_utts, max_size=12, unique=True))
    utt2spk = {}
    for tail in tails:
        speaker = draw(st.sampled_from(speakers))
        utt2spk.setdefault(f"{speaker}-{tail}", speaker)
    while len(utt2spk) < min_utts:
        utt2spk[f"extra-{len(utt2spk)}"] = "extra"
    tables: Tables = {
        "utt2spk": utt2spk,
        "spk2utt": spk2utt_of(utt2spk),
        "text": {utt: " ".join(draw(st.lists(WORD, min_size=1, max_size=3))) for utt in utt2spk},
    }
    if draw(st.booleans()):
        tables["wav.scp"] = {"tape": "/nowhere/my  tape.wav"}
        tables["segments"] = {utt: f"tape {i} {i + 1.5}" for i, utt in enumerate(utt2spk)}
    else:
        tables["wav.scp"] = {utt: f"/nowhere/{i}.wav" for i, utt in enumerate(utt2spk)}
    if draw(st.booleans()):
        tables["utt2dur"] = {utt: f"{draw(st.integers(1, 500)) / 10}" for utt in utt2spk}
    return tables


def sorted_tables(path: Path) -> Tables:
    tables = read_data_dir(path)
    assert all(list(values) == sorted(values) for values in tables.values()), "every table is in C order"
    return tables


def small(path: Path, utt2spk: dict[str, str], **more: dict[str, str]) -> Path:
    """Writes a directory; keyword `wav_scp` stands for wav.scp."""
    tables: Tables = {"utt2spk": utt2spk, "text": dict.fromkeys(utt2spk, "words")}
    tables["wav.scp"] = {utt: f"/nowhere/{utt}.wav" for utt in utt2spk}
    tables |= {name.replace("_scp", ".scp"): values for name, values in more.items()}
    write_data_dir(path, tables, {})
    return path


@settings(max_examples=40, deadline=None)
@given(data_dirs())
def test_any_valid_directory_passes_and_needs_no_fixing(tables: Tables) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        write_data_dir(data, tables, {})
        validate_data_dir(data, check_files=False)
        report = fix_data_dir(data)
        assert (report.changed, report.dropped, report.kept) == ((), {}, len(tables["utt2spk"]))
        assert not (data / ".backup").exists()


@settings(max_examples=25, deadline=None)
@given(data_dirs(min_utts=3), st.integers(1, 3), st.booleans())
def test_split_and_combine_give_the_original_back(tables: Tables, num: int, per_utt: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data, joined = Path(folder) / "data", Path(folder) / "joined"
        write_data_dir(data, tables, {})
        parts, _ = split_data_dir(data, num, per_utt=per_utt)
        for part in parts:
            validate_data_dir(part, check_files=False)
        combine_data_dirs(joined, parts)
        assert sorted_tables(joined) == sorted_tables(data) == tables


@settings(max_examples=25, deadline=None)
@given(data_dirs(min_utts=2), st.data())
def test_subset_of_all_and_copy_give_the_original_back(tables: Tables, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source, taken, copied = (Path(folder) / name for name in ("source", "taken", "copied"))
        write_data_dir(source, tables, {})
        num = data.draw(st.integers(1, len(tables["utt2spk"])))
        mode = data.draw(st.sampled_from(["spread", "first", "last"]))
        assert subset_data_dir(source, taken, num=num, mode=mode).utterances == num
        validate_data_dir(taken, check_files=False)
        assert read_data_dir(taken)["text"].items() <= tables["text"].items()
        write_table(Path(folder) / "list", dict.fromkeys(tables["utt2spk"], ""))
        subset_data_dir(source, taken, utt_list=Path(folder) / "list")
        copy_data_dir(source, copied)
        assert sorted_tables(taken) == sorted_tables(copied) == tables


@settings(max_examples=60, deadline=None)
@given(data_dirs(), st.data())
def test_random_bytes_in_a_table_are_an_error_or_repaired_never_a_crash(tables: Tables, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data"
        write_data_dir(path, tables, {})
        victim = path / data.draw(st.sampled_from(sorted(tables)))
        content = bytearray(victim.read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            position = data.draw(st.integers(0, len(content)))
            content[position : position + data.draw(st.integers(0, 2))] = data.draw(
                st.binary(max_size=3) | st.sampled_from([b"\r", b" ", b"\n"])
            )
        victim.write_bytes(content)
        for operation in (
            lambda: validate_data_dir(path),
            lambda: read_data_dir(path),
            lambda: split_data_dir(path, 2),
            lambda: subset_data_dir(path, path.parent / "subset", num=1, mode="shortest"),
            lambda: perturb_speed(path, path.parent / "fast", speeds=[0.9, 1.0]),
            lambda: combine_data_dirs(path.parent / "both", [path]),
        ):
            with contextlib.suppress(DataError):
                operation()
        try:
            fix_data_dir(path)
        except DataError:
            assert victim.read_bytes() == content, "a refused repair changes nothing"
            return
        validate_data_dir(path, check_files=False, allow_pipes=True)
        before = {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}
        assert fix_data_dir(path).changed == ()
        assert before == {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}


def test_fix_repairs_what_has_one_answer_and_keeps_a_backup(tmp_path: Path) -> None:
    data = small(tmp_path / "data", {"a-1": "a", "a-2": "a", "b-1": "b"})
    messy = b"\xef\xbb\xbfb-1\tthree  four \r\na-1 one\xc2\xa0two\r\n\r\na-2\r\nb-1 three four\r\nc-1 who"
    (data / "text").write_bytes(messy)
    (data / "spk2utt").unlink()
    report = fix_data_dir(data)
    assert read_table(data / "text") == {"a-1": "one two", "b-1": "three four"}
    assert read_table(data / "spk2utt") == {"a": "a-1", "b": "b-1"}
    assert report.kept == 2
    assert list(report.dropped) == ["a-2", "c-1"]
    assert "empty transcript" in report.dropped["a-2"] and report.dropped["c-1"] == "not in utt2spk"
    assert report.repairs["text: lines with a Windows ending"] == 5
    assert report.backup == data / ".backup" and (data / ".backup" / "text").read_bytes() == messy
    validate_data_dir(data, check_files=False)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("text", b"a-1 x\na-1 y\n", "text:2: utterance a-1 is already on line 1"),
        ("text", b"a-1 caf\xe9\n", "text:1: a-1: byte 8 of the line is not UTF-8"),
        ("text", b"a-1 x\0\n", "text:1: NUL byte"),
        ("text", b"a-1 x\ry\n", "text:1: carriage return inside"),
        ("utt2spk", b"a/1 a\n", "utt2spk:1: utterance a/1: an id must not contain"),
        ("text", b"z-9 x\n", "no utterance would be left"),
    ],
)
def test_fix_refuses_what_a_person_must_decide_and_changes_nothing(
    tmp_path: Path, name: str, content: bytes, expected: str
) -> None:
    data = small(tmp_path / "data", {"a-1": "a"})
    (data / name).write_bytes(content)
    (data / "spk2utt").write_bytes(b"wrong\n")
    before = {file.name: file.read_bytes() for file in data.iterdir()}
    with pytest.raises(DataError) as caught:
        fix_data_dir(data)
    assert expected in str(caught.value)
    assert before == {file.name: file.read_bytes() for file in data.iterdir()}


def test_fix_drops_utterances_of_missing_recordings_and_bad_segments(tmp_path: Path) -> None:
    segments = {"a-1": "tape 0 1", "a-2": "lost 0 1", "a-3": "tape 2 1", "a-4": "gone 0 1"}
    data = small(tmp_path / "data", dict.fromkeys(segments, "a"), segments=segments)
    (tmp_path / "tape.wav").write_bytes(b"RIFF")
    write_table(data / "wav.scp", {"tape": f"{tmp_path}/tape.wav", "gone": f"{tmp_path}/gone.wav", "unused": "x.wav"})
    report = fix_data_dir(data, drop_missing_audio=True)
    assert list(report.dropped) == ["a-2", "a-3", "a-4"]
    assert report.dropped["a-2"] == "recording lost is not in wav.scp"
    assert "no such audio file" in report.dropped["a-4"]
    assert list(read_table(data / "wav.scp")) == ["tape"]
    validate_data_dir(data)


def test_combine_refuses_an_utterance_in_two_directories(tmp_path: Path) -> None:
    one, two = small(tmp_path / "one", {"a-1": "a"}), small(tmp_path / "two", {"a-1": "a"})
    with pytest.raises(DataError, match=f"a-1 is both in {one} and in {two}"):
        combine_data_dirs(tmp_path / "all", [one, two])
    assert not (tmp_path / "all").exists()


def test_combine_refuses_one_recording_with_two_audio_files(tmp_path: Path) -> None:
    one = small(tmp_path / "one", {"a-1": "a"}, segments={"a-1": "tape 0 1"}, wav_scp={"tape": "x.wav"})
    two = small(tmp_path / "two", {"b-1": "b"}, segments={"b-1": "tape 0 1"}, wav_scp={"tape": "y.wav"})
    with pytest.raises(DataError, match="recording tape differs between"):
        combine_data_dirs(tmp_path / "all", [one, two])


def test_combine_fills_in_segments_and_speeds_and_says_what_it_left_out(tmp_path: Path) -> None:
    one = small(tmp_path / "one", {"a-1": "a"}, segments={"a-1": "tape 1 2"}, wav_scp={"tape": "x.wav"}, utt2dur={"a-1": "1"})
    two = small(tmp_path / "two", {"b-1": "b", "b-2": "b"}, utt2speed={"b-1": "0.9"})
    written = combine_data_dirs(tmp_path / "all", [one, two])
    assert read_table(tmp_path / "all" / "segments") == {"a-1": "tape 1 2", "b-1": "b-1 0 -1", "b-2": "b-2 0 -1"}
    assert read_table(tmp_path / "all" / "utt2speed") == {"a-1": "1.0", "b-1": "0.9", "b-2": "1.0"}
    assert not (tmp_path / "all" / "utt2dur").exists()
    assert written.notes == (f"utt2dur was left out: not in {two}",)
    validate_data_dir(tmp_path / "all", check_files=False)


def test_combine_refuses_features_of_two_configurations(tmp_path: Path) -> None:
    one = small(tmp_path / "one", {"a-1": "a"}, feats_scp={"a-1": "x.ark:0"})
    two = small(tmp_path / "two", {"b-1": "b"}, feats_scp={"b-1": "y.ark:0"})
    (one / "fbank.yaml").write_text("num_mel_bins: 80\n")
    with pytest.raises(DataError, match=r"two/fbank.yaml: missing"):
        combine_data_dirs(tmp_path / "all", [one, two])
    (two / "fbank.yaml").write_text("num_mel_bins: 40\n")
    with pytest.raises(DataError, match="num_mel_bins 80 / 40"):
        combine_data_dirs(tmp_path / "all", [one, two])
    (two / "fbank.yaml").write_text("# the same\nnum_mel_bins: 80\n")
    (two / "global_cmvn.ark").write_bytes(b"of two only")
    notes = combine_data_dirs(tmp_path / "all", [one, two]).notes
    assert notes == ("global_cmvn.ark was left out; run `speechtx cmvn`",)
    assert (tmp_path / "all" / "fbank.yaml").read_text() == "num_mel_bins: 80\n"


def test_combine_leaves_out_cmvn_of_a_speaker_with_two_statistics(tmp_path: Path) -> None:
    one = small(tmp_path / "one", {"a-1": "a"}, cmvn_scp={"a": "x.ark:0"})
    two = small(tmp_path / "two", {"a-2": "a"}, cmvn_scp={"a": "y.ark:0"})
    (note,) = combine_data_dirs(tmp_path / "all", [one, two]).notes
    assert "cmvn.scp was left out: speaker a" in note and not (tmp_path / "all" / "cmvn.scp").exists()


def test_split_balances_by_length_and_keeps_speakers_together(tmp_path: Path) -> None:
    utt2spk = {f"{spk}-{i}": spk for spk in "abcdef" for i in range(5)}
    data = small(tmp_path / "data", utt2spk, utt2dur={utt: "3" if utt[0] == "a" else "1" for utt in utt2spk})
    parts, notes = split_data_dir(data, 2)
    assert notes == ()
    assert [part.name for part in parts] == ["1", "2"] and parts[0].parent == data / "split2"
    assert [set(read_table(part / "utt2spk").values()) for part in parts] == [{"a", "b"}, {"c", "d", "e", "f"}]
    again = {file: file.read_bytes() for part in parts for file in part.iterdir()}
    split_data_dir(data, 2)
    assert again == {file: file.read_bytes() for part in parts for file in part.iterdir()}


def test_split_divides_speakers_when_it_must_and_says_so(tmp_path: Path) -> None:
    data = small(tmp_path / "data", {f"a-{i}": "a" for i in range(9)} | {"b-0": "b", "c-0": "c"})
    parts, (note,) = split_data_dir(data, 3)
    assert "very unequal" in note and [len(read_table(part / "text")) for part in parts] == [4, 3, 4]
    _, (note,) = split_data_dir(data, 4)
    assert "3 speakers for 4 parts" in note


@pytest.mark.parametrize("num", [0, 4])
def test_split_into_more_parts_than_utterances_is_an_error(tmp_path: Path, num: int) -> None:
    data = small(tmp_path / "data", {"a-1": "a", "a-2": "a", "b-1": "b"})
    with pytest.raises(DataError, match=f"3 utterances cannot be split into {num} parts"):
        split_data_dir(data, num)
    assert [name for name in os.listdir(data) if "split" in name] == []


def test_every_part_of_a_split_has_utterances_however_unequal_they_are(tmp_path: Path) -> None:
    utts = {f"a-{i}": "a" for i in range(6)}
    for heavy in utts:
        data = small(tmp_path / "data", utts, utt2dur={utt: "1000" if utt == heavy else "0.001" for utt in utts})
        parts, _ = split_data_dir(data, 5)
        assert sum(len(read_table(part / "text")) for part in parts) == 6


def test_subset_modes_choose_as_named(tmp_path: Path) -> None:
    utt2spk = {f"{spk}-{i}": spk for spk in "ab" for i in range(3)}
    durations = dict(zip(utt2spk, ["5", "4", "3", "2", "1", "6"], strict=True))
    data = small(tmp_path / "data", utt2spk, utt2dur=durations)

    def chosen(**how: object) -> list[str]:
        subset_data_dir(data, tmp_path / "subset", **how)  # type: ignore[arg-type]
        validate_data_dir(tmp_path / "subset", check_files=False)
        return list(read_table(tmp_path / "subset" / "text"))

    assert chosen(num=2, mode="first") == ["a-0", "a-1"]
    assert chosen(num=2, mode="last") == ["b-1", "b-2"]
    assert chosen(num=3, mode="shortest") == ["a-2", "b-0", "b-1"]
    assert chosen(num=2, mode="per-spk") == ["a-0", "a-1", "b-0", "b-1"]
    assert chosen(num=3) == ["a-0", "a-2", "b-1"]
    (tmp_path / "list").write_text("b any other field\n")
    assert chosen(spk_list=tmp_path / "list") == ["b-0", "b-1", "b-2"]
    with pytest.raises(DataError, match="cannot take 7 of 6 utterances"):
        chosen(num=7)
    with pytest.raises(DataError, match="1 of its 1 ids are no utterance"):
        chosen(utt_list=tmp_path / "list")


def test_copy_renames_consistently_and_keeps_recordings_of_segments(tmp_path: Path) -> None:
    data = small(tmp_path / "data", {"a-1": "a"}, segments={"a-1": "tape 0 1"}, wav_scp={"tape": "x.wav"})
    copy_data_dir(data, tmp_path / "copy", utt_prefix="p-", spk_prefix="p-", utt_suffix="-s")
    tables = read_data_dir(tmp_path / "copy")
    assert tables["utt2spk"] == {"p-a-1-s": "p-a"} and tables["spk2utt"] == {"p-a": "p-a-1-s"}
    assert tables["segments"] == {"p-a-1-s": "tape 0 1"} and tables["wav.scp"] == {"tape": "x.wav"}
    with pytest.raises(DataError, match="cannot be part of an id"):
        copy_data_dir(data, tmp_path / "bad", utt_prefix="x/")


def test_a_directory_is_never_written_into_itself(tmp_path: Path) -> None:
    data = small(tmp_path / "data", {"a-1": "a"})
    (tmp_path / "link").symlink_to(data)
    for operation in (
        lambda: copy_data_dir(data, tmp_path / "link"),
        lambda: subset_data_dir(data, data, num=1),
        lambda: combine_data_dirs(data, [data]),
        lambda: perturb_speed(data, data, speeds=[0.9]),
    ):
        with pytest.raises(DataError, match="same directory"):
            operation()


def test_writing_over_an_older_directory_removes_stale_tables_and_nothing_else(tmp_path: Path) -> None:
    old = small(tmp_path / "old", {"a-1": "a"}, feats_scp={"a-1": "x.ark:0"})
    (old / "notes.txt").write_text("mine")
    copy_data_dir(small(tmp_path / "new", {"b-1": "b"}), old)
    assert sorted(os.listdir(old)) == ["notes.txt", "spk2utt", "text", "utt2spk", "wav.scp"]
    assert read_table(old / "text") == {"b-1": "words"}
    assert sorted(os.listdir(tmp_path)) == ["new", "old"], "no temporary files are left"


def test_a_failed_write_leaves_the_older_directory_as_it_was(tmp_path: Path) -> None:
    data = small(tmp_path / "data", {"a-1": "a"})
    before = {file.name: file.read_bytes() for file in data.iterdir()}
    tables: Tables = {"utt2spk": {"b-1": "b"}, "text": {"b-1": "words"}}
    for dest in (data, tmp_path / "new", data / "text", data / "text" / "below"):
        with pytest.raises(DataError, match="cannot be written"):
            write_data_dir(dest, tables, {"fbank.yaml": tmp_path / "missing"})
    assert before == {file.name: file.read_bytes() for file in data.iterdir()}
    assert os.listdir(tmp_path) == ["data"]


def test_a_split_that_cannot_be_written_keeps_the_older_one(tmp_path: Path) -> None:
    data = small(tmp_path / "data", {"a-1": "a", "b-1": "b"})
    split_data_dir(data, 2)
    before = {file: file.read_bytes() for file in data.rglob("*") if file.is_file()}
    (data / "fbank.yaml").symlink_to(tmp_path)  # a folder cannot be copied as a file
    with pytest.raises(DataError, match="cannot be written"):
        split_data_dir(data, 2)
    (data / "fbank.yaml").unlink()
    assert before == {file: file.read_bytes() for file in data.rglob("*") if file.is_file()}


def test_perturb_speed_repeats_utterances_and_says_at_what_speed(tmp_path: Path) -> None:
    data = small(
        tmp_path / "data", {"a-1": "a"}, utt2dur={"a-1": "1.8"}, feats_scp={"a-1": "x.ark:0"}, utt2num_frames={"a-1": "178"}
    )
    assert perturb_speed(data, tmp_path / "sp", speeds=[0.9, 1.0, 1.1]).utterances == 3
    tables = read_data_dir(tmp_path / "sp")
    assert tables["utt2speed"] == {"a-1": "1.0", "sp0.9-a-1": "0.9", "sp1.1-a-1": "1.1"}
    assert tables["utt2spk"] == {"a-1": "a", "sp0.9-a-1": "sp0.9-a", "sp1.1-a-1": "sp1.1-a"}
    assert tables["wav.scp"] == dict.fromkeys(tables["utt2spk"], "/nowhere/a-1.wav")
    assert tables["utt2dur"] == {"a-1": "1.8", "sp0.9-a-1": "2", "sp1.1-a-1": "1.63636"}
    assert "feats.scp" not in tables and "utt2num_frames" not in tables
    validate_data_dir(tmp_path / "sp", check_files=False)
    with pytest.raises(DataError, match="perturbed already"):
        perturb_speed(tmp_path / "sp", tmp_path / "sp2", speeds=[0.9, 1.0])


def test_perturb_speed_shares_recordings_between_segments(tmp_path: Path) -> None:
    data = small(tmp_path / "data", {"a-1": "a"}, segments={"a-1": "tape 0 1"}, wav_scp={"tape": "x.wav"})
    perturb_speed(data, tmp_path / "sp", speeds=[1, 2])
    assert read_table(tmp_path / "sp" / "wav.scp") == {"tape": "x.wav"}
    assert read_table(tmp_path / "sp" / "segments") == {"a-1": "tape 0 1", "sp2-a-1": "tape 0 1"}
    assert read_table(tmp_path / "sp" / "utt2speed") == {"a-1": "1.0", "sp2-a-1": "2.0"}


@pytest.mark.parametrize("speeds", [[], [0.0], [-1.0], [0.9, 0.9], [float("nan")], [float("inf")], [11.0]])
def test_perturb_speed_refuses_impossible_factors(tmp_path: Path, speeds: list[float]) -> None:
    data = small(tmp_path / "data", {"a-1": "a"})
    with pytest.raises(DataError, match="speeds must be different factors"):
        perturb_speed(data, tmp_path / "sp", speeds=speeds)
