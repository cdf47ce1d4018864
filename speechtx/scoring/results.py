"""RESULTS.md: what an experiment scored, on what, how, and how to get it again. Generated, never typed.

Everything comes from the experiment directory (run.json, metrics.jsonl, average.json, decode_*/decode.json and
decode_*/score_*/score.json). The same directory gives the same page, but for the last line, its date.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from speechtx.config.errors import ScoringError
from speechtx.scoring.significance import bootstrap_interval

UNITS = ("wer", "cer", "ter")


@dataclass(frozen=True, kw_only=True)
class ScoreRecord:
    """A score.json, checked: its counts by utterance add up to its totals."""

    path: Path
    content: dict[str, Any]

    @property
    def errors(self) -> list[int]:
        """Errors of every utterance, in C order of the ids."""
        return [sub + deletions + ins for _, sub, deletions, ins in self.content["counts"].values()]

    @property
    def reference(self) -> list[int]:
        """Reference units of every utterance, in the same order."""
        return [correct + sub + deletions for correct, sub, deletions, _ in self.content["counts"].values()]

    @property
    def interval(self) -> tuple[float, float]:
        """95 % bootstrap interval of the rate, in percent."""
        return bootstrap_interval(self.errors, self.reference)

    def require_same_reference(self, other: ScoreRecord) -> None:
        """Raises ScoringError unless both were scored in one unit against one reference."""
        for key in ("unit", "reference_sha256", "ignore_case", "reference_units"):
            if self.content[key] != other.content[key]:
                raise ScoringError(
                    f"{self.path} and {other.path} cannot be compared: {key} is {self.content[key]!r} and {other.content[key]!r}"
                )


def mean_interval(scores: Sequence[ScoreRecord]) -> tuple[float, float]:
    """95 % bootstrap interval, in percent, of the mean rate of several systems on one reference."""
    errors = [sum(of_systems) for of_systems in zip(*(score.errors for score in scores), strict=True)]
    return bootstrap_interval(errors, [len(scores) * units for units in scores[0].reference])


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """One decode_* directory: its decode.json, its scores by unit, and the tune.json that chose its weights, if one did."""

    path: Path
    decode: dict[str, Any]
    scores: dict[str, ScoreRecord]
    tuned: dict[str, Any] | None = None

    @property
    def test_set(self) -> str:
        """The name of the data directory that was recognised."""
        return str(self.scores["wer"].content["set"])

    @property
    def name(self) -> str:
        """The decoding configuration's name, as the directory tells it."""
        return self.path.name.removeprefix(f"decode_{self.test_set}").removeprefix("_") or self.path.name


@dataclass(frozen=True, kw_only=True)
class ExperimentRecord:
    """What an experiment directory tells about itself."""

    path: Path
    run: dict[str, Any]
    average: dict[str, Any]
    epochs: int
    decodings: list[Decoding]

    @property
    def dev_set(self) -> str | None:
        """The name of the set that training was watched on: `--dev` of the training command."""
        return self.set_given("--dev")

    def set_given(self, option: str) -> str | None:
        """The name of the data directory that an option of the training command gives."""
        words = shlex.split(self.run["command"])
        for word, following in zip(words, [*words[1:], ""], strict=True):
            if word == option:
                return Path(following).name
            if word.startswith(f"{option}="):
                return Path(word.removeprefix(f"{option}=")).name
        return None


def read_score(directory: Path) -> ScoreRecord:
    """Reads and checks a score directory.

    Raises:
        ScoringError: score.json is missing, damaged, lacks something, or does not add up.
    """
    path = Path(directory) / "score.json"
    keys = (
        "unit",
        "set",
        "utterances",
        "reference_units",
        "reference_words",
        "reference_sha256",
        "hypothesis_sha256",
        "ignore_case",
    )
    content = _read_json(
        path, (*keys, "correct", "sub", "del", "ins", "errors", "rate", "missing", "sclite", "counts"), "speechtx score"
    )
    sums = [sum(column) for column in zip(*content["counts"].values(), strict=True)]
    if sums != [content[key] for key in ("correct", "sub", "del", "ins")] or len(content["counts"]) != content["utterances"]:
        raise ScoringError(f"{path}: its counts by utterance add up to {sums}, not to its totals; score again")
    if content["errors"] != sum(sums[1:]) or content["reference_units"] != sum(sums[:3]):
        raise ScoringError(f"{path}: errors or reference_units contradict its counts; score again")
    return ScoreRecord(path=path, content=content)


