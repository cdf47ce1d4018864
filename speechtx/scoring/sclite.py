"""Error rates counted by NIST sclite. The one module that runs it, reads its files and checks that they agree.

sclite aligns with costs 4, 3 and 3 for a substitution, a deletion and an insertion (NIST SCTK, doc/sclite.htm), so its
total can exceed the plain edit distance now and then. What is counted (words, characters, pieces) is the caller's choice.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speechtx.config.atomic import write_text
from speechtx.config.errors import ScoringError
from speechtx.scoring.readable import decode_confusions, render_alignments
from speechtx.scoring.trn import TokenTable, id_table, speaker_table, trn_id, write_trn

Alignment = list[tuple[str, str | None, str | None]]
"""Steps (C, S, D or I; reference word; hypothesis word) of one utterance; None where a side has no word."""

_ENV = "SPEECHTX_SCLITE"
_SHOWN_IDS = 10


@dataclass(frozen=True, kw_only=True)
class Sclite:
    """A verified NIST sclite: where it is, and the version it tells."""

    path: Path
    version: str


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Correct units, substitutions, deletions and insertions of one utterance or of a whole set."""

    correct: int
    substitutions: int
    deletions: int
    insertions: int

    @property
    def reference(self) -> int:
        """Units in the reference."""
        return self.correct + self.substitutions + self.deletions

    @property
    def errors(self) -> int:
        """Substitutions, deletions and insertions."""
        return self.substitutions + self.deletions + self.insertions

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            correct=self.correct + other.correct,
            substitutions=self.substitutions + other.substitutions,
            deletions=self.deletions + other.deletions,
            insertions=self.insertions + other.insertions,
        )


@dataclass(frozen=True, kw_only=True)
class Score:
    """What sclite counted.

    Attributes:
        total: over all utterances.
        utterances: by utterance id, in C order.
        missing: utterances without a hypothesis, counted as deleted.
        sclite: the version that counted.
    """

    total: Counts
    utterances: dict[str, Counts]
    missing: list[str]
    sclite: str

    @property
    def rate(self) -> float:
        """Errors in percent of the reference."""
        return 100.0 * self.total.errors / self.total.reference


def find_sclite() -> Sclite:
    """Finds NIST's sclite: $SPEECHTX_SCLITE, PATH, tools/sctk/bin of this checkout, then Debian's /usr/lib/sctk/bin.

    Raises:
        ScoringError: none of them is there, or what $SPEECHTX_SCLITE names is not NIST's sclite.
    """
    named = os.environ.get(_ENV)
    on_path = shutil.which("sclite")
    checkout = Path(__file__).resolve().parents[2] / "tools" / "sctk" / "bin" / "sclite"
    candidates = [named] if named else [on_path, str(checkout), "/usr/lib/sctk/bin/sclite"]
    rejected = []
    for candidate in candidates:
        if candidate is None:
            continue
        path = Path(candidate)
        if not (path.is_file() and os.access(path, os.X_OK)):
            rejected.append(f"{path}: not there or not executable")
        elif version := _version(path):
            return Sclite(path=path.absolute(), version=version)
        else:
            rejected.append(f"{path}: does not answer as NIST's sclite (a package of the same name?)")
    raise ScoringError(
        f"NIST sclite was not found (looked at ${_ENV}, PATH, tools/sctk/bin, /usr/lib/sctk/bin):\n  "
        + "\n  ".join(rejected)
        + "\ninstall it with tools/install_sctk.sh or Debian's package sctk"
    )


def _version(path: Path) -> str | None:
    """NIST's sclite called without arguments tells its version and its usage; nothing else answers like this."""
    try:
        answer = subprocess.run(
            [str(path)], capture_output=True, text=True, errors="replace", timeout=20, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"sclite Version: (\S+), SCTK Version: (\S+)", answer.stdout + answer.stderr)
    return f"sclite {match[1]} (SCTK {match[2]})" if match else None


