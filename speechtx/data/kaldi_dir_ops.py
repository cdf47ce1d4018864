"""Making data directories out of others: subset, combine, split, copy under new names, speed perturbation.

Every operation reads its sources completely before it writes, and never writes into a source.
"""

from __future__ import annotations

import bisect
import itertools
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from speechtx.config.errors import DataError
from speechtx.config.load import load_config
from speechtx.config.schema import FbankConfig
from speechtx.data.kaldi_dir import CARRIED, Tables, read_data_dir, restrict, write_data_dir
from speechtx.data.kaldi_table import TABLES, is_valid_id, parse_segment, read_table

SubsetMode = Literal["spread", "first", "last", "shortest", "per-spk"]
_FEATURE_TABLES = ("feats.scp", "utt2num_frames", "cmvn.scp")


@dataclass(frozen=True, kw_only=True)
class Written:
    """A directory that was written, its number of utterances, and what the user should know about it."""

    path: Path
    utterances: int
    notes: tuple[str, ...] = ()


def subset_data_dir(
    src: str | Path,
    dest: str | Path,
    *,
    num: int | None = None,
    mode: SubsetMode = "spread",
    utt_list: str | Path | None = None,
    spk_list: str | Path | None = None,
) -> Written:
    """Takes some utterances of a directory: `num` of them chosen by `mode`, or those of a list.

    Args:
        src: the directory to take from.
        dest: the directory to write.
        num: how many utterances; for mode `per-spk` how many of each speaker at most.
        mode: `spread` evenly over the directory, `first`, `last`, `shortest`, or `per-spk`.
        utt_list: file whose lines begin with the utterances to take.
        spk_list: file whose lines begin with the speakers to take.

    Raises:
        DataError: more utterances asked for than there are, an id of a list that is not there, or an unusable source.
    """
    src, dest = _two(src, dest)
    tables = read_data_dir(src)
    utt2spk = tables["utt2spk"]
    if utt_list is not None:
        chosen = _listed(utt_list, set(utt2spk), f"utterance of {src}")
    elif spk_list is not None:
        speakers = _listed(spk_list, set(utt2spk.values()), f"speaker of {src}")
        chosen = {utt for utt, speaker in utt2spk.items() if speaker in speakers}
    elif num is None:
        raise DataError("subset: neither a number of utterances nor a list of them was given")
    else:
        chosen = _choose(src, tables, num, mode)
    carried = {name: path for name, path in _carried(src).items() if name != "global_cmvn.ark"}
    notes = _left_behind(src)
    if (src / "global_cmvn.ark").exists():
        notes += ("global_cmvn.ark was left behind: it describes all of the source; run `speechtx cmvn`",)
    write_data_dir(dest, restrict(tables, chosen), carried)
    return Written(path=dest, utterances=len(chosen), notes=notes)


def combine_data_dirs(dest: str | Path, sources: Sequence[str | Path]) -> Written:
    """Joins directories with disjoint utterances; speakers may be shared.

    A table stays if all sources have it. Where only some have `segments`, whole recordings get a segment from 0 to -1
    (the end); where only some have `utt2speed`, the others' utterances have speed 1.

    Raises:
        DataError: an utterance in two sources, a recording with two audio files, a speaker with two genders, or features
            computed with different configurations.
    """
    if not sources:
        raise DataError(f"{dest}: no directories to combine")
    paths = [_two(source, dest)[0] for source in sources]
    parts = [_completed(path, read_data_dir(path), sources=paths) for path in paths]
    owner: dict[str, Path] = {}
    for path, part in zip(paths, parts, strict=True):
        for utt in part["utt2spk"]:
            if utt in owner:
                advice = "give them prefixes with copy_data_dir.sh --utt-prefix"
                raise DataError(f"utterance {utt} is both in {owner[utt]} and in {path}; {advice}")
            owner[utt] = path
    combined: Tables = {}
    notes: tuple[str, ...] = ()
    for name in TABLES:
        holders = [path for path, part in zip(paths, parts, strict=True) if name in part]
        if len(holders) == len(paths):
            conflict = _merge(combined, name, paths, parts)
            notes += (conflict,) if conflict else ()
        elif holders and name != "spk2utt":
            lacking = [str(path) for path in paths if path not in holders]
            notes += (f"{name} was left out: not in {', '.join(lacking)}",)
    carried: dict[str, Path] = {}
    if "feats.scp" in combined:
        carried = _common_fbank(paths)
    for name in ("fbank.yaml", "global_cmvn.ark"):
        if name not in carried and any((path / name).exists() for path in paths):
            notes += (f"{name} was left out; run " + ("`speechtx cmvn`" if name == "global_cmvn.ark" else "the feature stage"),)
    write_data_dir(dest, combined, carried)
    return Written(path=Path(dest), utterances=len(owner), notes=notes)