def read_experiment(exp: Path, *, current_only: bool = False) -> ExperimentRecord:
    """Reads what the results page needs from an experiment directory.

    Args:
        exp: the experiment directory.
        current_only: leaves a decoding out that was done again and not yet scored again, instead of raising.

    Raises:
        ScoringError: a file is missing, damaged or lacks something (which file and what), or a score is older than its text.
    """
    exp = Path(exp)
    wanted = ("command", "git_hash", "versions", "device", "num_parameters", "seed", "train_seconds")
    run = _read_json(exp / "run.json", wanted, "speechtx train (has it finished?)")
    average = _read_json(exp / "average.json", ("by", "epochs"), "speechtx average")
    metrics = exp / "metrics.jsonl"
    if not metrics.is_file():
        raise ScoringError(f"{metrics}: no such file; it comes from `speechtx train`")
    scored = [path for path in sorted(exp.glob("decode_*")) if any(path.glob("score_*/score.json"))]
    stale = [path for path in scored if current_only and stale_scores(path)]
    decodings = [_read_decoding(path) for path in scored if path not in stale]
    if not decodings:
        raise ScoringError(f"{exp}: nothing scored yet: no decode_*/score_*/score.json; run `speechtx score` first")
    epochs = len(metrics.read_text(encoding="utf-8").splitlines())
    return ExperimentRecord(path=exp, run=run, average=average, epochs=epochs, decodings=decodings)


def _read_decoding(path: Path) -> Decoding:
    decode = _read_json(path / "decode.json", ("config", "num_utts", "failed", "rtf", "device"), "speechtx decode --merge")
    scores = {unit: read_score(path / f"score_{unit}") for unit in UNITS if (path / f"score_{unit}" / "score.json").is_file()}
    if "wer" not in scores:
        raise ScoringError(f"{path}/score_wer/score.json: no such file; score it with `speechtx score --unit wer`")
    for unit, record in scores.items():
        if record.content["unit"] != unit:
            raise ScoringError(f"{record.path}: holds {record.content['unit']}, not {unit}")
    if stale := stale_scores(path):
        raise ScoringError(f"{stale[0]}: was not made from {path}/text as it is now; score again")
    decoding = Decoding(path=path, decode=decode, scores=scores)
    return replace(decoding, tuned=_read_tuned(decoding))


def _read_tuned(decoding: Decoding) -> dict[str, Any] | None:
    """What chose the decoding's weights: a tune_SET_NAME/tune.json beside it whose choice is what it was decoded with."""
    for path in sorted(decoding.path.parent.glob(f"tune_*_{decoding.name}/tune.json")):
        found = _read_json(path, ("set", "unit", "grid", "chosen", "config", "points"), "speechtx tune")
        if found["config"] == decoding.decode["config"]:
            return found
    return None


def stale_scores(path: Path) -> list[Path]:
    """The score.json files of a decode_* directory that were made from another text than the one it holds now."""
    text = path / "text"
    digest = hashlib.sha256(text.read_bytes()).hexdigest() if text.is_file() else None
    records = [read_score(score.parent) for score in sorted(path.glob("score_*/score.json"))]
    return [record.path for record in records if record.content["hypothesis_sha256"] != digest]


def _read_json(path: Path, keys: Sequence[str], made_by: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ScoringError(f"{path}: no such file; it comes from `{made_by}`") from None
    except (OSError, ValueError) as err:
        raise ScoringError(f"{path}: cannot be read as JSON: {err}") from None
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing:
        raise ScoringError(f"{path}: lacks {', '.join(missing)}; it comes from `{made_by}`")
    return dict(content)
