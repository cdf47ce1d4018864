"""The text of RESULTS.md out of what results.py has read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath
from statistics import fmean
from typing import Any

from speechtx.config.decode import DecodeConfig
from speechtx.config.errors import ScoringError
from speechtx.scoring.results import Decoding, ExperimentRecord, mean_interval

Key = tuple[str, str]
"""Test set and name of the decoding configuration."""

RIGHT = ("sub", "del", "ins", "errors / words", "RTF", "parameters", "hours")
"""Headers of columns of numbers, beside those that end with a percent sign."""


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
        role = _role(experiments, test_set, [decoding for _, decoding in group])
        for experiment, decoding in group:
            wer = decoding.scores["wer"]
            low, high = wer.interval
            found = wer.content
            row = [
                test_set,
                role,
                f"{name}: {describe_search(decoding.decode)}",
                *([str(experiment.run["seed"])] if several else []),
                f"{found['rate']:.2f}",
                f"{low:.2f} - {high:.2f}",
            ]
            row += [str(found["sub"]), str(found["del"]), str(found["ins"]), f"{found['errors']} / {found['reference_units']}"]
            row += [f"{decoding.scores[u].content['rate']:.2f}" if u in decoding.scores else "-" for u in extra]
            rows.append([*row, _rtf(decoding)])
        if len(group) > 1:
            rows.append([test_set, role, name, *_mean_cells([decoding for _, decoding in group], extra)])
    return aligned(rows)


def _mean_cells(decodings: Sequence[Decoding], extra: Sequence[str]) -> list[str]:
    """The cells of a row that stands for several seeds, from the column of seeds on."""
    scores = [decoding.scores["wer"] for decoding in decodings]
    rates = [score.content["rate"] for score in scores]
    low, high = mean_interval(scores)
    cells = [
        f"mean of {len(rates)}, min {min(rates):.2f}, max {max(rates):.2f}",
        f"{fmean(rates):.2f}",
        f"{low:.2f} - {high:.2f}",
        *(f"{fmean(score.content[kind] for score in scores):.1f}" for kind in ("sub", "del", "ins")),
        f"{fmean(score.content['errors'] for score in scores):.1f} / {scores[0].content['reference_units']}",
    ]
    for unit in extra:
        values = [decoding.scores[unit].content["rate"] for decoding in decodings if unit in decoding.scores]
        cells.append(f"{fmean(values):.2f}" if len(values) == len(decodings) else "-")
    return [*cells, "-"]


def describe_search(decode: dict[str, Any]) -> str:
    """What scored the hypotheses, in a few words: `beam 10, CTC 0.7, LM transformer 0.2, n-gram 0.1`."""
    config = {key: field.default for key, field in DecodeConfig.model_fields.items()} | decode["config"]
    method, weight = config["method"], config["ctc_weight"]
    words = [{"ctc_greedy": "CTC greedy", "mask_ctc": "Mask-CTC"}.get(method, f"{method.replace('_', ' ')} {config['beam']}")]
    if method == "ctc_beam":
        words = [f"CTC beam {config['beam']}"]
    elif method == "attention_rescoring" or (method == "beam" and 0 < weight < 1):
        words.append(f"CTC {weight:g}")
    elif method == "beam":
        words.append("CTC only" if weight else "attention only")
    for key, name in (("lm", "LM"), ("ngram", "n-gram")):
        if config[f"{key}_weight"]:
            which = PurePath((decode.get(key) or {}).get("path", "")).name
            which = "" if which == key else which  # "n-gram ngram" says nothing
            words.append(" ".join(filter(None, (name, which, f"{config[f'{key}_weight']:g}"))))
    if config["phone_weight"]:
        words.append(f"phones {config['phone_weight']:g}")
    if config["length_bonus"]:
        words.append(f"length bonus {config['length_bonus']:g}")
    if config["hot_words"]:
        words.append(f"{len(config['hot_words'])} hot words")
    members = len(decode.get("members", ()))
    return ", ".join(words) + (f", {members} models" if members > 1 else "")


def _role(experiments: Sequence[ExperimentRecord], test_set: str, decodings: Sequence[Decoding]) -> str:
    """What a set was used for beside being recognised; whatever chose something on it makes it no test."""
    dev = _is_dev(experiments, test_set)
    chosen = ["epochs"] if dev and _dev_chose_epochs(experiments) else []
    chosen += ["weights"] if any(_chose_weights(decoding) for decoding in decodings) else []
    return f"choosing {' and '.join(chosen)}" if chosen else "development" if dev else "test"


def _chose_weights(decoding: Decoding) -> bool:
    return decoding.tuned is not None and decoding.tuned["set"] == decoding.test_set


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


def aligned(rows: list[list[str]]) -> list[str]:
    """Markdown that also reads well as plain text; numbers stand at the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    right = [header.endswith("%") or header in RIGHT for header in rows[0]]
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
    if len(experiments) > 1:
        lines.append("That of a mean draws the same utterances for every seed: it tells nothing of other seeds, min and max do.")
    dev_sets = sorted({experiment.dev_set for experiment in experiments if experiment.dev_set})
    if dev_sets:
        names = " and ".join(dev_sets)
        use = f"The averaged epochs were chosen by their figures on {names}"
        if not _dev_chose_epochs(experiments):
            use = f"Training was watched on {names}"
        lines.append(f"{use}: its rows are not a test.")
    tuned = {(decoding.name, decoding.tuned["set"]) for e in experiments for decoding in e.decodings if decoding.tuned}
    for chosen_on in sorted({test_set for _, test_set in tuned}):
        names = ", ".join(sorted(name for name, test_set in tuned if test_set == chosen_on))
        lines.append(f"The decoding weights of {names} were chosen on {chosen_on} by `speechtx tune`: its rows are not a test.")
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
        f"- trained on: {run['device']}" + (f" in each of {run['processes']} processes" if run.get("processes", 1) > 1 else ""),
        f"- training: {run['train_seconds'] / 3600:.2f} hours, {experiment.epochs} epochs, seed {run['seed']}",
        *(f"- training was interrupted, and continued {how}" for how in run.get("continued", [])),
        f"- weights: mean of {len(epochs)} epochs, {by}: {' '.join(map(str, epochs))}",
    ]
    for decoding in experiment.decodings:
        lines += _decoding_facts(decoding)
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    lines += [f"- code: git {run['git_hash']}; {versions}", "- commands:", "", "```"]
    if run.get("recipe_command"):
        lines.append(str(run["recipe_command"]))
    return [*lines, str(run["command"]), "```"]


