"""Binary files of KenLM (Heafield 2011; made by `build_binary`): what their header says, and their words.

Only what is needed to say early and plainly that a file is damaged or made for other tokens. Probabilities are KenLM's own
business (`kenlm_process`).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from speechtx.config.errors import DataError
from speechtx.text.arpa import KENLM_MAGIC, UNK

# lm/binary_format.cc: the magic string padded to 56 bytes, test values of float, int and 64-bit int; then order, probing
# multiplier, kind, whether the words are in the file, version of that kind; then a count for each order.
_REFERENCE = struct.pack("<56s3f3IQ", KENLM_MAGIC + b" format version 5\n", 0.0, 1.0, -0.5, 1, 0xFFFFFFFF, 0, 1)
_FIXED = struct.Struct("<B3xfI?3xI")
_KINDS = ("probing", "rest_probing", "trie", "quant_trie", "array_trie", "quant_array_trie")
_MAX_ORDER = 20  # far more than KenLM is ever compiled for
_TAIL = 1 << 20


@dataclass(frozen=True)
class KenlmFile:
    """What a file says of itself.

    Attributes:
        path: of the file.
        order: n.
        kind: of its tables.
        words: all that it lists, <unk> first; None if it was built without them, which `build_binary` does on demand.
        knows_unk: whether the ARPA file gave <unk> a probability; False where the file does not tell.
    """

    path: Path
    order: int
    kind: str
    words: list[str] | None
    knows_unk: bool


def is_kenlm_binary(path: str | Path) -> bool:
    """Whether a file begins like one."""
    with Path(path).open("rb") as stream:
        return stream.read(len(KENLM_MAGIC)) == KENLM_MAGIC


def read_kenlm_binary(path: str | Path) -> KenlmFile:
    """Reads the header and the list of words, which ends the file, so that a file that was cut off fails here.

    Raises:
        DataError: another version or byte order, a header that cannot be, n-grams that do not fit into the file, words that are
            missing or no UTF-8.
    """
    path = Path(path)
    with path.open("rb") as stream:
        size = path.stat().st_size
        if stream.read(len(_REFERENCE)) != _REFERENCE:
            raise DataError(
                f"{path}: a binary of KenLM of another version or byte order, or damaged; build it again from the ARPA file"
            )
        fixed = stream.read(_FIXED.size)
        order, _, kind, has_words, _ = _FIXED.unpack(fixed) if len(fixed) == _FIXED.size else (0, 0.0, 0, False, 0)
        counts = stream.read(8 * order)
        if not 1 <= order <= _MAX_ORDER or kind >= len(_KINDS) or len(counts) < 8 * order:
            raise DataError(f"{path}: damaged: its header says order {order} and kind {kind}")
        numbers = struct.unpack(f"<{order}Q", counts)
        if sum(numbers) > 8 * size:  # every n-gram takes more than a bit
            raise DataError(f"{path}: damaged or cut off: {sum(numbers):,} n-grams do not fit into {size:,} bytes")
        words, knows_unk = _read_words(path, stream, size, numbers[0]) if has_words else (None, False)
    return KenlmFile(path, order, _KINDS[kind], words, knows_unk)


def _read_words(path: Path, stream: BinaryIO, size: int, count: int) -> tuple[list[str], bool]:
    """The words at the end of the file, a zero byte behind each: <unk> first, which is counted only if the ARPA file had it."""
    length, pieces = 0, [b""]
    while len(pieces) < count + 3 and length < size:
        length = min(size, max(_TAIL, 2 * length))
        stream.seek(size - length)
        pieces = stream.read(length).split(b"\0")
    for number, knows_unk in ((count, True), (count + 1, False)):
        words = pieces[-1 - number : -1]
        if pieces[-1] == b"" and len(words) == number and words and words[0].endswith(UNK.encode()):
            try:
                return [UNK, *(word.decode("utf-8") for word in words[1:])], knows_unk
            except UnicodeDecodeError:
                raise DataError(f"{path}: damaged: a word that is not UTF-8") from None
    raise DataError(f"{path}: damaged or cut off: its list of {count:,} words is not complete")
