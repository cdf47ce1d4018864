"""The text of RESULTS.md out of what results.py has read."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from speechtx.config.errors import ScoringError
from speechtx.scoring.results import Decoding, ExperimentRecord

Key = tuple[str, str]
"""Test set and name of the decoding configuration."""


def render(experiments: Sequence[ExperimentRecord], *, note: str, command: str, date: str) -> str:
    """The whole page.

    Args:
        experiments: one, or several of one recipe with different seeds.
        note: a plain statement for the top, for example that the corpus is synthetic; may be empty.
        command: what generated the page.
        date: the last line's date.

    Raises:
        ScoringError: the experiments were not scored on the same references.
    """
    paths = [experiment.path.resolve() for experiment in experiments]
    if len(set(paths)) < len(paths):
        raise ScoringError(f"an experiment is given twice: {' '.join(map(str, paths))}")
    title = experiments[0].path.resolve().name if len(experiments) == 1 else f"{len(experiments)} experiments"
    parts = [f"# Results: {title}"]
    if note:
        parts.append(f"> {note}")
    parts += [
        "\n".join(score_table(experiments)),
        "\n".join(_explanations(experiments)),
        "## Sets\n\n" + "\n".join(_sets(experiments)),
    ]
    for experiment in experiments:
        parts.append(f"## Experiment {experiment.path}\n\n" + "\n".join(_facts(experiment)))
    parts.append(f"## This page\n\n```\n{command}\n```")
    return "\n\n".join(parts) + f"\n\nGenerated on {date}.\n"


def score_table(experiments: Sequence[ExperimentRecord]) -> list[str]:
    """The lines of the table of error rates: dev first, a row a decoding, and a mean where there are several experiments."""
    groups = _groups(experiments)
    extra = [unit for unit in ("cer", "ter") if any(unit in d.scores for group in groups.values() for _, d in group)]
    several = len(experiments) > 1
    header = [
        "set",
        "used for",
        "decoding",
        *(["seed"] if several else []),
        "WER %",
        "95 % interval",
        "sub",
        "del",
        "ins",
        "errors / words",
    ]
    rows = [[*header, *(f"{unit.upper()} %" for unit in extra), "RTF"]]
    for (test_set, name), group in groups.items():
        role = "test"
        if _is_dev(experiments, test_set):
            role = "choosing epochs" if _dev_chose_epochs(experiments) else "development"
        for experiment, decoding in group:
            wer = decoding.scores["wer"]
            low, high = wer.interval
            found = wer.content
            row = [
                test_set,
                role,
                name,
                *([str(experiment.run["seed"])] if several else []),
                f"{found['rate']:.2f}",
                f"{low:.2f} - {high:.2f}",
            ]
            row += [str(found["sub"]), str(found["del"]), str(found["ins"]), f"{found['errors']} / {found['reference_units']}"]
            row += [f"{decoding.scores[u].content['rate']:.2f}" if u in decoding.scores else "-" for u in extra]
            rows.append([*row, _rtf(decoding)])
        if several and len(group) > 1:
            rates = [decoding.scores["wer"].content["rate"] for _, decoding in group]
            row = [
                test_set,
                role,
                name,
                f"mean of {len(rates)}",
                f"{fmean(rates):.2f}",
                f"min {min(rates):.2f}, max {max(rates):.2f}",
            ]
            row += ["-"] * 4
            for unit in extra:
                values = [decoding.scores[unit].content["rate"] for _, decoding in group if unit in decoding.scores]
                row.append(f"{fmean(values):.2f}" if len(values) == len(group) else "-")
            rows.append([*row, "-"])
    return _aligned(rows)


def _groups(experiments: Sequence[ExperimentRecord]) -> dict[Key, list[tuple[ExperimentRecord, Decoding]]]:
    """Decodings by set and configuration; dev sets first, then the sets by name."""
    groups: dict[Key, list[tuple[ExperimentRecord, Decoding]]] = {}
    for experiment in experiments:
        for decoding in experiment.decodings:
            groups.setdefault((decoding.test_set, decoding.name), []).append((experiment, decoding))
    for group in groups.values():
        for _, decoding in group[1:]:
            group[0][1].scores["wer"].require_same_reference(decoding.scores["wer"])
    return dict(sorted(groups.items(), key=lambda item: (not _is_dev(experiments, item[0][0]), item[0])))


def _is_dev(experiments: Sequence[ExperimentRecord], test_set: str) -> bool:
    return any(experiment.dev_set == test_set for experiment in experiments)


def _dev_chose_epochs(experiments: Sequence[ExperimentRecord]) -> bool:
    return any(experiment.average["by"] != "last" for experiment in experiments)


def _rtf(decoding: Decoding) -> str:
    rtf = decoding.decode["rtf"]
    return f"{rtf:.4f}" if rtf is not None else "-"


def _aligned(rows: list[list[str]]) -> list[str]:
    """Markdown that also reads well as plain text; numbers stand at the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    right = [header.endswith("%") or header in ("sub", "del", "ins", "errors / words", "RTF") for header in rows[0]]
    lines = []
    for row in rows:
        cells = [cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True)]
        lines.append("| " + " | ".join(cells) + " |")
    rule = ["-" * (w - 1) + ":" if r else "-" * w for w, r in zip(widths, right, strict=True)]
    return [lines[0], "| " + " | ".join(rule) + " |", *lines[1:]]


