"""What recognises: one trained model or an ensemble, with features, tokenizer and language models; found, told apart, opened."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, cast

import numpy as np

from speechtx.config.decode import DecodeConfig
from speechtx.config.errors import ConfigError, ExperimentError
from speechtx.config.load import config_hash
from speechtx.data.manifest import require_same_features
from speechtx.experiment.experiment import Experiment
from speechtx.model.ensemble import Ensemble
from speechtx.model.recognizer import Recognizer
from speechtx.search.beam import check_weights
from speechtx.search.decode import check_method
from speechtx.search.phones import Pronouncer
from speechtx.search.scorers import Scorers, load_scorers

log = logging.getLogger(__name__)

_REPORTS = (".json", ".jsonl", ".log")  # of a language model's directory: what is told about it, not what it is


@dataclass(frozen=True)
class FileId:
    """A file or folder that a result depends on; two are equal if their contents are, wherever they lie."""

    path: str = field(compare=False)
    sha256: str


@dataclass(frozen=True)
class SystemId:
    """What two results must have in common to come from the same system."""

    members: tuple[FileId, ...]  # weights
    experiments_sha256: str  # of what the members' experiments hold beside weights, see `experiments_digest`
    lm: FileId | None
    ngram: FileId | None

    @staticmethod
    def from_json(fields: dict[str, Any]) -> SystemId:
        """The inverse of `dataclasses.asdict`."""
        lm, ngram = (FileId(**fields[name]) if fields[name] else None for name in ("lm", "ngram"))
        return SystemId(tuple(FileId(**member) for member in fields["members"]), fields["experiments_sha256"], lm, ngram)


@dataclass(frozen=True)
class System:
    """Where the parts of a system lie.

    Attributes:
        exps: one experiment for each member; features, CMVN and tokenizer are those of the first, and equal in all.
        weights: one file of weights for each member.
        lm: a language model's directory or file, weighed by `lm_weight`.
        ngram: another, weighed by `ngram_weight`.
    """

    exps: tuple[Experiment, ...]
    weights: tuple[Path, ...]
    lm: Path | None = None
    ngram: Path | None = None

    @staticmethod
    def find(
        exps: Sequence[str | Path],
        *,
        weights: Sequence[str | Path] = (),
        lm: str | Path | None = None,
        ngram: str | Path | None = None,
    ) -> System:
        """Pairs experiments with weights: one experiment with several weights, or several each with its own (or model.pt).

        Raises:
            ExperimentError: a directory is no experiment, or two do not fit together; both are named.
            ConfigError: numbers of experiments and weights that cannot be paired.
        """
        if not exps:
            raise ConfigError("--exp: no experiment directory was given")
        if len(exps) > 1 and weights and len(weights) != len(exps):
            raise ConfigError(
                f"{len(exps)} experiments but {len(weights)} files of weights; give one for each experiment, or none"
            )
        opened = [Experiment.open(path) for path in exps]
        if len(opened) == 1:
            opened *= max(1, len(weights))
        files = tuple(
            Path(file) if file is not None else exp.path / "model.pt"
            for exp, file in zip_longest(opened, weights, fillvalue=None)
            if exp is not None
        )
        for other in opened[1:]:
            if other is not opened[0]:
                require_same_input(opened[0], other)
        return System(tuple(opened), files, None if lm is None else Path(lm), None if ngram is None else Path(ngram))

    @property
    def exp(self) -> Experiment:
        """Whose features and tokenizer are used."""
        return self.exps[0]

    def identify(self, configs: Sequence[DecodeConfig]) -> list[SystemId]:
        """For each configuration, digests of the experiments, all weights and those language models that it gives a weight.

        Raises:
            ExperimentError: a file is not there.
        """
        members, experiments = tuple(map(file_id, self.weights)), experiments_digest(self.exps)
        lm = file_id(self.lm) if self.lm is not None and any(config.lm_weight for config in configs) else None
        ngram = file_id(self.ngram) if self.ngram is not None and any(config.ngram_weight for config in configs) else None
        return [
            SystemId(members, experiments, lm if config.lm_weight else None, ngram if config.ngram_weight else None)
            for config in configs
        ]

    def load_model(self, device: str) -> Recognizer:
        """The model, or the ensemble, which looks like one to a search.

        Raises:
            ExperimentError: see `Experiment.load_model`.
            ConfigError: members that do not fit together.
        """
        models = [exp.load_model(file, device) for exp, file in zip(self.exps, self.weights, strict=True)]
        return models[0] if len(models) == 1 else cast(Recognizer, Ensemble(models).eval())

    def load_scorers(self, configs: Sequence[DecodeConfig], device: str) -> list[Scorers]:
        """What each of `configs` gives a weight; a language model that several of them use is opened once.

        One that was given and that none of them weighs is not opened, and a warning says so.

        Raises:
            ConfigError, ExperimentError, DataError: see `scorers.load_scorers`.
        """
        tokenizer = self.exp.tokenizer
        shared = Scorers()
        for name in ("lm", "ngram"):
            wanting = next((c for c in configs if getattr(c, f"{name}_weight")), None)
            if wanting is not None:
                only = DecodeConfig(**{f"{name}_weight": getattr(wanting, f"{name}_weight")})
                opened = load_scorers(only, tokenizer=tokenizer, lm=self.lm, ngram=self.ngram, device=device)
                shared = replace(shared, **{name: getattr(opened, name)})
            elif (given := getattr(self, name)) is not None:
                log.warning("%s is not used: %s_weight is 0", given, name)
        found = []
        for config in configs:
            without = config.model_copy(update={"lm_weight": 0.0, "ngram_weight": 0.0})
            others = load_scorers(without, tokenizer=tokenizer, device=device)
            phones = self.exp.phones if config.phone_weight else None
            pronounce = Pronouncer(tokenizer, phones) if phones is not None else None
            found.append(replace(others, lm=shared.lm, ngram=shared.ngram, pronounce=pronounce))
        return found

    def load(self, configs: Sequence[DecodeConfig], device: str) -> tuple[Recognizer, list[Scorers]]:
        """Model and scorers, refusing a search that they cannot do.

        Raises:
            ConfigError, ExperimentError, DataError: see `load_model`, `load_scorers` and `check_search`.
        """
        model = self.load_model(device)
        for config in configs:
            check_search(model, config)
        if len({exp.path for exp in self.exps}) > 1:
            for method in sorted({config.method for config in configs} - {"beam"}):
                log.warning(
                    "method %s reads the mean of the models' CTC outputs frame by frame, but models that were trained apart see "
                    "tokens in different frames: expect deletions%s",
                    method,
                    "" if method == "mask_ctc" else "; method beam does better, with ctc_weight 1.0 by CTC alone",
                )
        return model, self.load_scorers(configs, device)


def check_search(model: Recognizer, config: DecodeConfig) -> None:
    """Refuses a search that this model cannot do.

    Raises:
        ConfigError: see `decode.check_method` and `beam.check_weights`.
    """
    check_method(model, config)
    check_weights(model, config)


def require_same_input(first: Experiment, other: Experiment) -> None:
    """Two members of an ensemble must hear and write the same.

    Raises:
        ExperimentError: their tokens or statistics differ.
        DataError: their features were computed differently.
    """
    names = f"{first.path} and {other.path}"
    if first.tokenizer.pieces != other.tokenizer.pieces:
        ours, theirs = first.tokenizer.pieces, other.tokenizer.pieces
        raise ExperimentError(
            f"{names} cannot decode together: their tokenizers have {len(ours)} and {len(theirs)} tokens"
            + (", and not the same" if len(ours) == len(theirs) else "")
        )
    require_same_features(first.fbank, first.path, other.fbank, other.path)
    a, b = first.config.features, other.config.features
    if a != b:
        raise ExperimentError(f"{names} cannot decode together: features are normalised differently ({a} and {b})")
    factors = [e.config.model.encoder.subsampling.factor for e in (first, other)]
    if factors[0] != factors[1]:
        raise ExperimentError(f"{names} cannot decode together: subsampling takes {factors[0]} and {factors[1]} frames for one")
    if a.cmvn == "global":
        assert first.global_cmvn is not None and other.global_cmvn is not None
        if not np.array_equal(first.global_cmvn.to_matrix(), other.global_cmvn.to_matrix()):
            raise ExperimentError(f"{names} cannot decode together: their global_cmvn.ark differ")


def experiments_digest(exps: Sequence[Experiment]) -> str:
    """The digest of what experiments say of their models and features beside the weights: configuration, tokens, statistics.

    Two penalties, for example, can share one file of weights. Features themselves are compared with the data's elsewhere.
    """
    found = []
    for exp in exps:
        found += [config_hash(exp.config.model), config_hash(exp.config.features), *exp.tokenizer.pieces]
        if exp.global_cmvn is not None:
            found.append(hashlib.sha256(exp.global_cmvn.to_matrix().tobytes()).hexdigest())
    return hashlib.sha256("\n".join(found).encode()).hexdigest()


def file_id(path: Path) -> FileId:
    """The digest of a file, or of the files of a language model's directory but for its reports and checkpoints.

    Raises:
        ExperimentError: there is nothing.
    """
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.is_file() and f.suffix not in _REPORTS and not f.name.startswith("."))
        digest = hashlib.sha256("".join(f"{f.name} {sha256(f)}\n" for f in files).encode())
        return FileId(str(path), digest.hexdigest())
    if not path.is_file():
        raise ExperimentError(f"{path}: no such file")
    return FileId(str(path), sha256(path))


def sha256(path: Path) -> str:
    """The SHA-256 (hex) of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
