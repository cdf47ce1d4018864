"""Kaldi's archives of matrices: `ark` files and the `scp` tables that point into them.

The only file that touches kaldiio and kaldi_native_io. Both libraries would run a command found in a location, and kaldiio
would unpickle objects found in an archive; here a file is opened first and must hold a binary Kaldi matrix, so that
reading data from elsewhere never executes anything.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self, cast, get_args

import numpy as np

from speechtx.config.atomic import replacing
from speechtx.config.errors import DataError

Backend = Literal["kaldiio", "kaldi_native_io"]

# What follows the binary marker "\0B": float, double, and the three compressed layouts (matrix/compressed-matrix.h).
_BINARY = b"\0B"
_MATRIX_TYPES = (b"FM ", b"DM ", b"CM ", b"CM2 ", b"CM3 ")
_HEADER_BYTES = 32  # no header is longer
# Kaldi's numbers (CompressionMethod): "automatic" means 8 bits with percentiles per column for more than 8 rows, else 16 bits.
_AUTOMATIC_COMPRESSION = 1


def default_backend() -> Backend:
    """The library named by the environment variable SPEECHTX_ARK_BACKEND, kaldiio if there is none.

    Raises:
        DataError: the variable names no library known here.
    """
    name = os.environ.get("SPEECHTX_ARK_BACKEND", "kaldiio")
    if name not in get_args(Backend):
        raise DataError(f"SPEECHTX_ARK_BACKEND={name}: known libraries for archives are {' and '.join(get_args(Backend))}")
    return cast(Backend, name)


class ArkWriter:
    """Writes matrices to an archive and its table; the files appear when the block ends without an exception, or not at all.

    ```
    with ArkWriter(ark="feats.1.ark", scp="feats.1.scp", compress=True) as writer:
        writer.write("utt1", feats)
    ```

    Args:
        ark: path of the archive; the table points to it by its absolute path.
        scp: path of the table, None for an archive that is read from end to end.
        compress: Kaldi's lossy compression to 8 bits a value (about a quarter of the size).
        backend: which library writes, by default `default_backend()`; both write what Kaldi reads.
    """

    def __init__(
        self, *, ark: str | Path, scp: str | Path | None = None, compress: bool = False, backend: Backend | None = None
    ) -> None:
        _require_plain(str(ark))
        self._ark = Path(os.path.abspath(ark))
        self._scp = scp
        self._compress = compress
        self._backend = backend or default_backend()
        self._keys: set[str] = set()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._scp_stream: IO[str] | None = stack.enter_context(replacing(self._scp)) if self._scp is not None else None
            self._ark_stream: IO[bytes] = stack.enter_context(replacing(self._ark, "wb"))  # complete before its table is
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.__exit__(kind, value, trace)

    def write(self, key: str, matrix: np.ndarray) -> None:
        """Appends one matrix.

        Args:
            key: utterance or speaker id: no white space, not written before.
            matrix: (T, F) float32 (features) or float64 (statistics; never compressed), finite, T > 0, F > 0.

        Raises:
            DataError: the key or the matrix is not as described.
        """
        if not key or key.split() != [key]:
            raise DataError(f"{self._ark}: {key!r} cannot be a key of an archive: it is empty or has white space")
        if key in self._keys:
            raise DataError(f"{self._ark}: key {key} is written twice")
        if matrix.ndim != 2 or not matrix.size or matrix.dtype not in (np.float32, np.float64):
            raise DataError(f"{self._ark}: {key}: expected a float matrix (T, F), found {matrix.dtype} of shape {matrix.shape}")
        if not np.isfinite(matrix).all():
            raise DataError(f"{self._ark}: {key}: the matrix holds NaN or infinite values")
        self._keys.add(key)
        offset = self._ark_stream.tell() + len(key.encode()) + 1
        _write_entry(self._ark_stream, key, np.ascontiguousarray(matrix), self._compress, self._backend)
        if self._scp_stream is not None:
            self._scp_stream.write(f"{key} {self._ark}:{offset}\n")


def read_matrix(
    location: str, *, dtype: type[np.floating] = np.float32, key: str = "", backend: Backend | None = None
) -> np.ndarray:
    """Reads one matrix.

    Args:
        location: `file.ark:offset` as in an scp file, or a file that holds a single matrix (its key, if any, is skipped).
        dtype: np.float32 for features, np.float64 for statistics, whatever the archive holds.
        key: whose matrix it is; errors name it.
        backend: which library reads, by default `default_backend()`.

    Returns:
        (T, F) of `dtype`; compressed matrices are decompressed.

    Raises:
        DataError: a command instead of a file, no such file, or no complete matrix of finite numbers there.
    """
    path, offset = _split_location(location)
    where = f"{location}: {key}" if key else location
    try:
        with open(path, "rb") as stream:
            if offset is None and stream.read(2) != _BINARY:
                stream.seek(0)
                _read_key(stream, path)
                offset = stream.tell()
            stream.seek(offset or 0)
            return _read_entry(stream, path, dtype, backend or default_backend(), where)
    except OSError as err:
        raise DataError(f"{where}: cannot be read: {err.strerror or err}") from None


def read_ark(
    path: str | Path, *, dtype: type[np.floating] = np.float32, backend: Backend | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (key, matrix) of a whole archive in its order; returns and raises as `read_matrix`, errors name the key."""
    _require_plain(str(path))
    try:
        with open(path, "rb") as stream:
            while key := _read_key(stream, path):
                yield key, _read_entry(stream, str(path), dtype, backend or default_backend(), f"{path}: {key}")
    except OSError as err:
        raise DataError(f"{path}: cannot be read: {err.strerror or err}") from None