def split_data_dir(path: str | Path, num: int, *, per_utt: bool = False) -> tuple[list[Path], tuple[str, ...]]:
    """Splits a directory into `DIR/split<num>/1` to `DIR/split<num>/<num>`, always the same way.

    Parts follow the order of the directory and last about equally long. Speakers stay in one part if there are enough of
    them and no part gets more than twice its share that way; else speakers are split too and the notes say so.

    Args:
        path: the directory.
        num: number of parts, at most the number of utterances.
        per_utt: ignore speakers.

    Returns:
        The parts, and notes for the user.
    """
    path = Path(path)
    tables = read_data_dir(path)
    utt2spk = tables["utt2spk"]
    if not 1 <= num <= len(utt2spk):
        raise DataError(f"{path}: {len(utt2spk)} utterances cannot be split into {num} parts; ask for 1 to {len(utt2spk)}")
    weights = _durations(tables) or dict.fromkeys(utt2spk, 1.0)
    by_speaker: dict[str, list[str]] = {}
    for utt in sorted(utt2spk):
        by_speaker.setdefault(utt2spk[utt], []).append(utt)
    notes: tuple[str, ...] = ()
    groups = [[utt] for utt in sorted(utt2spk)]
    if not per_utt and len(by_speaker) >= num:
        share = sum(weights.values()) / num
        whole = _partition(list(by_speaker.values()), weights, num)
        if max(sum(weights[utt] for utt in part) for part in whole) <= 2 * share:
            groups = list(by_speaker.values())
        else:
            notes = (f"{path}: some speakers are in two parts, because whole speakers would make parts of very unequal length",)
    elif not per_utt:
        notes = (f"{path}: some speakers are in two parts, because there are {len(by_speaker)} speakers for {num} parts",)
    name = f"split{num}utt" if per_utt else f"split{num}"
    try:
        with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=path) as staging:
            new = Path(staging) / "new"
            for number, part in enumerate(_partition(groups, weights, num), start=1):
                write_data_dir(new / str(number), restrict(tables, set(part)), _carried(path))
            if (path / name).exists():
                os.replace(path / name, Path(staging) / "old")
            os.replace(new, path / name)
    except OSError as err:
        raise DataError(f"{path / name}: cannot be written: {err}") from None
    return [path / name / str(number) for number in range(1, num + 1)], notes


def copy_data_dir(
    src: str | Path, dest: str | Path, *, utt_prefix: str = "", spk_prefix: str = "", utt_suffix: str = "", spk_suffix: str = ""
) -> Written:
    """Copies a directory, with prefixes and suffixes for its utterance and speaker ids.

    Without `segments` the recordings are the utterances and are renamed with them.

    Raises:
        DataError: the source cannot be read, or an affix contains blanks, slashes or what cannot be printed.
    """
    src, dest = _two(src, dest)
    for affix in filter(None, (utt_prefix, spk_prefix, utt_suffix, spk_suffix)):
        if not is_valid_id(affix):
            raise DataError(f"{affix!a} cannot be part of an id; ids have no blanks, slashes or unprintable characters")
    tables = _renamed(
        read_data_dir(src), lambda utt: f"{utt_prefix}{utt}{utt_suffix}", lambda spk: f"{spk_prefix}{spk}{spk_suffix}"
    )
    write_data_dir(dest, tables, _carried(src))
    return Written(path=dest, utterances=len(tables["utt2spk"]), notes=_left_behind(src))


