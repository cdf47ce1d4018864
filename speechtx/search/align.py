"""Where words are said: CTC's best alignment of transcripts, and the runs of words that are recognised standing alone.

CTC says in which frame each token is seen best, not where a word begins. A word's end is looked for between its last token and
the next word's first: where the features have the least energy. Whether words can be cut out there is tried: runs of one, two and
three words are recognised by themselves, and those that come out as they should are kept, longer ones only around words that no
shorter run has saved.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from speechtx.config.atomic import replacing
from speechtx.config.errors import DataError, ExperimentError
from speechtx.data.batching import make_batches
from speechtx.data.loader import FeatureReader, collate
from speechtx.data.manifest import Utterance, load_manifest, read_fbank_config, require_same_features
from speechtx.experiment.experiment import Experiment
from speechtx.model.losses import ctc_min_frames
from speechtx.model.recognizer import Recognizer
from speechtx.model.subsampling import min_frames
from speechtx.search.greedy import ctc_greedy
from speechtx.text.normalize import split_words

LONGEST_RUN = 3  # words
FRAMES_PER_BATCH = 16000
SMOOTHED = 3  # frames whose mean energy is compared


@dataclass(frozen=True)
class Alignment:
    """An utterance's words: word i is said in frames cuts[i] to cuts[i + 1] of the features, and the cuts share the silence."""

    utterance: Utterance
    words: list[str]
    cuts: list[int]
    runs: list[tuple[int, int]] = field(default_factory=list)  # words i to j - 1 are recognised alone


@dataclass
class Counts:
    """What came of it."""

    aligned: int = 0
    not_aligned: list[str] = field(default_factory=list)
    tried: Counter[int] = field(default_factory=Counter)  # runs by their number of words
    recognised: Counter[int] = field(default_factory=Counter)

    def __str__(self) -> str:
        runs = ", ".join(f"{self.recognised[n]} of {self.tried[n]} with {n}" for n in sorted(self.tried))
        failed = self.not_aligned
        left_out = f"; {len(failed)} without words or too short for them, the first {failed[0]}" if failed else ""
        return f"{self.aligned} utterances aligned{left_out}; runs recognised alone, by words: {runs}"