def score(
    *,
    refs: Mapping[str, Sequence[str]],
    hyps: Mapping[str, Sequence[str]],
    out_dir: Path,
    speakers: Mapping[str, str] | None = None,
    allow_missing: bool = False,
) -> Score:
    """Scores hypotheses against references, both split into units and keyed by utterance id.

    Writes `ref.trn`, `hyp.trn` (tokens as in trn.py), sclite's `result.sys` and `result.sgml` as they are, and its
    `result.pra` and `result.dtl` with the words spelled as in the transcripts. All of them appear, or none.

    Args:
        refs: reference units of every utterance.
        hyps: recognised units of every utterance.
        out_dir: where the files go.
        speakers: utterance id to speaker, for sclite's table by speaker; without it, all are one.
        allow_missing: an utterance without a hypothesis counts as deleted instead of being an error.

    Raises:
        ScoringError: ids that do not join, an empty reference set, sclite missing, failing or contradicting itself.
    """
    missing = join(refs, hyps, allow_missing=allow_missing)
    if not any(refs.values()):
        raise ScoringError("the references hold nothing to recognise, so there is no error rate")
    sclite = find_sclite()
    words, ids, people = TokenTable(), id_table(), speaker_table()
    identities = {utt: trn_id(people.token((speakers or {}).get(utt, "all")), ids.token(utt)) for utt in sorted(refs)}
    out_dir = Path(out_dir)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir.parent, prefix=f".{out_dir.name}.") as temporary:
        work = Path(temporary)
        write_trn(work / "ref.trn", {identities[utt]: [words.token(w) for w in refs[utt]] for utt in identities})
        write_trn(work / "hyp.trn", {identities[utt]: [words.token(w) for w in hyps.get(utt, ())] for utt in identities})
        longest = max(refs, key=lambda utt: len(refs[utt]) * len(hyps.get(utt, ())))
        _run(sclite, work, longest=f"{longest} ({len(refs[longest])} x {len(hyps.get(longest, ()))} units)")
        alignments = _read_sgml(work / "result.sgml", {identity: utt for utt, identity in identities.items()}, words)
        counts = {utt: _count(alignments[utt]) for utt in identities}
        total = sum(counts.values(), start=Counts(correct=0, substitutions=0, deletions=0, insertions=0))
        _check(work, refs, hyps, alignments, counts, total, identities)
        (work / "result.pra").write_text(render_alignments(alignments), encoding="utf-8")
        dtl = work / "result.dtl"
        dtl.write_text(decode_confusions(dtl.read_text(encoding="ascii"), words), encoding="utf-8")
        out_dir.mkdir(exist_ok=True)
        for file in sorted(work.iterdir()):
            os.replace(file, out_dir / file.name)
    return Score(total=total, utterances=counts, missing=missing, sclite=sclite.version)


def join(refs: Mapping[str, object], hyps: Mapping[str, object], *, allow_missing: bool) -> list[str]:
    """Checks that both sides hold the same utterances.

    Returns:
        The utterances without a hypothesis, in C order (none unless `allow_missing`).

    Raises:
        ScoringError: naming the ids that one side lacks.
    """
    unknown = sorted(set(hyps) - set(refs))
    missing = sorted(set(refs) - set(hyps))
    if unknown:
        raise ScoringError(f"{len(unknown)} hypotheses have no reference: {_some(unknown)}; is this the right reference?")
    if missing and not allow_missing:
        raise ScoringError(
            f"{len(missing)} of {len(refs)} utterances have no hypothesis: {_some(missing)}; "
            "decode them, or count them as deleted with --allow-missing"
        )
    return missing


def _some(ids: Sequence[str]) -> str:
    more = len(ids) - _SHOWN_IDS
    return " ".join(ids[:_SHOWN_IDS]) + (f" and {more} more" if more > 0 else "")


def _run(sclite: Sclite, work: Path, *, longest: str) -> None:
    # -s: case matters. -l: wide enough that no line of the .pra is ever wrapped within a token.
    command = [str(sclite.path), "-r", "ref.trn", "trn", "-h", "hyp.trn", "trn", "-i", "spu_id", "-s", "-l", "1000"]
    command += ["-o", "sum", "rsum", "pralign", "dtl", "sgml", "-O", ".", "-n", "result"]
    environment = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(
        command, cwd=work, env=environment, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL
    )
    if done.returncode != 0 or "Successful Completion" not in done.stdout:
        said = "\n  ".join((done.stdout + done.stderr).strip().splitlines()[-8:])
        raise ScoringError(
            f"{sclite.path} failed with status {done.returncode}; it said:\n  {said}\n"
            f"its memory grows with the product of the lengths; the longest utterance is {longest}: cut it into segments"
        )


_PATH = re.compile(r'<PATH id="\((.*?)\)"[^>]*>\n(.*?)\n?</PATH>', re.DOTALL)
_STEP = re.compile(r'([CSDI]),(?:"([^"]*)")?,(?:"([^"]*)")?')