def _explanations(experiments: Sequence[ExperimentRecord]) -> list[str]:
    first = experiments[0].decodings[0].scores["wer"].content
    lines = [
        f"Counted by NIST {first['sclite']}. The interval is a bootstrap over utterances (10,000 draws).",
        "CER counts the space between words as a character. RTF: time to decode (features, encoder, search) over audio time.",
    ]
    dev_sets = sorted({experiment.dev_set for experiment in experiments if experiment.dev_set})
    if dev_sets:
        names = " and ".join(dev_sets)
        use = f"The averaged epochs were chosen by their figures on {names}"
        if not _dev_chose_epochs(experiments):
            use = f"Training was watched on {names}"
        lines.append(f"{use}: its rows are not a test.")
    if any(d.scores["wer"].content["rate"] == 0 for e in experiments for d in e.decodings):
        lines.append("Without a single error the bootstrap has no width, which does not mean that the rate is known exactly.")
    if any(d.scores["wer"].content["ignore_case"] for e in experiments for d in e.decodings):
        lines.append("Case was folded on both sides before counting.")
    return lines


def _sets(experiments: Sequence[ExperimentRecord]) -> list[str]:
    lines = []
    for (test_set, _), group in _groups(experiments).items():
        found = group[0][1].scores["wer"].content
        line = f"- {test_set}: {found['utterances']} utterances, {found['reference_words']} words"
        line += f" (transcripts' SHA-256 {found['reference_sha256'][:16]})"
        if line not in lines:
            lines.append(line)
    for experiment in experiments:
        for decoding in experiment.decodings:
            lost = sorted({*decoding.decode["failed"], *decoding.scores["wer"].content["missing"]})
            if lost:
                shown = " ".join(lost[:10]) + (f" and {len(lost) - 10} more" if len(lost) > 10 else "")
                lines.append(f"- {decoding.path.name}: {len(lost)} utterances could not be decoded and count as empty: {shown}")
    return lines


def _facts(experiment: ExperimentRecord) -> list[str]:
    run, average = experiment.run, experiment.average
    epochs = [int(epoch) for epoch in average["epochs"]]
    by = "the last" if average["by"] == "last" else f"best by {average['by']}"
    lines = [
        f"- parameters: {run['num_parameters']:,}",
        f"- trained on: {run['device']}" + (f", {run['processes']} processes" if run.get("processes", 1) > 1 else ""),
        f"- training: {run['train_seconds'] / 3600:.2f} hours, {experiment.epochs} epochs, seed {run['seed']}",
        f"- weights: mean of {len(epochs)} epochs, {by}: {' '.join(map(str, epochs))}",
    ]
    for decoding in experiment.decodings:
        config = ", ".join(f"{key} {value}" for key, value in decoding.decode["config"].items())
        weights = decoding.decode.get("weights")
        other = f"; weights {weights}" if weights and not str(weights).endswith("model.pt") else ""
        lines.append(f"- {decoding.path.name}: {config}; on {decoding.decode['device']}{other}")
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    lines += [f"- code: git {run['git_hash']}; {versions}", "- commands:", "", "```"]
    if run.get("recipe_command"):
        lines.append(str(run["recipe_command"]))
    return [*lines, str(run["command"]), "```"]
