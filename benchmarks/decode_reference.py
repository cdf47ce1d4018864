"""Whether the fast beam search finds what the plain one finds, on every utterance of a data directory.

The plain search (`speechtx.search.reference`) runs the CTC forward algorithm anew for every extension of every hypothesis, hours
for AN4's test set. Here it is given the same algorithm, still frame by frame, with a cache (`CtcExtensions`, which a test ties to
the original): seconds an utterance. Each result is kept in a file as soon as it is known, so a run that is cut off goes on where
it was, and the comparison can be repeated with another fast search.

Example:
    python -m benchmarks.decode_reference --exp EXP --data DATA --kept reference.jsonl --processes 2
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.decode_case import Case, trained_case
from speechtx.config.decode import DecodeConfig
from speechtx.experiment.experiment import Experiment
from speechtx.search import reference
from speechtx.search.decode import decode_batch
from speechtx.search.hypothesis import Hypothesis
from speechtx.search.reference import reference_search

_shared: dict[str, Any] = {}


class CtcExtensions:
    """`reference.ctc_log_prob` that keeps the trellis of a prefix for its extensions, and adds all labels at once.

    Position i of the extended labels looks at positions i, i - 1 and i - 2 only, so a label that is appended adds two rows to the
    trellis (its own and the blank's behind it) and changes none. Those of prefixes shorter than needed by now are forgotten.
    """

    def __init__(self) -> None:
        self._log_probs: np.ndarray | None = None
        self._added: dict[int, dict[tuple[int, ...], _Added]] = {}

    def __call__(self, log_probs: np.ndarray, labels: Sequence[int], *, blank_id: int, prefix: bool) -> float:
        if not labels:
            return 0.0 if prefix else float(log_probs[:, blank_id].sum())
        if self._log_probs is not log_probs:
            self._log_probs, self._added = log_probs, {}
        added, label = self._extend(tuple(labels[:-1]), blank_id), labels[-1]
        if prefix:
            return float(added.arrivals[label])
        return float(np.logaddexp(added.own[-1, label], added.blank[-1, label]))

    def _extend(self, labels: tuple[int, ...], blank_id: int) -> _Added:
        """Every label appended to `labels`."""
        known = self._added.setdefault(len(labels), {})
        if labels not in known:
            self._added.pop(len(labels) - 3, None)
            known[labels] = self._add(labels, blank_id)
        return known[labels]

    def _add(self, labels: tuple[int, ...], blank_id: int) -> _Added:
        y = self._log_probs
        assert y is not None
        phi = np.full_like(y, -np.inf)  # (S, V) from the positions before, at the frame before
        if labels:
            shorter, last = self._extend(labels[:-1], blank_id), labels[-1]
            own, blank = shorter.own[:-1, last], shorter.blank[:-1, last]
            phi[1:] = np.logaddexp(blank, own)[:, None]
            phi[1:, last] = blank  # a repeated label needs a blank in between
        else:
            phi[0] = 0.0
            phi[1:] = y[:-1, blank_id].cumsum()[:, None]
        added = _Added(np.full_like(y, -np.inf), np.full_like(y, -np.inf), np.logaddexp.reduce(phi + y, axis=0))
        added.own[0] = phi[0] + y[0]
        for t in range(1, len(y)):
            added.own[t] = np.logaddexp(added.own[t - 1], phi[t]) + y[t]
            added.blank[t] = np.logaddexp(added.blank[t - 1], added.own[t - 1]) + y[t, blank_id]
        return added


@dataclass(frozen=True)
class _Added:
    """What V labels, each appended to the same prefix, add to the trellis: (S, V) own rows, (S, V) rows of the blank behind, and
    the (V,) log-probability that the label is ever reached."""

    own: np.ndarray
    blank: np.ndarray
    arrivals: np.ndarray


def _open(case: Case, config: DecodeConfig) -> None:
    torch.set_num_threads(1)
    reference.ctc_log_prob = CtcExtensions()
    _shared.update(case=case, model=case.recognizer(), config=config)


def _search_plainly(utt: int) -> tuple[int, dict[str, Any], float]:
    feats, model = _shared["case"].feats[utt], _shared["model"]
    start = time.process_time()
    with torch.inference_mode():
        enc_out, _ = model.encode(feats.unsqueeze(0), torch.tensor([len(feats)]))
        best = reference_search(model, enc_out[0], _shared["config"])[0]
    return utt, asdict(best), time.process_time() - start


def reference_hypotheses(
    case: Case, ids: Sequence[str], config: DecodeConfig, *, kept: Path, processes: int
) -> dict[str, tuple[Hypothesis, float]]:
    """The plain search's best hypothesis and processor seconds of every utterance; those in `kept` are not searched again.

    Raises:
        SystemExit: `kept` is of another configuration.
    """
    found: dict[str, tuple[Hypothesis, float]] = {}
    key = config.model_dump(mode="json")
    if kept.is_file():
        header, *lines = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
        if header != key:
            raise SystemExit(f"{kept}: of another configuration, {header}; name another file")
        found = {line["utt"]: (Hypothesis.from_json(line["best"]), line["seconds"]) for line in lines}
    else:
        kept.write_text(json.dumps(key) + "\n", encoding="utf-8")
    todo = sorted((utt for utt in range(len(ids)) if ids[utt] not in found), key=lambda utt: len(case.feats[utt]))
    if not todo:
        return found
    context = multiprocessing.get_context("spawn")  # forked workers would inherit PyTorch's threads half-way
    with kept.open("a", encoding="utf-8") as stream, context.Pool(processes, _open, (case, config)) as pool:
        for utt, best, seconds in tqdm(pool.imap_unordered(_search_plainly, todo), total=len(todo), unit="utt"):
            stream.write(json.dumps({"utt": ids[utt], "best": best, "seconds": round(seconds, 3)}) + "\n")
            stream.flush()
            found[ids[utt]] = Hypothesis(**best), seconds
    return found


def compare(exp: Experiment, case: Case, ids: Sequence[str], config: DecodeConfig, *, kept: Path, processes: int) -> str:
    """What both searches found, in one paragraph."""
    plain = reference_hypotheses(case, ids, config, kept=kept, processes=processes)
    model = case.recognizer()
    differing, far, start = [], 0.0, time.process_time()
    for utt, feats in zip(ids, case.feats, strict=True):
        best = decode_batch(model, feats.unsqueeze(0), torch.tensor([len(feats)]), config)[0][0]
        expected = plain[utt][0]
        if best.tokens == tuple(expected.tokens):
            far = max(far, abs(best.score - expected.score))
        else:
            differing.append(
                f"{utt}: {exp.tokenizer.decode(list(best.tokens))!r} scores {best.score:.4f}, the plain search's "
                f"{exp.tokenizer.decode(list(expected.tokens))!r} {expected.score:.4f}"
            )
    fast = time.process_time() - start
    slow = sum(seconds for _, seconds in plain.values())
    text = (
        f"{len(ids) - len(differing)} of {len(ids)} texts are equal; where they are, scores differ by at most {far:.1e}. "
        f"Processor time: {slow:,.0f} s plainly, {fast:.1f} s with the fast search (both with the encoder)."
    )
    return "\n".join([text, *(f"- {line}" for line in differing)])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exp", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--kept", type=Path, required=True, help="the plain search's results, made or continued")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--beam", type=int, default=10)
    parser.add_argument("--ctc-weight", type=float, default=0.3)
    parser.add_argument("--first", type=int, metavar="N", help="only the N shortest utterances")
    options = parser.parse_args(arguments)
    exp = Experiment.open(options.exp)
    case, ids = trained_case(exp, options.data)
    if options.first is not None:
        chosen = sorted(range(len(ids)), key=lambda utt: len(case.feats[utt]))[: options.first]
        case.feats, case.tokens, ids = [case.feats[i] for i in chosen], [case.tokens[i] for i in chosen], [ids[i] for i in chosen]
    torch.set_num_threads(1)
    config = DecodeConfig(beam=options.beam, ctc_weight=options.ctc_weight)
    print(compare(exp, case, ids, config, kept=options.kept, processes=options.processes))


if __name__ == "__main__":
    main()
