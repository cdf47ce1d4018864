"""AN4's data preparation: the split everybody compares on, from the original archive."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from speechtx.config.errors import AudioError, DataError

REPO = Path(__file__).resolve().parents[2]
LOCAL = REPO / "egs" / "an4" / "asr1" / "local"
ARCHIVE = REPO.parent / "shared" / "data" / "an4_sphere.tar.gz"


@pytest.fixture(scope="module")
def prepare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("an4_prepare", LOCAL / "prepare.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["an4_prepare"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three data directories, made from the archive as stage 1 makes them."""
    if not ARCHIVE.is_file():
        pytest.skip(f"the AN4 archive is not at {ARCHIVE}")
    root = tmp_path_factory.mktemp("an4")
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    for command in (
        [str(REPO / "utils/data/fetch_archive.py"), "--archive", str(ARCHIVE), "--out", str(root / "corpus")],
        [str(LOCAL / "prepare.py"), "--corpus", str(root / "corpus" / "an4"), "--data", str(root / "data")],
    ):
        subprocess.run([sys.executable, *command], check=True, env=environment, stdout=subprocess.DEVNULL)
    return root / "data"


def table(path: Path) -> dict[str, str]:
    return dict(line.split(" ", 1) for line in path.read_text(encoding="utf-8").splitlines())


def test_the_lexicon_begins_with_the_letter_and_covers_every_set(data, prepare):
    lines = (data / "local" / "dict" / "lexicon.txt").read_text().splitlines()
    assert lines[:4] == ["A EY", "A AH", "AND AE N D", "AND AH N D"]
    assert [word for word, *_ in map(str.split, lines)] == sorted(word for word, *_ in map(str.split, lines))
    texts = [table(data / name / "text") for name in ("train_nodev", "train_dev", "test")]
    assert {word for text in texts for line in text.values() for word in line.split()} <= {line.split()[0] for line in lines}
    with pytest.raises(DataError, match=r"an4\.dic: missing"):
        prepare.read_lexicon(data)


def test_a_dictionary_line_without_phones_is_named(tmp_path, prepare):
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "an4.dic").write_text("B  B IY\nC\n")
    with pytest.raises(DataError, match=r"an4\.dic:2: C has no phones"):
        prepare.read_lexicon(tmp_path)


@pytest.mark.parametrize(
    ("name", "utterances", "words", "speakers"),
    [("train_nodev", 848, 4851, 66), ("train_dev", 100, 591, 8), ("test", 130, 773, 10)],
)
def test_the_split_is_the_one_published_results_use(data, name, utterances, words, speakers):
    text = table(data / name / "text")
    assert len(text) == utterances
    assert sum(len(line.split()) for line in text.values()) == words
    assert len(set(table(data / name / "utt2spk").values())) == speakers


def test_dev_is_the_first_hundred_training_utterances_in_c_order(data):
    dev, rest = list(table(data / "train_dev" / "text")), list(table(data / "train_nodev" / "text"))
    assert [*dev, *rest] == sorted([*dev, *rest], key=str.encode)
    assert dev[0] == "fash-an251-b"


def test_two_test_words_are_unseen_in_training(data):
    vocabulary = {
        name: {word for line in table(data / name / "text").values() for word in line.split()} for name in ("train_nodev", "test")
    }
    assert vocabulary["test"] - vocabulary["train_nodev"] == {"THIRTEEN", "NOVEMBER"}


def test_transcripts_carry_no_markup_and_audio_is_there(data):
    for name in ("train_nodev", "train_dev", "test"):
        for line in table(data / name / "text").values():
            assert line == line.upper() and not set(line) & set("<>()/"), line
        for path in table(data / name / "wav.scp").values():
            assert Path(path).is_absolute() and path.endswith(".sph") and Path(path).is_file()


def test_every_utterance_id_begins_with_its_speaker(data):
    for name in ("train_nodev", "train_dev", "test"):
        utt2spk = table(data / name / "utt2spk")
        assert all(key.startswith(f"{speaker}-") for key, speaker in utt2spk.items())
        assert list(utt2spk.values()) == sorted(utt2spk.values())
        assert {key for keys in table(data / name / "spk2utt").values() for key in keys.split()} == set(utt2spk)


def sphere(path: Path, samples: np.ndarray, *, declared: int | None = None, rate: int = 16000, order: str = "01") -> None:
    header = f"""NIST_1A
   1024
sample_count -i {samples.size if declared is None else declared}
sample_rate -i {rate}
sample_n_bytes -i 2
sample_byte_format -s2 {order}
channel_count -i 1
sample_checksum -i {int(samples.astype(np.int64).sum()) % 65536}
end_head
"""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header.encode().ljust(1024) + samples.astype("<i2" if order == "01" else ">i2").tobytes())


