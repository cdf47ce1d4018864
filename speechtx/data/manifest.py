"""The utterance table: one row an utterance, joined from a data directory's tables by utterance id."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from speechtx.config.errors import DataError
from speechtx.config.load import load_config
from speechtx.config.schema import FbankConfig
from speechtx.data.ark import read_scp
from speechtx.data.kaldi_table import read_table


@dataclass(frozen=True, slots=True)
class Utterance:
    """One row: where its features lie, how long they are, what was said and by whom."""

    id: str
    feats: str  # ark location, `file.ark:offset`
    num_frames: int
    text: str
    speaker: str


def load_manifest(data_dir: str | Path, *, text: bool = True) -> list[Utterance]:
    """Reads the utterances of a data directory that has features, in the C order of their ids.

    Utterances without features (the feature stage names and counts those it skipped) are left out; a feature without a
    transcript, speaker or length is an error.

    Args:
        data_dir: a Kaldi data directory after stage 2.
        text: whether transcripts are needed; without, `Utterance.text` is empty where there is none.

    Raises:
        DataError: a table is missing or malformed, or an utterance of feats.scp is missing from another table.
    """
    data_dir = Path(data_dir)
    feats_path = data_dir / "feats.scp"
    if not feats_path.is_file():
        raise DataError(f"{feats_path}: no features; run stage fbank on {data_dir} first")
    feats = read_scp(feats_path)
    lengths = read_table(data_dir / "utt2num_frames")
    speakers = read_table(data_dir / "utt2spk")
    transcripts = read_table(data_dir / "text") if text or (data_dir / "text").is_file() else {}
    rows = []
    for key in sorted(feats, key=str.encode):
        _require(key, lengths, data_dir / "utt2num_frames")
        _require(key, speakers, data_dir / "utt2spk")
        if text:
            _require(key, transcripts, data_dir / "text")
        if not lengths[key].isdecimal():
            raise DataError(f"{data_dir / 'utt2num_frames'}: utterance {key}: {lengths[key]!r} is not a number of frames")
        rows.append(Utterance(key, feats[key], int(lengths[key]), transcripts.get(key, ""), speakers[key]))
    if not rows:
        raise DataError(f"{feats_path}: holds no utterance")
    return rows


def read_fbank_config(data_dir: str | Path) -> FbankConfig:
    """The configuration the features of `data_dir` were computed with.

    Raises:
        DataError: there is no such directory, or no configuration in it: nobody can tell whether the features fit a model.
    """
    path = Path(data_dir) / "fbank.yaml"
    if not path.parent.is_dir():
        raise DataError(f"{path.parent}: no such data directory")
    if not path.is_file():
        raise DataError(f"{path}: missing; features without their configuration are not used, run stage fbank again")
    return load_config(path, FbankConfig)


def require_same_features(config: FbankConfig, source: str | Path, other: FbankConfig, other_source: str | Path) -> None:
    """Raises DataError naming the fields in which two feature configurations differ."""
    ours, theirs = config.model_dump(), other.model_dump()
    different = [f"{name} {ours[name]!r} against {theirs[name]!r}" for name in ours if ours[name] != theirs[name]]
    if different:
        raise DataError(
            f"features of {source} and {other_source} were computed differently ({'; '.join(different)}); "
            "compute both with the same conf/fbank.yaml"
        )


def _require(key: str, table: dict[str, str], path: Path) -> None:
    if key not in table:
        raise DataError(f"{path}: utterance {key} of feats.scp is missing; run utils/data/fix_data_dir.sh {path.parent}")