def read_scp(path: str | Path) -> dict[str, str]:
    """Reads a table key -> location, in its order.

    Raises:
        DataError: no such file, a line without a location, a key twice, a command; with file and line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as err:
        raise DataError(f"{path}: cannot be read as UTF-8 text: {err}") from None
    table: dict[str, str] = {}
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else [], start=1):
        key, location = [*line.split(None, 1), "", ""][:2]
        location = location.strip()
        if not location:
            raise DataError(f"{path}:{number}: expected `key file.ark:offset`, found {line!r}")
        if key in table:
            raise DataError(f"{path}:{number}: key {key} occurs twice")
        try:
            _require_plain(location)
        except DataError as err:
            raise DataError(f"{path}:{number}: {key}: {err}") from None
        table[key] = location
    return table


def _require_plain(location: str) -> None:
    stripped = location.strip()
    if stripped.startswith("|") or stripped.endswith("|"):
        raise DataError(f"{location}: a command instead of a file; commands in archive locations never run")
    if stripped in ("", "-"):
        raise DataError(f"{location!r} is not the name of a file")


def _split_location(location: str) -> tuple[str, int | None]:
    _require_plain(location)
    path, colon, offset = location.rpartition(":")
    return (path, int(offset)) if colon and offset.isdecimal() else (location, None)


def _read_key(stream: IO[bytes], path: str | Path) -> str:
    """The key before the next matrix, "" at the end of the archive."""
    key = bytearray()
    while (byte := stream.read(1)) not in (b" ", b""):
        key += byte
        if len(key) > 10_000:
            break
    if not byte and not key:
        return ""
    try:
        text = key.decode("utf-8").strip()
    except UnicodeDecodeError:
        text = ""
    if byte != b" " or text.split() != [text]:
        raise DataError(f"{path}: no key at byte {stream.tell() - len(key)}: truncated, corrupt or not an archive")
    return text


def _read_entry(stream: IO[bytes], path: str, dtype: type[np.floating], backend: Backend, where: str) -> np.ndarray:
    """Reads the matrix at the stream's position and leaves the stream behind it."""
    start = stream.tell()
    length = _entry_length(stream.read(_HEADER_BYTES), where)
    if start + length > os.fstat(stream.fileno()).st_size:
        raise DataError(
            f"{where}: truncated or corrupt: the matrix at byte {start} needs {length} bytes, which the file does not have"
        )
    stream.seek(start)
    try:
        matrix = _read_kaldi_native_io(path, start, dtype) if backend == "kaldi_native_io" else _read_kaldiio(stream)
    except Exception as err:  # both libraries raise whatever a damaged file leads them to
        raise DataError(f"{where}: corrupt: {err or type(err).__name__}") from None
    if not np.isfinite(matrix).all():
        raise DataError(f"{where}: the matrix holds NaN or infinite values")
    stream.seek(start + length)
    return np.array(matrix, dtype=dtype, order="C")  # libraries return read-only or library-owned memory


def _entry_length(header: bytes, where: str) -> int:
    """Bytes that the matrix takes, from its first ones; refuses all that is not a binary matrix of sensible size."""
    kind = header[2 : header.find(b" ", 2) + 1]
    if header[:2] != _BINARY or kind not in _MATRIX_TYPES:
        raise DataError(f"{where}: no binary Kaldi matrix there; the archive is truncated, corrupt, or of another type")
    compressed = kind.startswith(b"CM")
    body = 2 + len(kind) + (16 if compressed else 10)
    if compressed:  # float minimum, float range, int32 rows, int32 columns
        sizes = header[body - 8 : body - 4], header[body - 4 : body]
    else:  # "\4" int32 rows, "\4" int32 columns
        sizes = header[body - 9 : body - 5], header[body - 4 : body]
    rows, columns = (int.from_bytes(part, "little", signed=True) for part in sizes)
    if len(header) < body or rows <= 0 or columns <= 0:
        raise DataError(f"{where}: truncated or corrupt: a matrix of {rows} x {columns}")
    width = {b"FM ": 4, b"DM ": 8, b"CM ": 1, b"CM2 ": 2, b"CM3 ": 1}[kind]
    return body + rows * columns * width + (8 * columns if kind == b"CM " else 0)


def _read_kaldiio(stream: IO[bytes]) -> np.ndarray:
    from kaldiio.matio import read_kaldi

    return read_kaldi(stream)


def _read_kaldi_native_io(path: str, offset: int, dtype: type[np.floating]) -> np.ndarray:
    import kaldi_native_io

    reader: Any = kaldi_native_io.DoubleMatrix if dtype is np.float64 else kaldi_native_io.FloatMatrix
    return reader.read(f"{path}:{offset}").numpy()


def _write_entry(stream: IO[bytes], key: str, matrix: np.ndarray, compress: bool, backend: Backend) -> None:
    """Appends `key matrix` to the stream."""
    compress = compress and matrix.dtype == np.float32
    if backend == "kaldiio":
        import kaldiio

        kaldiio.save_ark(stream, {key: matrix}, compression_method=_AUTOMATIC_COMPRESSION if compress else None)
        return
    import kaldi_native_io

    # This library opens files by name only: each matrix goes through a scratch file, and is appended to the archive from there.
    with tempfile.NamedTemporaryFile(prefix="speechtx-ark-") as scratch:
        target = f"ark:{scratch.name}"
        writer: Any
        if compress:
            writer = kaldi_native_io.CompressedMatrixWriter(target)
            writer.write(key, matrix, kaldi_native_io.CompressionMethod(_AUTOMATIC_COMPRESSION))
        else:
            kind = kaldi_native_io.FloatMatrixWriter if matrix.dtype == np.float32 else kaldi_native_io.DoubleMatrixWriter
            writer = kind(target)
            writer.write(key, matrix)
        writer.close()
        stream.write(Path(scratch.name).read_bytes())