def _read_sgml(path: Path, utterances: Mapping[str, str], words: TokenTable) -> dict[str, Alignment]:
    """Reads the alignment of every utterance; tokens hold no quote, comma or colon, so the format is unambiguous."""
    alignments: dict[str, Alignment] = {}
    for identity, body in _PATH.findall(path.read_text(encoding="ascii")):
        steps: Alignment = []
        for step in body.strip().split(":") if body.strip() else []:
            match = _STEP.fullmatch(step)
            if match is None or identity not in utterances:
                raise ScoringError(f"sclite wrote an alignment that cannot be read, utterance {identity}: {step!r}")
            operation, ref, hyp = match.groups()
            steps.append((operation, words.word(ref) if ref else None, words.word(hyp) if hyp else None))
        alignments[utterances[identity]] = steps
    lost = sorted(set(utterances.values()) - set(alignments))
    if lost:
        raise ScoringError(f"sclite left out {len(lost)} utterances: {_some(lost)}")
    return dict(sorted(alignments.items()))


def _count(alignment: Alignment) -> Counts:
    steps = [operation for operation, _, _ in alignment]
    return Counts(
        correct=steps.count("C"), substitutions=steps.count("S"), deletions=steps.count("D"), insertions=steps.count("I")
    )


def _check(
    work: Path,
    refs: Mapping[str, Sequence[str]],
    hyps: Mapping[str, Sequence[str]],
    alignments: Mapping[str, Alignment],
    counts: Mapping[str, Counts],
    total: Counts,
    identities: Mapping[str, str],
) -> None:
    """Holds sclite's files against our text and against each other, so that a misreading cannot become a score."""
    for utt, alignment in alignments.items():
        ref = [word for _, word, _ in alignment if word is not None]
        hyp = [word for _, _, word in alignment if word is not None]
        if ref != list(refs[utt]) or hyp != list(hyps.get(utt, ())):
            raise ScoringError(f"sclite did not read utterance {utt} as it was written: {ref} / {hyp}")
    pra = (work / "result.pra").read_text(encoding="ascii")
    told = re.findall(r"^id: \((.*)\)\nScores: \(#C #S #D #I\) (\d+) (\d+) (\d+) (\d+)$", pra, re.MULTILINE)
    from_pra = {identity: tuple(int(n) for n in numbers) for identity, *numbers in told}
    for utt, found in counts.items():
        ours = (found.correct, found.substitutions, found.deletions, found.insertions)
        if from_pra.get(identities[utt]) != ours:
            raise ScoringError(
                f"sclite contradicts itself on utterance {utt}: {ours} in .sgml, {from_pra.get(identities[utt])} in .pra"
            )
    dtl = (work / "result.dtl").read_text(encoding="ascii")
    names = (
        "Ref. words",
        "Percent Correct",
        "Percent Substitution",
        "Percent Deletions",
        "Percent Insertions",
        "Percent Total Error",
    )
    sums = tuple(
        int(m[1]) if (m := re.search(rf"^{re.escape(name)} .*\(\s*(\d+)\)$", dtl, re.MULTILINE)) else -1 for name in names
    )
    wanted = (total.reference, total.correct, total.substitutions, total.deletions, total.insertions, total.errors)
    if sums != wanted:
        raise ScoringError(f"sclite contradicts itself: {names} are {sums} in .dtl, its alignments add up to {wanted}")


def write_score(path: Path, result: Score, *, unit: str, facts: Mapping[str, Any]) -> None:
    """Writes `score.json`: the counts, `rate` in percent, `counts` as [correct, sub, del, ins] by utterance, and `facts`."""
    total = result.total
    content = {
        "unit": unit,
        "utterances": len(result.utterances),
        "reference_units": total.reference,
        "correct": total.correct,
        "sub": total.substitutions,
        "del": total.deletions,
        "ins": total.insertions,
        "errors": total.errors,
        "rate": result.rate,
        "utterances_with_errors": sum(c.errors > 0 for c in result.utterances.values()),
        "missing": result.missing,
        "sclite": result.sclite,
        **facts,
    }
    lines = [f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in content.items()]
    rows = ",\n".join(
        f"    {json.dumps(utt, ensure_ascii=False)}: [{c.correct}, {c.substitutions}, {c.deletions}, {c.insertions}]"
        for utt, c in result.utterances.items()
    )
    write_text(path, "{\n" + ",\n".join([*lines, f'  "counts": {{\n{rows}\n  }}']) + "\n}\n")
