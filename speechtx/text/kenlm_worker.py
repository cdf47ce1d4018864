"""The process that holds a KenLM model; started by `kenlm_process`, which explains why. Needs nothing but the module `kenlm`.

Arguments: the binary file, the number of words of a context. Standard input: a length and as many bytes of words with zero
bytes between them; then, again and again, a number of contexts and the contexts, each its word numbers, oldest first, -1 for
none, -2 for the beginning of a sentence. Standard output: a byte for each word, 1 if the model lists it; then for each context
log10 P(word) of all words. All numbers are int32 and float32.
"""

from __future__ import annotations

import array
import importlib
import struct
import sys


def serve(path: str, length: int) -> None:
    """Answers until standard input ends."""
    kenlm = importlib.import_module("kenlm")
    config = kenlm.Config()
    config.load_method = kenlm.LoadMethod.READ  # not mapped: a file that is cut off while it is in use harms nobody
    model = kenlm.Model(path, config)
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    (size,) = struct.unpack("i", source.read(4))
    words = source.read(size).decode("utf-8").split("\0")
    sink.write(bytes(word in model for word in words))
    sink.flush()
    score, unused = model.BaseScore, kenlm.State()
    while len(head := source.read(4)) == 4:
        (count,) = struct.unpack("i", head)
        numbers = array.array("i", source.read(4 * count * length))
        for i in range(count):
            state = kenlm.State()
            model.NullContextWrite(state)
            for number in numbers[i * length : (i + 1) * length]:
                if number == -2:
                    model.BeginSentenceWrite(state)
                elif number >= 0:
                    after = kenlm.State()
                    score(state, words[number], after)
                    state = after
            sink.write(array.array("f", [score(state, word, unused) for word in words]).tobytes())
        sink.flush()


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