def _decoding_facts(decoding: Decoding) -> list[str]:
    """Configuration (what is not at its default), models other than model.pt, and what chose the weights."""
    decode = decoding.decode
    defaults = {key: field.default for key, field in DecodeConfig.model_fields.items() if key not in ("method", "beam")}
    shown = {key: value for key, value in decode["config"].items() if key not in defaults or value not in (defaults[key], [])}
    lines = [f"- {decoding.path.name}: {', '.join(f'{key} {value}' for key, value in shown.items())}; on {decode['device']}"]
    members = decode.get("members", [])
    for member in members:
        if len(members) > 1 or PurePath(member["path"]).name != "model.pt":
            lines.append(f"  - weights {member['path']} (SHA-256 {member['sha256'][:16]})")
    for key in ("lm", "ngram"):
        if decode.get(key):
            lines.append(f"  - {key}: {decode[key]['path']} (SHA-256 {decode[key]['sha256'][:16]})")
    if decoding.tuned is not None:
        tuned = decoding.tuned
        chosen = ", ".join(f"{key} {value} among {tuned['grid'][key]}" for key, value in tuned["chosen"].items())
        lines.append(
            f"  - chosen on {tuned['set']} by {tuned['unit'].upper()} of {len(tuned['points'])} configurations: {chosen}"
        )
    return lines