def best_alignment(log_probs: np.ndarray, labels: Sequence[int], *, blank_id: int = 0) -> list[tuple[int, int]] | None:
    """The likeliest CTC path of a label sequence (Graves et al. 2006, with a maximum in place of the sum).

    Args:
        log_probs: (S, V) of the frames.
        labels: U labels, none of them the blank.
        blank_id: the blank.

    Returns:
        First and last frame of each label; None if there are fewer frames than CTC needs.
    """
    if len(log_probs) < ctc_min_frames(labels):
        return None
    states = np.full(2 * len(labels) + 1, blank_id)
    states[1::2] = labels
    may_skip = np.zeros(len(states), dtype=bool)  # the blank between different labels
    may_skip[2:] = (states[2:] != blank_id) & (states[2:] != states[:-2])
    scores = np.full(len(states), -np.inf)
    scores[:2] = log_probs[0, states[:2]]
    steps = np.zeros((len(log_probs), len(states)), dtype=np.int64)
    for frame in range(1, len(log_probs)):
        one, two = np.roll(scores, 1), np.where(may_skip, np.roll(scores, 2), -np.inf)
        one[0] = -np.inf
        before = np.stack([scores, one, two])
        steps[frame] = before.argmax(axis=0)
        scores = before.max(axis=0) + log_probs[frame, states]
    state = int(scores[-2:].argmax()) + len(states) - 2 if labels else 0
    spans = [(len(log_probs), -1)] * len(labels)
    for frame in range(len(log_probs) - 1, -1, -1):
        if state % 2:
            first, last = spans[state // 2]
            spans[state // 2] = (min(first, frame), max(last, frame))
        state -= int(steps[frame, state])
    return spans


def word_cuts(spans: Sequence[tuple[int, int]], energy: np.ndarray, factor: int) -> list[int]:
    """Where words begin and the last one ends.

    Args:
        spans: first and last encoder frame of each word's tokens.
        energy: (T,) of the features' frames.
        factor: feature frames an encoder frame.
    """
    smooth = np.convolve(energy, np.full(SMOOTHED, 1.0 / SMOOTHED), mode="same")
    cuts = [0]
    for (_, last), (first, _) in pairwise(spans):
        low, high = factor * (last + 1), min(factor * first + factor - 1, len(smooth) - 1)
        cuts.append(low + int(smooth[low : high + 1].argmin()) if high > low else min(low, len(smooth) - 1))
    return [*cuts, len(energy)]


@dataclass(frozen=True)
class Aligner:
    """Aligns the utterances of one data directory with one model."""

    model: Recognizer
    exp: Experiment
    reader: FeatureReader
    device: str = "cpu"

    @property
    def factor(self) -> int:
        """Feature frames an encoder frame."""
        return self.exp.config.model.encoder.subsampling.factor

    def align(self, utterances: Sequence[Utterance], counts: Counts) -> Iterator[Alignment]:
        """Aligns a batch; those that cannot be aligned are counted, and left out."""
        read = [self.reader.read(utterance) for utterance in utterances]
        feats = [self.reader.normalise(u, matrix) for u, matrix in zip(utterances, read, strict=True)]
        batch = self._log_probs(feats)
        for utterance, raw, own, log_probs in zip(utterances, read, feats, batch, strict=True):
            words = split_words(utterance.text)
            tokens = [self.exp.tokenizer.encode(word) for word in words]
            spans = best_alignment(log_probs.numpy(), [token for word in tokens for token in word])
            if spans is None:
                counts.not_aligned.append(utterance.id)
                continue
            ends = np.cumsum([len(word) for word in tokens])
            of_words = [(spans[end - len(word)][0], spans[end - 1][1]) for end, word in zip(ends, tokens, strict=True)]
            cuts = word_cuts(of_words, raw.mean(axis=1), self.factor)
            counts.aligned += 1
            yield Alignment(utterance, words, cuts, self._runs(own, tokens, cuts, counts))

    def _runs(self, feats: np.ndarray, tokens: list[list[int]], cuts: list[int], counts: Counts) -> list[tuple[int, int]]:
        """Runs of words that are recognised by themselves."""
        found: list[tuple[int, int]] = []
        saved: set[int] = set()  # words of shorter runs
        for size in range(1, LONGEST_RUN + 1):
            wanted = {}
            for start in range(len(tokens) - size + 1):
                labels = tuple(token for word in tokens[start : start + size] for token in word)
                enough = cuts[start + size] - cuts[start] >= min_frames(self.factor, ctc_min_frames(labels))
                if enough and saved.isdisjoint(range(start, start + size)):
                    wanted[start, start + size] = labels
            if not wanted:
                continue
            log_probs = self._log_probs([feats[cuts[start] : cuts[end]] for start, end in wanted])
            good = []
            for (run, labels), one in zip(wanted.items(), log_probs, strict=True):
                heard = ctc_greedy(one[None], torch.tensor([len(one)]), blank_id=0, sos_eos_id=self.model.sos_eos_id)[0]
                if heard.tokens == labels:
                    good.append(run)
            counts.tried[size] += len(wanted)
            counts.recognised[size] += len(good)
            found += good
            saved |= {word for run in good for word in range(*run)}
        return sorted(found)

    def _log_probs(self, feats: Sequence[np.ndarray]) -> list[Tensor]:
        """CTC's log-probabilities (S, V) of each utterance."""
        batch = collate([""] * len(feats), feats, [[]] * len(feats))
        with torch.inference_mode():
            enc_out, enc_lens = self.model.encode(batch.feats.to(self.device), batch.feat_lens.to(self.device))
            log_probs = self.model.ctc_log_probs(enc_out).cpu()
        return [one[:length] for one, length in zip(log_probs, enc_lens.tolist(), strict=True)]


def align_data(exp: Experiment, data_dir: Path, out_dir: Path, *, device: str = "cpu") -> Counts:
    """Aligns a data directory and writes `ctm`, and the tables `segments`, `text`, `utt2spk` of the runs.

    Args:
        exp: an experiment with averaged weights and a CTC output.
        data_dir: with features and transcripts.
        out_dir: times are in seconds from the beginning of an utterance of `data_dir`.
        device: to encode on.

    Raises:
        DataError: features that are not the model's, or nothing could be aligned.
        ExperimentError: the CTC output was never trained.
    """
    if exp.config.model.ctc_weight == 0.0:
        raise ExperimentError(f"{exp.path}: trained with model.ctc_weight 0, so its CTC output knows nothing to align by")
    require_same_features(exp.fbank, exp.path, read_fbank_config(data_dir), data_dir)
    utterances = load_manifest(data_dir)
    reader = FeatureReader(
        config=exp.config.features, num_mel_bins=exp.fbank.num_mel_bins, global_cmvn=exp.global_cmvn, data_dir=data_dir
    )
    aligner = Aligner(exp.load_model(device=device), exp, reader, device)
    fit = [u for u in utterances if split_words(u.text) and u.num_frames >= min_frames(aligner.factor)]
    counts = Counts(not_aligned=sorted({u.id for u in utterances} - {u.id for u in fit}))
    found: list[Alignment] = []
    lengths = [utterance.num_frames for utterance in fit]
    with tqdm(total=len(fit), desc="align", unit="utt", disable=None, dynamic_ncols=True) as bar:
        for batch in make_batches(lengths, frames_per_batch=max([FRAMES_PER_BATCH, *lengths]), max_utts=64):
            found += aligner.align([fit[place] for place in batch], counts)
            bar.update(len(batch))
    if not found:
        raise DataError(
            f"{data_dir}: none of {len(utterances)} utterances could be aligned with {exp.path}: no transcripts, or too few "
            "frames for them; is it the data that the model was made for?"
        )
    write_alignments(sorted(found, key=lambda a: a.utterance.id.encode()), out_dir, exp.fbank.frame_shift_ms / 1000)
    return counts


def write_alignments(alignments: Sequence[Alignment], out_dir: Path, seconds: float) -> None:
    """Writes the tables; `seconds` is a frame's."""
    out_dir.mkdir(parents=True, exist_ok=True)
    tables: dict[str, list[str]] = {"ctm": [], "segments": [], "text": [], "utt2spk": []}
    for alignment in alignments:
        key, cuts = alignment.utterance.id, [f"{seconds * cut:.3f}" for cut in alignment.cuts]
        for place, word in enumerate(alignment.words):
            length = seconds * (alignment.cuts[place + 1] - alignment.cuts[place])
            tables["ctm"].append(f"{key} 1 {cuts[place]} {length:.3f} {word}")
        for start, end in alignment.runs:
            run = f"{key}-{start:03d}-{end:03d}"
            tables["segments"].append(f"{run} {key} {cuts[start]} {cuts[end]}")
            tables["text"].append(f"{run} {' '.join(alignment.words[start:end])}")
            tables["utt2spk"].append(f"{run} {alignment.utterance.speaker}")
    for name, lines in tables.items():
        if name != "ctm":
            lines.sort(key=str.encode)
        with replacing(out_dir / name) as stream:
            stream.writelines(line + "\n" for line in lines)
