"""Before the first step: read the tables, encode the transcripts, leave out what cannot be trained on, lay out the experiment."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import speechtx
from speechtx.config.atomic import replacing, write_text
from speechtx.config.errors import DataError, TrainingError
from speechtx.config.load import dump_config, load_config
from speechtx.config.schema import FbankConfig, JoinConfig, PerturbConfig, TrainConfig
from speechtx.data.joined import JoinedCorpus, read_pieces
from speechtx.data.loader import Corpus, FeatureReader
from speechtx.data.manifest import Utterance, load_manifest, read_fbank_config, require_same_features
from speechtx.data.waveforms import WaveformCorpus, training_sources
from speechtx.experiment.experiment import LEXICON, Experiment
from speechtx.frontend.perturb_features import FeaturePerturbation, tempo_span
from speechtx.model.losses import ctc_min_frames
from speechtx.model.subsampling import min_frames, subsampled_length
from speechtx.text.phones import Phones
from speechtx.text.tokenizer import Tokenizer

# What may change between two calls that continue the same experiment.
MAY_CHANGE = ("epochs", "checkpoint_minutes", "loader_workers", "gradient_checkpointing", "max_nonfinite_steps", "average")
# Loader processes share their parent's lock, and notice after five seconds that it was killed.
LOCK_SECONDS = 10.0


@dataclass(frozen=True)
class TrainingData:
    """What training reads: data directories after stage 2 and the tokenizer of stage 3."""

    train: Path
    dev: Path
    tokenizer: Path


@dataclass(frozen=True)
class Selection:
    """Utterances that can be trained on, their tokens and phones, and those left out with the reason."""

    utterances: list[Utterance]
    tokens: list[list[int]]
    phones: list[list[int]]  # none without a lexicon
    left_out: list[tuple[str, str]]


def select_utterances(
    utterances: Sequence[Utterance], tokenizer: Tokenizer, config: TrainConfig, phones: Phones | None = None
) -> Selection:
    """Leaves out what is too short or too long, has no text, or what CTC could not emit in its frames.

    Raises:
        DataError: a label is outside the vocabulary, or a word has no pronunciation though `phones` are given.
    """
    if phones is not None:
        phones.require({utterance.id: utterance.text for utterance in utterances})
    kept = Selection([], [], [], [])
    limits = config.training
    for utterance in utterances:
        ids = tokenizer.encode(utterance.text)
        sounds = phones.encode(utterance.text) if phones is not None else []
        frames = subsampled_length(utterance.num_frames, config.model.encoder.subsampling.factor)
        needed = _needed(ids, sounds)
        if not ids:
            kept.left_out.append((utterance.id, "empty transcript"))
        elif not limits.min_frames <= utterance.num_frames <= limits.max_frames:
            kept.left_out.append(
                (utterance.id, f"{utterance.num_frames} frames, allowed are {limits.min_frames} to {limits.max_frames}")
            )
        elif frames < needed:
            labels = f"{len(ids)} tokens" + (f" or {len(sounds)} phones" if sounds else "")
            kept.left_out.append(
                (utterance.id, f"{frames} encoder frames, but CTC needs {needed} for {labels} and their repeats")
            )
        elif not all(0 < token < tokenizer.sos_eos_id for token in ids):
            raise DataError(
                f"utterance {utterance.id}: tokens {ids} are outside the model's vocabulary, in which a text has tokens 1 to "
                f"{tokenizer.sos_eos_id - 1}; make the tokenizer again (stage bpe)"
            )
        else:
            kept.utterances.append(utterance)
            kept.tokens.append(ids)
            if phones is not None:
                kept.phones.append(sounds)
    return kept


@contextlib.contextmanager
def only_one_training(exp: Path) -> Iterator[None]:
    """Holds the experiment directory, made if it is not there, for this process until the block ends or the process dies.

    Raises:
        TrainingError: another process trains in it.
    """
    exp.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + LOCK_SECONDS
    with open(exp / ".lock", "w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TrainingError(f"{exp}: another process is training here; wait for it, or give another --exp") from None
            time.sleep(0.1)
        yield


def lay_out_experiment(exp: Path, config: TrainConfig, fbank: FbankConfig, data: TrainingData) -> None:
    """Makes the experiment directory, or checks that an existing one belongs to the same experiment.

    Raises:
        TrainingError: the directory holds another experiment; the message names the keys that differ.
    """
    old = exp / "config.yaml"
    if old.is_file():
        different = differing_keys(load_config(old, TrainConfig), config)
        if load_config(exp / "fbank.yaml", FbankConfig) != fbank:
            different.append("fbank.yaml")
        if different:
            raise TrainingError(
                f"{exp} holds an experiment with another configuration ({', '.join(different)}); "
                "give another --exp, or start again (./run.sh --restart, or remove the directory)"
                + (
                    "; a cosine schedule ends with the last epoch, so it cannot be prolonged"
                    if "training.epochs" in different
                    else ""
                )
            )
    tokenizer = Tokenizer.load(data.tokenizer)
    if not (exp / "tokenizer").is_dir():
        shutil.copytree(data.tokenizer, exp / "tokenizer.new", dirs_exist_ok=True)
        (exp / "tokenizer.new").rename(exp / "tokenizer")
    if Tokenizer.load(exp / "tokenizer").model_proto != tokenizer.model_proto:
        raise TrainingError(f"{exp}/tokenizer is not the tokenizer of {data.tokenizer}; give another --exp")
    if config.model.phone_lexicon is not None:
        _take(
            Path(config.model.phone_lexicon), exp / LEXICON, missing="stage data makes a recipe's lexicon", changed="it changed"
        )
    if config.features.cmvn == "global":
        missing, changed = "run stage fbank on the training set", "the training set's features changed"
        _take(data.train / "global_cmvn.ark", exp / "global_cmvn.ark", missing=missing, changed=changed)
    write_text(exp / "fbank.yaml", dump_config(fbank))
    write_text(old, dump_config(config))


def _take(source: Path, stored: Path, *, missing: str, changed: str) -> None:
    """Copies a file that the model depends on into its experiment, once.

    Raises:
        TrainingError: there is none, or the experiment was begun with another.
    """
    if not source.is_file():
        raise TrainingError(f"{source}: missing; {missing}")
    content = source.read_bytes()
    if stored.is_file() and (stored.parent / "config.yaml").is_file() and stored.read_bytes() != content:
        raise TrainingError(
            f"{source} is not what {stored.parent} was trained with: {changed}; give another --exp, or "
            "remove the directory to start again"
        )
    with replacing(stored, "wb") as stream:
        stream.write(content)


def differing_keys(old: TrainConfig, new: TrainConfig) -> list[str]:
    """Names of the values in which two configurations of one experiment must not differ, but do."""
    ours, theirs = flatten(old.model_dump(mode="json")), flatten(new.model_dump(mode="json"))
    free = [f"training.{name}" for name in MAY_CHANGE]
    if new.training.schedule.name == "cosine":
        free.remove("training.epochs")  # the schedule ends with the last epoch: another number is another training
    keys = sorted({*ours, *theirs})
    return [k for k in keys if ours.get(k) != theirs.get(k) and not any(k == f or k.startswith(f + ".") for f in free)]


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def build_corpora(exp: Path, data: TrainingData, config: TrainConfig) -> tuple[Corpus, Corpus, list[str]]:
    """The training and dev corpora of an experiment that is laid out, and what a person should know about them.

    Raises:
        DataError: tables or features are wrong. TrainingError: nothing is left to train or to validate on.
    """
    experiment = Experiment.open(exp)
    notes: list[str] = []
    corpora = []
    for name, directory in (("train", data.train), ("dev", data.dev)):
        reader = FeatureReader(
            config=config.features,
            num_mel_bins=experiment.fbank.num_mel_bins,
            global_cmvn=experiment.global_cmvn,
            data_dir=directory,
        )
        manifest = load_manifest(directory)
        phones = experiment.phones if name == "train" else None  # nothing is predicted inside the encoder but in training
        selection = select_utterances(manifest, experiment.tokenizer, config, phones)
        report = exp / f"left_out_{name}.txt"
        write_text(report, "".join(f"{key} {why}\n" for key, why in selection.left_out))
        if not selection.utterances:
            raise TrainingError(f"{directory}: none of {len(manifest)} utterances can be used; reasons are in {report}")
        hours = sum(u.num_frames for u in selection.utterances) * experiment.fbank.frame_shift_ms / 3.6e6
        unknown = sum(ids.count(experiment.tokenizer.unk_id) for ids in selection.tokens)
        total = sum(len(ids) for ids in selection.tokens)
        line = f"{name}: {len(selection.utterances)} utterances, {hours:.2f} h, {total} tokens"
        if unknown:
            line += f" ({unknown} of them <unk>)"
        if selection.left_out:
            line += f"; {len(selection.left_out)} left out, for example {' '.join(selection.left_out[0])} (all in {report})"
        notes.append(line)
        augmentation = _augmentation(config, experiment.fbank, selection) if name == "train" else {}
        kind: Callable[..., Corpus] = Corpus
        if name == "train" and config.training.join is not None:
            kind, note = _joined(config, config.training.join, experiment, selection)
            notes.append(note)
        if name == "train" and config.training.waveforms:
            sources = training_sources(directory, selection.utterances)
            kind = functools.partial(WaveformCorpus, sources=sources, fbank=experiment.fbank)
        corpora.append(
            kind(
                utterances=selection.utterances,
                tokens=selection.tokens,
                phones=selection.phones,
                reader=reader,
                seed=config.seed,
                **augmentation,
            )
        )
    return corpora[0], corpora[1], notes


def _augmentation(config: TrainConfig, fbank: FbankConfig, selection: Selection) -> dict[str, Any]:
    """What the training corpus does to its features and the dev corpus does not."""
    perturb = config.training.perturb
    phones = selection.phones or [[]] * len(selection.tokens)
    return {
        "specaugment": config.training.specaugment,
        "perturb": FeaturePerturbation(config=perturb, fbank=fbank) if perturb != PerturbConfig() else None,
        "spans": [
            _span(config, u.num_frames, tokens, sounds)
            for u, tokens, sounds in zip(selection.utterances, selection.tokens, phones, strict=True)
        ],
        "views": 2 if config.training.consistency is not None else 1,
    }


def _joined(
    config: TrainConfig, join: JoinConfig, experiment: Experiment, selection: Selection
) -> tuple[Callable[..., Corpus], str]:
    """Makes a training corpus with joined utterances; and what a person should know about it."""
    pieces = read_pieces(join.words, selection.utterances, experiment.fbank.frame_shift_ms)
    factor, phones, tokenizer = config.model.encoder.subsampling.factor, experiment.phones, experiment.tokenizer
    fit = []
    for piece in pieces:
        needed = _needed(tokenizer.encode(piece.text), phones.encode(piece.text) if phones is not None else [])
        if piece.end - piece.start >= min_frames(factor, needed + 1):  # and the blank between equal tokens where two pieces meet
            fit.append(piece)
    kind = functools.partial(
        JoinedCorpus,
        pieces=fit,
        join=join,
        encode=tokenizer.encode,
        encode_phones=None if phones is None else phones.encode,
        span=functools.partial(_span, config),
        max_frames=config.training.max_frames,
    )
    number = round(join.ratio * len(selection.utterances))
    return kind, f"train: {number} utterances more in each epoch, joined from {len(fit)} runs of words of {join.words}"


def _needed(tokens: Sequence[int], phones: Sequence[int]) -> int:
    """Encoder frames that CTC needs for both."""
    return max(ctc_min_frames(tokens), ctc_min_frames(phones))


def _span(config: TrainConfig, num_frames: int, tokens: Sequence[int], phones: Sequence[int]) -> tuple[int, int]:
    """The fewest and the most frames of an utterance at another tempo."""
    shortest = min_frames(config.model.encoder.subsampling.factor, _needed(tokens, phones))
    return tempo_span(num_frames, config.training.perturb.tempo, shortest=shortest, longest=config.training.max_frames)


def check_features_agree(data: TrainingData) -> FbankConfig:
    """The feature configuration that train and dev share."""
    fbank = read_fbank_config(data.train)
    require_same_features(fbank, data.train, read_fbank_config(data.dev), data.dev)
    return fbank


def describe_run(exp: Path, *, device: str, num_parameters: int, seed: int, processes: int) -> None:
    """Writes run.json at the first start; a continued run only adds when, and by which commit."""
    path = exp / "run.json"
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    if path.is_file():
        run = json.loads(path.read_text(encoding="utf-8"))
        if "train_seconds" not in run:  # else it is finished, and nothing will be trained
            run.setdefault("continued", []).append(f"{now} by git {git_hash()}")
    else:
        run = {
            "command": shlex.join(["speechtx", *sys.argv[1:]]),
            "recipe_command": os.environ.get("SPEECHTX_RECIPE_COMMAND", ""),
            "git_hash": git_hash(),
            "versions": {"speechtx": speechtx.__version__, "torch": torch.__version__, "python": platform.python_version()},
            "host": platform.node(),
            "device": device,
            "processes": processes,
            "threads": torch.get_num_threads(),
            "num_parameters": num_parameters,
            "seed": seed,
            "started": now,
        }
    write_text(path, json.dumps(run, indent=1) + "\n")


def finish_run(exp: Path, train_seconds: float) -> None:
    path = exp / "run.json"
    run = json.loads(path.read_text(encoding="utf-8"))
    run["train_seconds"] = round(train_seconds, 1)
    write_text(path, json.dumps(run, indent=1) + "\n")


def git_hash() -> str:
    """The commit of the source tree, with `+changes` when it was not clean; `unknown` outside a checkout."""
    root = Path(speechtx.__file__).resolve().parent.parent
    try:
        commit = subprocess.run(
            ["git", "-C", root, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        )
        status = subprocess.run(
            ["git", "-C", root, "status", "--porcelain", "--untracked-files=no", "--", "speechtx", "utils"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + ("+changes" if status.stdout.strip() else "")


def device_name(device: torch.device) -> str:
    """What RESULTS shows: the GPU's name, or the processor's with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    return f"{model}, {torch.get_num_threads()} threads"