def perturb_speed(src: str | Path, dest: str | Path, *, speeds: Sequence[float]) -> Written:
    """Repeats every utterance at other speeds, to be applied when features are computed (Ko et al., Interspeech 2015).

    Utterances and speakers at speed f are named `sp<f>-...`; those at speed 1 keep their names. The factors go to
    `utt2speed`, audio and `segments` times stay those of the recording, `utt2dur` is divided by the factor, and features
    are left behind.

    Args:
        src: the directory to perturb.
        dest: the directory to write.
        speeds: factors from 0.1 to 10, each once; 2 is twice as fast.

    Raises:
        DataError: factors out of range or repeated, or a source that is perturbed already.
    """
    src, dest = _two(src, dest)
    names = [f"{speed:g}" for speed in speeds]
    if not speeds or len(set(names)) < len(names) or not all(math.isfinite(speed) and 0.1 <= speed <= 10 for speed in speeds):
        raise DataError(
            f"speeds must be different factors from 0.1 to 10, such as 0.9,1.0,1.1; found {','.join(names) or 'none'}"
        )
    tables = read_data_dir(src)
    if any(float(speed) != 1 for speed in tables.pop("utt2speed", {}).values()):
        raise DataError(f"{src / 'utt2speed'}: the directory is perturbed already; start from the original one")
    for name in _FEATURE_TABLES:
        tables.pop(name, None)
    result: Tables = {name: {} for name in [*tables, "utt2speed"]}
    for speed, name in zip(speeds, names, strict=True):
        prefix = "" if float(name) == 1 else f"sp{name}-"
        copy = _renamed(tables, prefix.__add__, prefix.__add__)
        if "utt2dur" in copy:
            copy["utt2dur"] = {utt: f"{float(seconds) / speed:.6g}" for utt, seconds in copy["utt2dur"].items()}
        copy["utt2speed"] = dict.fromkeys(copy["utt2spk"], name if "." in name else f"{speed:.1f}")
        for table, values in copy.items():
            clash = result[table].keys() & values.keys() if TABLES[table].keys == "utterance" else ()
            if clash:
                raise DataError(f"{src}: utterance {min(clash)} would arise twice; the directory is perturbed already")
            result[table].update(values)
    write_data_dir(dest, result, {})
    return Written(path=dest, utterances=len(result["utt2spk"]), notes=_left_behind(src))


def _two(src: str | Path, dest: str | Path) -> tuple[Path, Path]:
    """Both as paths, refused if they are the same directory."""
    src, dest = Path(src), Path(dest)
    if src.exists() and dest.exists() and os.path.samefile(src, dest):
        raise DataError(f"{dest}: source and destination are the same directory; choose another destination")
    return src, dest


def _carried(path: Path) -> dict[str, Path]:
    return {name: path / name for name in CARRIED if (path / name).exists()}


def _left_behind(path: Path) -> tuple[str, ...]:
    known = {*TABLES, *CARRIED}
    others = sorted(entry.name for entry in path.iterdir() if entry.is_file() and entry.name not in known | {"README.md"})
    others = [name for name in others if not name.startswith(".")]
    return (f"left behind: {', '.join(others)} (not part of a data directory as speechtx knows it)",) if others else ()


def _listed(path: str | Path, known: set[str], what: str) -> set[str]:
    wanted = set(read_table(path))
    unknown = sorted(wanted - known)
    if unknown:
        raise DataError(f"{path}: {len(unknown)} of its {len(wanted)} ids are no {what}: {', '.join(unknown[:5])}")
    if not wanted:
        raise DataError(f"{path}: no ids")
    return wanted


