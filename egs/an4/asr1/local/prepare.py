"""AN4, CMU's census database: Kaldi data directories with ESPnet's split, and the corpus' own lexicon.

The corpus: about 50 minutes of American English read over a close-talking microphone at Carnegie Mellon University around 1991:
people spell their names and addresses, say dates, telephone numbers and short commands (Alejandro Acero, "Acoustical and
environmental robustness in automatic speech recognition", Kluwer 1993). 948 training utterances of 74 speakers and 130 test
utterances of 10 others, 16 kHz, 16 bit.

Licence: free for any use, commercial or not, with CMU's copyright notice kept (`an4/LICENSE` in the archive).

Layout of the archive:

    an4/etc/an4_train.fileids         an4_clstk/fash/an251-fash-b         directory/speaker/file, no extension
    an4/etc/an4_train.transcription   <s> YES </s> (an251-fash-b)         upper case; the test file has no <s> </s>
    an4/etc/an4.dic                   AND(2)   AH N D                     pronunciations in phones, variants are numbered
    an4/wav/an4_clstk/<speaker>/*.sph, an4/wav/an4test_clstk/<speaker>/*.sph     NIST SPHERE, 1024 byte header, PCM

The split is ESPnet's, so that results compare: utterance ids are `<speaker>-<prompt>-b`, sorted in C order; the first 100
training utterances are `train_dev`, the other 848 `train_nodev`. The sets share no speaker (8, 66 and, in test, 10 speakers).
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from speechtx.config.errors import AudioError, DataError, SpeechtxError

NUM_TRAIN, NUM_DEV, NUM_TEST = 948, 100, 130
DEV_WORDS, TEST_WORDS = 591, 773
FIRST_VARIANT = {"A": "A(2)"}  # the letter; the dictionary begins with the article, which nobody says in AN4
_TRANSCRIPT = re.compile(r"(?P<words>.*)\((?P<file>[^()\s]+)\)")


@dataclass(frozen=True)
class Utterance:
    """One recording: `key` is the utterance id, `words` the reference in upper case."""

    key: str
    speaker: str
    wav: Path
    words: str


def utterance_key(file_id: str) -> tuple[str, str]:
    """Utterance id and speaker of `an251-fash-b`: (`fash-an251-b`, `fash`), so that sorting by utterance sorts by speaker.

    Raises:
        DataError: the name does not have the three parts prompt, speaker, b.
    """
    parts = file_id.split("-")
    if len(parts) != 3 or not all(parts):
        raise DataError(f"file id {file_id!r} is not <prompt>-<speaker>-b")
    prompt, speaker, channel = parts
    return f"{speaker}-{prompt}-{channel}", speaker


def read_subset(corpus: Path, name: str) -> list[Utterance]:
    """The utterances of `an4_<name>` (train or test), sorted by id.

    Raises:
        DataError: a list is missing, malformed, or disagrees with the other one or with the audio on disk.
    """
    transcription = corpus / "etc" / f"an4_{name}.transcription"
    words: dict[str, str] = {}
    for number, line in enumerate(_lines(transcription), start=1):
        match = _TRANSCRIPT.fullmatch(line.strip())
        spoken = [word for word in match["words"].split() if word not in ("<s>", "</s>")] if match else []
        if not match or not spoken:
            raise DataError(f"{transcription}:{number}: expected '<s> WORDS </s> (file-id)', found {line!r}")
        if match["file"] in words:
            raise DataError(f"{transcription}:{number}: {match['file']} is transcribed twice")
        words[match["file"]] = " ".join(spoken)

    fileids = corpus / "etc" / f"an4_{name}.fileids"
    utterances = []
    for number, line in enumerate(_lines(fileids), start=1):
        file_id = line.strip().rsplit("/", 1)[-1]
        if file_id not in words:
            raise DataError(f"{fileids}:{number}: {file_id} has no line in {transcription.name}")
        wav = corpus / "wav" / f"{line.strip()}.sph"
        if not wav.is_file():
            raise DataError(f"{fileids}:{number}: {wav} is missing; the archive is incomplete")
        key, speaker = utterance_key(file_id)
        utterances.append(Utterance(key=key, speaker=speaker, wav=wav.resolve(), words=words.pop(file_id)))
    if words:
        raise DataError(f"{transcription}: {len(words)} transcripts without a recording, the first is {next(iter(words))}")
    return sorted(utterances, key=lambda utterance: utterance.key)  # code points, which is C order in UTF-8


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise DataError(f"{path}: missing; is this the unpacked an4_sphere archive?")
    return path.read_text(encoding="utf-8").splitlines()


def sphere_is_intact(path: Path) -> bool:
    """Whether the samples agree with the checksum that the SPHERE header carries (their sum modulo 65536).

    Raises:
        AudioError: not a 16 kHz, 16 bit, mono SPHERE file, or shorter than its header says.
    """
    data = path.read_bytes()
    if data[:8] != b"NIST_1A\n":
        raise AudioError(f"{path}: not a NIST SPHERE file")
    size = int(data[8:16])
    header = {}
    for line in data[16:size].decode("ascii", "replace").split("end_head")[0].splitlines():
        name, _, value = line.strip().split(" ", 2) if line.count(" ") >= 2 else (line, "", "")
        header[name] = value
    for name, wanted in (("sample_rate", "16000"), ("sample_n_bytes", "2"), ("channel_count", "1")):
        if header.get(name) != wanted:
            raise AudioError(f"{path}: {name} is {header.get(name, 'missing')}, expected {wanted}")
    if len(data) - size != 2 * int(header["sample_count"]):
        raise AudioError(f"{path}: holds {(len(data) - size) // 2} samples, its header says {header['sample_count']}: cut short?")
    samples = np.frombuffer(data, dtype=">u2" if header.get("sample_byte_format") == "10" else "<u2", offset=size)
    return int(samples.sum(dtype=np.int64)) % 65536 == int(header.get("sample_checksum", -1))


def split(train: Sequence[Utterance], test: Sequence[Utterance]) -> dict[str, Sequence[Utterance]]:
    """ESPnet's three sets, from the sorted lists; checked against the known sizes.

    Raises:
        DataError: counts or words differ from AN4's, so scores would not compare with anybody's.
    """
    if len(train) != NUM_TRAIN or len(test) != NUM_TEST:
        raise DataError(f"expected {NUM_TRAIN} training and {NUM_TEST} test utterances, found {len(train)} and {len(test)}")
    sets = {"train_nodev": train[NUM_DEV:], "train_dev": train[:NUM_DEV], "test": test}
    for name, wanted in (("train_dev", DEV_WORDS), ("test", TEST_WORDS)):
        if (found := count_words(sets[name])) != wanted:
            raise DataError(f"{name}: {found} words, AN4 has {wanted} there; the transcripts were altered")
    return sets


def count_words(utterances: Iterable[Utterance]) -> int:
    """Number of reference words."""
    return sum(len(utterance.words.split()) for utterance in utterances)


def write_data_dir(path: Path, utterances: Sequence[Utterance]) -> None:
    """Writes wav.scp, text, utt2spk and spk2utt, each whole or not at all; unchanged files keep their time."""
    speakers: dict[str, list[str]] = {}
    for utterance in utterances:
        speakers.setdefault(utterance.speaker, []).append(utterance.key)
    tables = {
        "wav.scp": [f"{utterance.key} {utterance.wav}" for utterance in utterances],
        "text": [f"{utterance.key} {utterance.words}" for utterance in utterances],
        "utt2spk": [f"{utterance.key} {utterance.speaker}" for utterance in utterances],
        "spk2utt": [f"{speaker} {' '.join(keys)}" for speaker, keys in sorted(speakers.items())],
    }
    path.mkdir(parents=True, exist_ok=True)
    for name, lines in tables.items():
        _write(path / name, "".join(f"{line}\n" for line in lines))


def _write(target: Path, content: str) -> None:
    """A file with the same content keeps its time."""
    if target.is_file() and target.read_text(encoding="utf-8") == content:
        return
    scratch = target.with_name(f".{target.name}.tmp")
    scratch.write_text(content, encoding="utf-8")
    scratch.replace(target)


def read_lexicon(corpus: Path) -> dict[str, list[list[str]]]:
    """The pronunciations of each word, the one to use first.

    Raises:
        DataError: the dictionary is missing, or a line is not a word and its phones.
    """
    dictionary = corpus / "etc" / "an4.dic"
    entries: dict[str, list[str]] = {}
    for number, line in enumerate(_lines(dictionary), start=1):
        entry, *phones = line.split()
        if not phones:
            raise DataError(f"{dictionary}:{number}: {entry} has no phones")
        entries[entry] = phones
    lexicon: dict[str, list[list[str]]] = {}
    for entry in sorted(entries, key=lambda entry: entry not in FIRST_VARIANT.values()):  # else as in the dictionary
        lexicon.setdefault(entry.partition("(")[0], []).append(entries[entry])
    return lexicon


def write_lexicon(path: Path, lexicon: dict[str, list[list[str]]]) -> None:
    """Writes Kaldi's lexicon.txt, whole or not at all."""
    lines = (f"{word} {' '.join(phones)}\n" for word in sorted(lexicon) for phones in lexicon[word])
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, "".join(lines))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="the unpacked directory that holds etc/ and wav/")
    parser.add_argument("--data", type=Path, default=Path("data"), help="where the data directories go (%(default)s)")
    args = parser.parse_args(argv)
    try:
        sets = split(read_subset(args.corpus, "train"), read_subset(args.corpus, "test"))
        altered = [utterance.wav for part in sets.values() for utterance in part if not sphere_is_intact(utterance.wav)]
        if altered:
            print(f"warning: {len(altered)} recordings differ from their header's checksum, first {altered[0]}", file=sys.stderr)
        for name, utterances in sets.items():
            write_data_dir(args.data / name, utterances)
            speakers = len({utterance.speaker for utterance in utterances})
            words = count_words(utterances)
            print(f"{args.data / name}: {len(utterances)} utterances, {words} words, {speakers} speakers")
        write_lexicon(args.data / "local" / "dict" / "lexicon.txt", read_lexicon(args.corpus))
    except SpeechtxError as error:
        print(f"local/prepare.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
