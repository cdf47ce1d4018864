"""What all tables of the decoding benchmark share: models, workers, and cells of a table."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.decode_case import Case, random_case
from benchmarks.decode_workers import OURS, PEER, Times, Worker, quartiles, ratios
from benchmarks.side_by_side import Report
from speechtx.text.arpa import write_arpa
from speechtx.text.kneser_ney import estimate_ngram

JOINT: dict[str, object] = {"beam": 10, "ctc_weight": 0.3}
SPREAD = "In brackets: first and third quartile of the rounds."
COMPARED = ["ours", "ESPnet2", "times faster", "goal"]
HOW = (
    "`one by one`: both decode utterance after utterance. `batches`: ours decodes all utterances of the set as `speechtx decode` "
    "does, in batches of similar length and at most 8,000 frames, ESPnet2 still one by one, for it has no such search."
)
Lengths = list[tuple[int, int]]  # frames and tokens of utterances


@dataclass
class Bench:
    """What to measure, how often, and where to write.

    Attributes:
        report: takes the tables.
        folder: for the workers' files.
        rounds: measured turns.
        utts: how many utterances a turn decodes, where not all are.
        shapes: of models with random weights.
        lengths: of their utterances.
        exp: a trained experiment, or None.
        data: its test set.
        trained: its model and utterances.
        espnet: the Python that has ESPnet2, or None.
        beams: of the table of growth.
        seconds: of audio, there.
    """

    report: Report
    folder: Path
    rounds: int
    utts: int
    shapes: tuple[str, ...]
    lengths: Lengths
    exp: Path | None
    data: Path | None
    trained: Case | None
    espnet: str | None
    beams: tuple[int, ...]
    seconds: tuple[int, ...]
    versions: dict[str, str] = field(default_factory=dict)
    _saved: dict[str, Path] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Of the cases: shapes with random weights, and `trained` if there is one."""
        return [*self.shapes, *(["trained"] if self.trained is not None else [])]

    def case(self, name: str) -> tuple[Case, Path]:
        """A model of this shape with random weights, or the trained one, and the file that workers read."""
        case = self.trained if name == "trained" else random_case(name, self.lengths)
        assert case is not None, "no trained model"
        return case, self.save(name, case)

    def save(self, name: str, case: Case) -> Path:
        if name not in self._saved:
            if case.ngram is None:
                case.ngram = str(_made_up_ngram(case.pieces, self.folder / f"{name}.arpa"))
            self._saved[name] = case.save(self.folder / f"{name}.pt")
        return self._saved[name]

    def workers(self, stack: ExitStack, path: Path, *, peer: bool = True) -> dict[str, Worker]:
        """Ours, and ESPnet2 where there is one, with one thread each."""
        found = {"ours": stack.enter_context(Worker(module=OURS, case=path))}
        if self.espnet is not None and peer:
            found["ESPnet2"] = stack.enter_context(Worker(module=PEER, case=path, python=self.espnet))
        self.versions.update((name, worker.versions) for name, worker in found.items())
        return found


def milliseconds(worker: Worker, units: int, **request: object) -> Callable[[], float]:
    """Asks for a search; the answer is milliseconds for each of `units`."""
    return lambda: 1000 * float(worker.ask("search", **request)["seconds"]) / units


def milliseconds_a_step(worker: Worker, **request: object) -> Callable[[], float]:
    """Asks for a search; the answer is milliseconds for each step of each utterance, of which the last one ends it."""

    def ask() -> float:
        answer = worker.ask("search", **request)
        return 1000 * float(answer["seconds"]) / sum(len(tokens) + 1 for tokens in answer["tokens"])

    return ask


def compared(times: dict[str, Times], goal: str, ours: str = "ours") -> list[str]:
    """Ours, ESPnet2's, how many times faster, and the goal."""
    if "ESPnet2" not in times:
        return [str(times[ours]), "not measured", "-", goal]
    return [str(times[ours]), str(times["ESPnet2"]), quartiles(ratios(times["ESPnet2"], times[ours])), goal]


def _made_up_ngram(pieces: list[str], path: Path) -> Path:
    """A 3-gram of sentences drawn at random."""
    draw = random.Random(0)
    inner = range(2, len(pieces) - 1)
    weights = [1 / (i + 1) for i in range(len(inner))]
    sentences = [draw.choices(inner, weights=weights, k=20) for _ in range(1000)]
    write_arpa(estimate_ngram(sentences, pieces=pieces, order=3).arpa, path)
    return path