def make_corpus(root: Path, transcription: str, fileids: str) -> Path:
    (root / "etc").mkdir(parents=True)
    (root / "etc" / "an4_train.transcription").write_text(transcription)
    (root / "etc" / "an4_train.fileids").write_text(fileids)
    for line in fileids.split():
        sphere(root / "wav" / f"{line}.sph", np.arange(-50, 50))
    return root


def test_ids_are_turned_round_so_that_speakers_stay_together(prepare, tmp_path):
    corpus = make_corpus(
        tmp_path,
        "<s> GO </s> (an2-mabc-b)\nENTER  FOUR (an1-mabc-b)\n<s> A B </s> (an9-fxyz-b)\n",
        "t/an2-mabc-b\nt/an1-mabc-b\nt/an9-fxyz-b\n",
    )
    utterances = prepare.read_subset(corpus, "train")
    assert [(item.key, item.speaker, item.words) for item in utterances] == [
        ("fxyz-an9-b", "fxyz", "A B"),
        ("mabc-an1-b", "mabc", "ENTER FOUR"),
        ("mabc-an2-b", "mabc", "GO"),
    ]


@pytest.mark.parametrize(
    ("transcription", "fileids", "message"),
    [
        ("<s> GO </s>\n", "t/an2-mabc-b\n", "transcription:1: expected"),
        ("<s>  </s> (an2-mabc-b)\n", "t/an2-mabc-b\n", "transcription:1: expected"),
        ("GO (an2-mabc-b)\nNO (an2-mabc-b)\n", "t/an2-mabc-b\n", "transcription:2: an2-mabc-b is transcribed twice"),
        ("GO (an2-mabc-b)\n", "t/an2-mabc-b\nt/an3-mabc-b\n", "fileids:2: an3-mabc-b has no line"),
        ("GO (an2-mabc-b)\nNO (an3-mabc-b)\n", "t/an2-mabc-b\n", "1 transcripts without a recording"),
        ("GO (an2mabc)\n", "t/an2mabc\n", "is not <prompt>-<speaker>-b"),
    ],
)
def test_an_altered_corpus_is_refused_with_file_and_line(prepare, tmp_path, transcription, fileids, message):
    corpus = make_corpus(tmp_path, transcription, fileids)
    with pytest.raises(DataError, match=message):
        prepare.read_subset(corpus, "train")


def test_a_missing_recording_is_named(prepare, tmp_path):
    corpus = make_corpus(tmp_path, "GO (an2-mabc-b)\n", "t/an2-mabc-b\n")
    (corpus / "wav" / "t" / "an2-mabc-b.sph").unlink()
    with pytest.raises(DataError, match=r"an2-mabc-b\.sph is missing"):
        prepare.read_subset(corpus, "train")


def test_other_counts_than_an4s_are_refused(prepare, tmp_path):
    utterance = prepare.Utterance(key="a-1-b", speaker="a", wav=tmp_path, words="GO")
    with pytest.raises(DataError, match="expected 948 training and 130 test utterances, found 947 and 130"):
        prepare.split([utterance] * 947, [utterance] * 130)
    with pytest.raises(DataError, match="train_dev: 100 words"):
        prepare.split([utterance] * 948, [utterance] * 130)


@pytest.mark.parametrize("order", ["01", "10"])
def test_the_checksum_in_a_sphere_header_finds_altered_samples(prepare, tmp_path, order):
    path = tmp_path / "a.sph"
    sphere(path, np.arange(-300, 500), order=order)
    assert prepare.sphere_is_intact(path)
    data = bytearray(path.read_bytes())
    data[1500] ^= 1
    path.write_bytes(data)
    assert not prepare.sphere_is_intact(path)


def test_truncated_wrong_rate_and_foreign_files_are_errors(prepare, tmp_path):
    path = tmp_path / "a.sph"
    sphere(path, np.arange(100), declared=200)
    with pytest.raises(AudioError, match="100 samples, its header says 200"):
        prepare.sphere_is_intact(path)
    sphere(path, np.arange(100), rate=8000)
    with pytest.raises(AudioError, match="sample_rate is 8000"):
        prepare.sphere_is_intact(path)
    path.write_bytes(b"RIFF" + bytes(2000))
    with pytest.raises(AudioError, match="not a NIST SPHERE file"):
        prepare.sphere_is_intact(path)
