"""Archives: both libraries write what the other reads, files appear whole, and reading never executes anything."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import get_args

import kaldi_native_io
import kaldiio
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechtx.config.errors import DataError
from speechtx.data.ark import ArkWriter, Backend, read_ark, read_matrix, read_scp

BACKENDS = get_args(Backend)
both = pytest.mark.parametrize("backend", BACKENDS)


def features(num_frames: int = 50, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(-8.0, 4.0, (num_frames, 80)).astype(np.float32)


FEATS = {"ann-1": features(50, 1), "ann-2": features(1, 2), "bob-ü": features(300, 3)}


def write(
    directory: Path, backend: Backend | None = "kaldiio", *, compress: bool = False, feats: dict[str, np.ndarray] = FEATS
) -> Path:
    with ArkWriter(ark=directory / "f.ark", scp=directory / "f.scp", compress=compress, backend=backend) as writer:
        for key, matrix in feats.items():
            writer.write(key, matrix)
    return directory / "f.scp"


@pytest.mark.parametrize("reader", BACKENDS)
@pytest.mark.parametrize("writer", BACKENDS)
def test_what_one_library_writes_both_read_exactly(tmp_path: Path, writer: Backend, reader: Backend) -> None:
    table = read_scp(write(tmp_path, writer))
    assert list(table) == list(FEATS)
    for key, location in table.items():
        matrix = read_matrix(location, backend=reader)
        assert matrix.dtype == np.float32
        assert np.array_equal(matrix, FEATS[key])
        assert matrix.flags.writeable
    whole = dict(read_ark(tmp_path / "f.ark", backend=reader))
    assert list(whole) == list(FEATS)
    assert all(np.array_equal(whole[key], FEATS[key]) for key in FEATS)


@pytest.mark.parametrize("reader", BACKENDS)
@pytest.mark.parametrize("writer", BACKENDS)
def test_compression_keeps_features_close_in_a_quarter_of_the_size(tmp_path: Path, writer: Backend, reader: Backend) -> None:
    table = read_scp(write(tmp_path, writer, compress=True))
    for key, location in table.items():
        # 8 bits share out each quartile of a column; the outer ones are widest.
        assert np.abs(read_matrix(location, backend=reader) - FEATS[key]).max() < 0.2
    assert (tmp_path / "f.ark").stat().st_size < 0.3 * sum(m.nbytes for m in FEATS.values())
    assert [np.shape(m) for _, m in read_ark(tmp_path / "f.ark", backend=reader)] == [m.shape for m in FEATS.values()]


@settings(max_examples=30, deadline=None)
@given(num_frames=st.integers(1, 12), seed=st.integers(0, 99), constant=st.booleans())
def test_both_libraries_decompress_short_matrices_to_the_same(
    tmp_path_factory: pytest.TempPathFactory, num_frames: int, seed: int, constant: bool
) -> None:
    feats = np.full((num_frames, 5), -15.9, np.float32) if constant else features(num_frames, seed)
    directory = tmp_path_factory.getbasetemp()
    for writer in BACKENDS:
        location = read_scp(write(directory, writer, compress=True, feats={"a": feats}))["a"]
        one, other = (read_matrix(location, backend=reader) for reader in BACKENDS)
        np.testing.assert_allclose(one, other, atol=1e-4)
        np.testing.assert_allclose(one, feats, atol=0.3)


@both
def test_statistics_keep_double_precision_even_beside_compression(tmp_path: Path, backend: Backend) -> None:
    stats = np.random.default_rng(0).normal(size=(2, 81)) * 1e9
    scp = write(tmp_path, backend, compress=True, feats={"global": stats})
    matrix = read_matrix(read_scp(scp)["global"], dtype=np.float64, backend=backend)
    assert matrix.dtype == np.float64
    assert np.array_equal(matrix, stats)
    assert np.array_equal(
        read_matrix(str(tmp_path / "f.ark"), dtype=np.float64, backend=backend), stats
    )  # the only matrix needs no offset


def test_the_libraries_own_readers_read_our_files(tmp_path: Path) -> None:
    scp = write(tmp_path)
    theirs = kaldiio.load_scp(str(scp))
    native = {key: matrix.copy() for key, matrix in kaldi_native_io.SequentialFloatMatrixReader(f"scp:{scp}")}
    for key, matrix in FEATS.items():
        assert np.array_equal(theirs[key], matrix)
        assert np.array_equal(native[key], matrix)


def test_the_table_holds_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with ArkWriter(ark="f.ark", scp="f.scp") as writer:
        writer.write("a", features())
    monkeypatch.chdir("/")
    assert np.array_equal(read_matrix(read_scp(tmp_path / "f.scp")["a"]), features())


@both
def test_names_with_commas_spaces_and_colons_work(tmp_path: Path, backend: Backend) -> None:
    directory = tmp_path / "a, b: c"
    directory.mkdir()
    for key, location in read_scp(write(directory, backend)).items():
        assert np.array_equal(read_matrix(location, backend=backend), FEATS[key])


@both
def test_a_writer_that_fails_leaves_no_file_and_keeps_the_old_ones(tmp_path: Path, backend: Backend) -> None:
    with pytest.raises(RuntimeError), ArkWriter(ark=tmp_path / "f.ark", scp=tmp_path / "f.scp", backend=backend) as writer:
        writer.write("a", features())
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    write(tmp_path, backend)
    before = (tmp_path / "f.ark").read_bytes()
    with pytest.raises(DataError), ArkWriter(ark=tmp_path / "f.ark", scp=tmp_path / "f.scp", backend=backend) as writer:
        writer.write("a", features())
        writer.write("a", features())
    assert (tmp_path / "f.ark").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.ark", "f.scp"]


@pytest.mark.parametrize(
    ("key", "matrix", "why"),
    [
        ("a b", features(), "white space"),
        ("", features(), "white space"),
        ("a", np.full((2, 3), np.nan, np.float32), "NaN"),
        ("a", np.zeros((0, 3), np.float32), "shape"),
        ("a", np.zeros(3, np.float32), "shape"),
        ("a", np.zeros((2, 3), np.int32), "int32"),
    ],
)
def test_what_no_reader_could_use_is_not_written(tmp_path: Path, key: str, matrix: np.ndarray, why: str) -> None:
    with pytest.raises(DataError, match=why), ArkWriter(ark=tmp_path / "f.ark", scp=tmp_path / "f.scp") as writer:
        writer.write(key, matrix)


@both
@pytest.mark.parametrize("compress", [False, True])
def test_a_truncated_archive_is_an_error_that_names_file_and_key(tmp_path: Path, backend: Backend, compress: bool) -> None:
    table = read_scp(write(tmp_path, backend, compress=compress))
    ark = tmp_path / "f.ark"
    ark.write_bytes(ark.read_bytes()[:-1])
    assert np.shape(read_matrix(table["ann-2"], backend=backend)) == (1, 80)
    with pytest.raises(DataError, match=r"f.ark:\d+: bob-ü: truncated"):
        read_matrix(table["bob-ü"], key="bob-ü", backend=backend)
    with pytest.raises(DataError, match=r"f.ark: bob-ü: truncated"):
        list(read_ark(ark, backend=backend))


@both
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_damaged_archives_are_a_data_error_or_a_finite_matrix_never_a_crash(
    tmp_path_factory: pytest.TempPathFactory, backend: Backend, data: st.DataObject
) -> None:
    directory = tmp_path_factory.getbasetemp()
    write(directory, compress=data.draw(st.booleans()), feats={"a": features(9)[:, :3].copy()})
    content = bytearray((directory / "f.ark").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(len(content), 40) - 1))] = data.draw(st.integers(0, 255))
    (directory / "f.ark").write_bytes(content[: data.draw(st.integers(0, len(content)))])
    for read in (
        lambda: [read_matrix(f"{directory}/f.ark:2", backend=backend)],
        lambda: [m for _, m in read_ark(directory / "f.ark")],
    ):
        try:
            matrices = read()
        except DataError as err:
            assert "f.ark" in str(err)
        else:
            assert all(np.isfinite(m).all() for m in matrices)


@both
def test_an_offset_beside_the_matrix_is_an_error(tmp_path: Path, backend: Backend) -> None:
    write(tmp_path)
    for offset in (0, 3, 10**9):
        with pytest.raises(DataError, match="no binary Kaldi matrix"):
            read_matrix(f"{tmp_path}/f.ark:{offset}", backend=backend)
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_matrix(f"{tmp_path}/nowhere.ark:5", backend=backend)


@both
def test_commands_in_locations_never_run(tmp_path: Path, backend: Backend) -> None:
    witness = tmp_path / "ran"
    for location in (f"touch {witness} |", f"touch {witness}|", f"| touch {witness}", f"  touch {witness} | "):
        with pytest.raises(DataError, match="never run"):
            read_matrix(location, backend=backend)
        with pytest.raises(DataError, match="never run"):
            list(read_ark(location, backend=backend))
        with pytest.raises(DataError, match="never run"):
            ArkWriter(ark=location, backend=backend)
        (tmp_path / "evil.scp").write_text(f"good {tmp_path}/f.ark:5\nbad {location}\n")
        with pytest.raises(DataError, match=r"evil.scp:2: bad: .*never run"):
            read_scp(tmp_path / "evil.scp")
    assert not witness.exists()


def test_a_table_that_is_not_there_is_called_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"feats\.scp: no such file$"):
        read_scp(tmp_path / "feats.scp")


def test_a_table_may_separate_by_tabs_and_may_be_empty(tmp_path: Path) -> None:
    (tmp_path / "f.scp").write_text("a\tdir name/f.ark:1\nb  f.ark:2\n")
    assert read_scp(tmp_path / "f.scp") == {"a": "dir name/f.ark:1", "b": "f.ark:2"}
    (tmp_path / "f.scp").write_text("")
    assert read_scp(tmp_path / "f.scp") == {}


class Bomb:
    """Unpickling this creates a file; kaldiio unpickles what it finds behind the letters PKL."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