def _choose(src: Path, tables: Tables, num: int, mode: SubsetMode) -> set[str]:
    utt2spk = tables["utt2spk"]
    utts = sorted(utt2spk)
    if not 1 <= num <= len(utts):
        raise DataError(f"{src}: cannot take {num} of {len(utts)} utterances")
    if mode == "first":
        return set(utts[:num])
    if mode == "last":
        return set(utts[-num:])
    if mode == "shortest":
        durations = _durations(tables)
        if durations is None:
            raise DataError(f"{src}: nothing tells how long utterances are (utt2num_frames, utt2dur); compute features first")
        return set(sorted(utts, key=lambda utt: (durations[utt], utt))[:num])
    if mode == "per-spk":
        by_speaker = itertools.groupby(sorted(utts, key=lambda utt: (utt2spk[utt], utt)), key=utt2spk.__getitem__)
        return {utt for _, group in by_speaker for utt in itertools.islice(group, num)}
    return {utts[index * len(utts) // num] for index in range(num)}


def _durations(tables: Tables) -> dict[str, float] | None:
    """How long each utterance is, in frames or seconds, from the first table that tells it for all."""
    utt2spk = tables["utt2spk"]
    for name in ("utt2num_frames", "utt2dur"):
        values = tables.get(name)
        if values is not None and values.keys() >= utt2spk.keys():
            return {utt: float(values[utt]) for utt in utt2spk}
    segments = tables.get("segments", {})
    if not segments.keys() >= utt2spk.keys():
        return None
    pieces = {utt: parse_segment(segments[utt]) for utt in utt2spk}
    if any(piece.end is None for piece in pieces.values()):
        return None
    return {utt: piece.end - piece.start for utt, piece in pieces.items() if piece.end is not None}


def _partition(groups: list[list[str]], weights: dict[str, float], num: int) -> list[list[str]]:
    """Cuts a sequence of groups into `num` non-empty runs; each cut is the one nearest to its share of the total."""
    ends = [0.0, *itertools.accumulate(sum(weights[utt] for utt in group) for group in groups)]
    cuts = [0]
    for part in range(1, num):
        target = ends[-1] * part / num
        cut = bisect.bisect_left(ends, target)
        if cut > 0 and target - ends[cut - 1] <= ends[min(cut, len(groups))] - target:
            cut -= 1
        cuts.append(min(max(cut, cuts[-1] + 1), len(groups) - (num - part)))
    cuts.append(len(groups))
    return [[utt for group in groups[start:end] for utt in group] for start, end in itertools.pairwise(cuts)]


def _renamed(tables: Tables, utt: Callable[[str], str], spk: Callable[[str], str]) -> Tables:
    """Tables with other utterance and speaker ids; recordings are renamed only where they are the utterances."""
    recording = utt if "segments" not in tables else str
    rename: dict[str, Callable[[str], str]] = {"utterance": utt, "speaker": spk, "recording": recording}
    renamed = {
        name: {rename[TABLES[name].keys](key): value for key, value in values.items()}
        for name, values in tables.items()
        if name != "spk2utt"
    }
    renamed["utt2spk"] = {key: spk(speaker) for key, speaker in renamed["utt2spk"].items()}
    return renamed


def _completed(path: Path, tables: Tables, *, sources: list[Path]) -> Tables:
    """Fills in what a source without `segments` or `utt2speed` means by their absence, if another source has them."""
    if "segments" not in tables and any((source / "segments").exists() for source in sources):
        tables["segments"] = {utt: f"{utt} 0 -1" for utt in tables["utt2spk"]}
    if any((source / "utt2speed").exists() for source in sources):
        tables["utt2speed"] = {**dict.fromkeys(tables["utt2spk"], "1.0"), **tables.get("utt2speed", {})}
    return tables


def _merge(combined: Tables, name: str, paths: list[Path], parts: list[Tables]) -> str | None:
    """Joins one table; answers with a note if the table had to be left out."""
    merged: dict[str, str] = {}
    owner: dict[str, Path] = {}
    if name == "spk2utt":
        return None  # derived from utt2spk when the directory is written
    for path, part in zip(paths, parts, strict=True):
        for key, value in part[name].items():
            if merged.setdefault(key, value) == value:
                owner.setdefault(key, path)
            elif name == "cmvn.scp":
                return f"cmvn.scp was left out: speaker {key} has statistics in {owner[key]} and in {path}; run `speechtx cmvn`"
            else:
                both = f"{owner[key] / name} and {path / name}"
                raise DataError(f"{TABLES[name].keys} {key} differs between {both}; rename it with copy_data_dir.sh")
    combined[name] = merged
    return None


def _common_fbank(paths: list[Path]) -> dict[str, Path]:
    """The sources' common `fbank.yaml`; features of different configurations must not meet in one directory."""
    files = [path / "fbank.yaml" for path in paths]
    present = [file for file in files if file.exists()]
    if not present:
        return {}
    if len(present) < len(files):
        lacking = next(file for file in files if not file.exists())
        raise DataError(
            f"{lacking}: missing, so nothing tells whether its features are those of {present[0]}; compute them again"
        )
    first = load_config(files[0], FbankConfig)
    for file in files[1:]:
        other = load_config(file, FbankConfig)
        if other != first:
            mine, theirs = first.model_dump(), other.model_dump()
            differing = ", ".join(f"{key} {mine[key]} / {theirs[key]}" for key in mine if mine[key] != theirs[key])
            raise DataError(
                f"features differ between {files[0]} and {file}: {differing}; compute them again with one configuration"
            )
    return {"fbank.yaml": files[0]}
