"""What a change of the configuration gave: experiments grouped by configuration, each group against the first one.

Experiments that differ in nothing but their seed are one group. Its error rate is the mean over seeds, and its difference from
the first group is taken over the seeds that both have, so that a lucky seed is not mistaken for a good idea.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from speechtx.config.errors import ScoringError
from speechtx.config.load import load_config
from speechtx.config.schema import FbankConfig, TrainConfig
from speechtx.scoring.results import ExperimentRecord, ScoreRecord, read_experiment
from speechtx.scoring.significance import Comparison, paired_bootstrap


@dataclass(frozen=True, kw_only=True)
class Group:
    """Experiments of one configuration with different seeds.

    Attributes:
        settings: every value of the configuration and of the features under its full key, and the training set.
        experiments: by seed.
    """

    settings: Mapping[str, Any]
    experiments: Mapping[int, ExperimentRecord]

    def changes(self, base: Group) -> dict[str, Any]:
        """What is set otherwise than in `base`, under full keys."""
        nothing = object()
        return {key: value for key, value in self.settings.items() if base.settings.get(key, nothing) != value}

    def scores(self, test_set: str, decoding: str) -> dict[int, ScoreRecord]:
        """The word error rates of one decoding of one set, by seed."""
        found = {}
        for seed, experiment in self.experiments.items():
            for done in experiment.decodings:
                if (done.test_set, done.name) == (test_set, decoding):
                    found[seed] = done.scores["wer"]
        return found


def read_groups(exps: Sequence[Path]) -> list[Group]:
    """Reads experiments and groups them; groups stand in the order in which their first experiments are given.

    Raises:
        ScoringError: an experiment cannot be read or has no scores, or two differ in nothing at all.
        ConfigError: its config.yaml or fbank.yaml is damaged.
    """
    settings: dict[str, Mapping[str, Any]] = {}
    members: dict[str, dict[int, ExperimentRecord]] = {}
    for path in exps:
        experiment = read_experiment(path)
        found = settings_of(experiment)
        identity = json.dumps(found, sort_keys=True)
        group, seed = members.setdefault(identity, {}), int(experiment.run["seed"])
        settings[identity] = found
        if seed in group:
            raise ScoringError(f"{group[seed].path} and {path} have the same configuration and the same seed {seed}: omit one")
        group[seed] = experiment
    return [Group(settings=settings[identity], experiments=group) for identity, group in members.items()]


def settings_of(experiment: ExperimentRecord) -> dict[str, Any]:
    """Every value that the experiment was made with, but for its seed, under its full key."""
    config = load_config(experiment.path / "config.yaml", TrainConfig).model_dump(mode="json")
    found = _leaves({key: value for key, value in config.items() if key != "seed"})
    fbank = load_config(experiment.path / "fbank.yaml", FbankConfig).model_dump(mode="json")
    return {**found, **_leaves(fbank, "fbank."), "training set": experiment.set_given("--train")}


def _leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            leaves.update(_leaves(value, f"{prefix}{key}."))
        else:
            leaves[prefix + key] = value
    return leaves


def compare_means(scores: Mapping[int, ScoreRecord], base: Mapping[int, ScoreRecord]) -> Comparison | None:
    """The mean rate over the seeds that both have, minus that of the base; None where they have none in common.

    Raises:
        ScoringError: they were scored against different references.
    """
    seeds = sorted(scores.keys() & base.keys())
    if not seeds:
        return None
    for seed in seeds:
        scores[seed].require_same_reference(base[seed])
        scores[seed].require_same_reference(scores[seeds[0]])
    ours, theirs = (np.sum([of[seed].errors for seed in seeds], axis=0) for of in (scores, base))
    return paired_bootstrap(ours, theirs, len(seeds) * np.asarray(base[seeds[0]].reference))


def comparison_rows(groups: Sequence[Group], test_set: str, decodings: Sequence[str]) -> list[list[str]]:
    """A header and a row a group: what changed, seeds, parameters, hours of training, and two cells a decoding."""
    header = ["change", "seeds", "parameters", "hours"]
    rows = [[*header, *(cell for name in decodings for cell in (f"{name} WER %", "against the first"))]]
    for number, group in enumerate(groups):
        runs = [experiment.run for experiment in group.experiments.values()]
        row = [
            describe_changes(group.changes(groups[0])) if number else "(the first)",
            " ".join(map(str, sorted(group.experiments))),
            f"{runs[0]['num_parameters']:,}",
            f"{fmean(run['train_seconds'] for run in runs) / 3600:.2f}",
        ]
        for name in decodings:
            scores = group.scores(test_set, name)
            row.append(f"{fmean(score.content['rate'] for score in scores.values()):.2f}" if scores else "-")
            against = compare_means(scores, groups[0].scores(test_set, name)) if number else None
            row.append(f"{against.difference:+.2f} ({against.low:+.2f} to {against.high:+.2f})" if against else "")
        rows.append(row)
    return rows


def describe_changes(changes: Mapping[str, Any]) -> str:
    """`training.epochs 30, model.ctc_weight 0.3`."""
    return ", ".join(f"{key} {json.dumps(value) if not isinstance(value, str) else value}" for key, value in changes.items())


def compared_set(groups: Sequence[Group], wanted: str | None) -> str:
    """The set to compare on: the one that is wanted, or that all trainings were watched on.

    Raises:
        ScoringError: nothing was scored on it, or the trainings were watched on different sets.
    """
    experiments = [experiment for group in groups for experiment in group.experiments.values()]
    dev_sets = sorted({str(experiment.dev_set) for experiment in experiments})
    if wanted is None and len(dev_sets) > 1:
        raise ScoringError(f"the trainings were watched on different sets, {' '.join(dev_sets)}: choose one with --set")
    chosen = wanted or dev_sets[0]
    scored = sorted({decoding.test_set for experiment in experiments for decoding in experiment.decodings})
    if chosen not in scored:
        raise ScoringError(f"no experiment was scored on {chosen}; scored were {' '.join(scored)}")
    return chosen


def compared_decodings(groups: Sequence[Group], test_set: str, wanted: Sequence[str]) -> list[str]:
    """The decodings to compare: those that are wanted, or all that the first group has.

    Raises:
        ScoringError: one that no experiment has, or the first group has none.
    """
    there = [
        [done.name for experiment in group.experiments.values() for done in experiment.decodings if done.test_set == test_set]
        for group in groups
    ]
    known = sorted({name for names in there for name in names})
    for name in wanted:
        if name not in known:
            raise ScoringError(f"no decoding of {test_set} is called {name}; there are {' '.join(known)}")
    chosen = list(wanted) or list(dict.fromkeys(there[0]))
    if not chosen:
        raise ScoringError(f"{next(iter(groups[0].experiments.values())).path}: nothing scored on {test_set}")
    return chosen


def render(groups: Sequence[Group], lines: Sequence[str], *, test_set: str, command: str) -> str:
    """The page: the table, how to read it, and the experiments."""
    facts = []
    for group in groups:
        for seed, experiment in sorted(group.experiments.items()):
            run = experiment.run
            facts.append(f"- {experiment.path}: seed {seed}, {experiment.epochs} epochs, git {run['git_hash']}, {run['device']}")
    parts = [
        f"# What each change gave, on {test_set}",
        "\n".join(lines),
        "WER is the mean over the seeds. A difference is percent absolute over the seeds that both have, negative where the\n"
        "change is better, with its 95 % interval: a bootstrap over utterances (10,000 draws), the same ones for both, which\n"
        "tells nothing of other seeds. Weights that `speechtx tune` chose were chosen for each experiment by itself.",
        "## Experiments\n\n" + "\n".join(facts),
        f"## This page\n\n```\n{command}\n```\n",
    ]
    return "\n\n".join(parts)