@both
def test_pickled_objects_in_an_archive_are_never_loaded(tmp_path: Path, backend: Backend) -> None:
    witness, ark = tmp_path / "ran", tmp_path / "f.ark"
    ark.write_bytes(b"a PKL" + pickle.dumps(Bomb(witness)))
    with pytest.raises(DataError, match="no binary Kaldi matrix"):
        read_matrix(f"{ark}:2", backend=backend)
    with pytest.raises(DataError, match="no binary Kaldi matrix"):
        list(read_ark(ark, backend=backend))
    assert not witness.exists()
    kaldiio.load_mat(f"{ark}:2")  # the danger is real
    assert witness.exists()


@pytest.mark.parametrize(
    ("content", "why"),
    [("a f.ark:1\nb\n", "f.scp:2: expected `key file.ark:offset`"), ("a f.ark:1\na f.ark:2\n", "f.scp:2: key a occurs twice")],
)
def test_a_malformed_table_is_named_by_line(tmp_path: Path, content: str, why: str) -> None:
    (tmp_path / "f.scp").write_text(content)
    with pytest.raises(DataError, match=why):
        read_scp(tmp_path / "f.scp")


def test_an_unknown_library_in_the_environment_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPEECHTX_ARK_BACKEND", "kaldi")
    with pytest.raises(DataError, match="SPEECHTX_ARK_BACKEND=kaldi: known libraries"):
        write(tmp_path, None)
