"""Finds in seconds what would otherwise fail an hour later (stage 0); needs no data.

Loads every YAML of the run, builds the model without memory, and looks at tools, Python packages, disk, GPUs, paths and
jobs. Prints one line a check; the exit status is 1 if there is any problem.

example: speechtx check --config conf/train.yaml --fbank-config conf/fbank.yaml --decode-config conf/decode.yaml --exp exp/train
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from speechtx.config.errors import SpeechtxError

if TYPE_CHECKING:
    from speechtx.config.decode import DecodeConfig
    from speechtx.config.schema import FbankConfig, TrainConfig

GIB = 1 << 30
PACKAGES = (
    "kaldiio",
    "kaldi_native_io",
    "kaldi_native_fbank",
    "sentencepiece",
    "soundfile",
    "soxr",
    "tqdm",
    "tensorboard",
    "matplotlib",
)


@dataclass(frozen=True)
class Finding:
    """One line of the table: `advice` is empty when all is well, else what to do."""

    subject: str
    message: str
    advice: str = ""


@dataclass(frozen=True)
class Configs:
    """The run's YAML files, read; None where one could not be."""

    train: TrainConfig | None
    fbank: FbankConfig | None
    searches: dict[Path, list[DecodeConfig]]  # by the file to correct: one of a decode.yaml, many of a tune.yaml


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="conf/train.yaml")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="override one value of it"
    )
    parser.add_argument("--fbank-config", type=Path, required=True, metavar="FILE", help="conf/fbank.yaml")
    parser.add_argument(
        "--decode-config", type=Path, action="append", default=[], metavar="FILE", help="conf/decode.yaml; may be repeated"
    )
    parser.add_argument(
        "--tune",
        type=Path,
        nargs=2,
        action="append",
        default=[],
        metavar=("FILE", "GRID"),
        help="conf/decode.yaml and the conf/tune.yaml on whose grid it will be tuned",
    )
    parser.add_argument(
        "--align-config", type=Path, metavar="FILE", help="conf/align.yaml, of the model that finds words to join"
    )
    parser.add_argument("--lm-config", type=Path, metavar="FILE", help="conf/lm.yaml")
    parser.add_argument(
        "--data", type=Path, default=Path("data"), metavar="DIR", help="where data directories are made (default: data)"
    )
    parser.add_argument("--exp", type=Path, required=True, metavar="DIR", help="the experiment directory")
    parser.add_argument(
        "--train-text", type=Path, metavar="FILE", help="transcripts of the training set, if they are there already"
    )
    parser.add_argument("--archive", type=Path, metavar="FILE", help="the corpus archive that stage 1 will read")
    parser.add_argument(
        "--corpus-gib", type=float, default=1.0, metavar="X", help="size of the corpus' audio in GiB (default: 1)"
    )
    parser.add_argument(
        "--speeds", default="", metavar="F,F,...", help="the training set will be copied at these speeds (default: none)"
    )
    parser.add_argument("--nj", type=int, default=1, metavar="N", help="parallel jobs")
    parser.add_argument("--ngpu", type=int, default=0, metavar="N", help="GPUs to train on")


def run(args: argparse.Namespace) -> int:
    configs, findings = load_all(args)
    findings += list(check_packages())
    parameters = 0
    if configs.train and configs.fbank:
        parameters, found = check_model(configs.train, configs.fbank)
        findings += found
        findings += list(check_shapes(configs.train, configs.fbank))
        findings += list(check_searches(configs.train, configs.searches))
        findings += list(check_units(configs.train, configs.fbank, args.config, args.overrides))
        if args.train_text and args.train_text.is_file():
            findings.append(check_tokenizer(configs.train, args.train_text))
    if args.lm_config:
        findings += list(check_language_models(args.lm_config, args.data, configs.train))
    findings += list(check_weights(configs.searches, args.lm_config))
    findings.append(check_sclite())
    findings += list(check_paths(args.data, args.exp, args.archive))
    training = configs.train.training if configs.train else None
    findings.append(
        check_disk(
            args.data,
            audio_gib=args.corpus_gib,
            copies=args.speeds.count(",") + 1,
            parameters=parameters,
            epochs_kept=training.average.num if training else 10,
            ema=training is not None and training.ema is not None,
        )
    )
    findings += list(check_processors(args.nj, args.ngpu))
    return report(findings)


def load_all(args: argparse.Namespace) -> tuple[Configs, list[Finding]]:
    """Reads every YAML file, and goes on after a wrong one, so that all mistakes are seen at once."""
    from speechtx.config.decode import DecodeConfig
    from speechtx.config.load import load_config
    from speechtx.config.schema import FbankConfig, TrainConfig
    from speechtx.config.tune import load_grid

    findings: list[Finding] = []
    train = fbank = None
    searches: dict[Path, list[DecodeConfig]] = {}

    def note(path: Path, error: SpeechtxError | None) -> None:
        findings.append(Finding("config", str(error), f"correct {path}, or the --set") if error else Finding("config", str(path)))

    try:
        train = load_config(args.config, TrainConfig, args.overrides)
        note(args.config, None)
    except SpeechtxError as err:
        note(args.config, err)
    if args.align_config:
        try:
            load_config(args.align_config, TrainConfig)
            note(args.align_config, None)
        except SpeechtxError as err:
            note(args.align_config, err)
    try:
        fbank = load_config(args.fbank_config, FbankConfig)
        note(args.fbank_config, None)
    except SpeechtxError as err:
        note(args.fbank_config, err)
    for path in args.decode_config:
        try:
            searches[path] = [load_config(path, DecodeConfig)]
            note(path, None)
        except SpeechtxError as err:
            note(path, err)
    for path, grid in args.tune:
        if path in searches:  # else that one is to be corrected first
            try:
                searches[grid] = [point.config for point in load_grid(grid, searches[path][0])]
                note(grid, None)
            except SpeechtxError as err:
                note(grid, err)
    return Configs(train, fbank, searches), findings


def check_packages() -> Iterator[Finding]:
    """Python packages that a later stage would miss."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        yield Finding(
            "packages", f"not installed: {', '.join(missing)}", "run tools/install.sh, and source path.sh to use its Python"
        )
    else:
        yield Finding("packages", f"Python {sys.version.split()[0]}, {len(PACKAGES)} packages found")


def check_model(train: TrainConfig, fbank: FbankConfig) -> tuple[int, list[Finding]]:
    """Builds the model on torch's meta device: shapes without memory. Returns the number of parameters too."""
    import torch

    from speechtx.model.recognizer import Recognizer

    # <blank> and <sos/eos> join the pieces; how many characters a text has is not known yet
    vocab_size = 64 if train.tokenizer.type == "char" else train.tokenizer.vocab_size + 2
    findings, num_phones = check_lexicon(train)
    try:
        with torch.device("meta"):
            model = Recognizer(
                config=train.model,
                num_mel_bins=fbank.num_mel_bins,
                vocab_size=vocab_size,
                frame_shift_ms=fbank.frame_shift_ms,
                num_phones=num_phones,
            )
    except (ValueError, RuntimeError) as err:
        return 0, [
            *findings,
            Finding("model", f"cannot be built: {err}", "correct the section model of the training configuration"),
        ]
    number = sum(parameter.numel() for parameter in model.parameters())
    encoder, decoder = train.model.encoder, train.model.decoder
    about = "about " if train.tokenizer.type == "char" else ""
    shape = f"{encoder.type} {encoder.layers}+{decoder.layers} layers, width {encoder.dim}, {about}{vocab_size} tokens"
    return number, [*findings, Finding("model", f"{shape}: {number:,} parameters")]


def check_lexicon(train: TrainConfig) -> tuple[list[Finding], int]:
    """The lexicon that the model's configuration names, if it does, and its number of phones; about 40 if nobody can tell yet."""
    from speechtx.text.phones import Phones

    lexicon = train.model.phone_lexicon
    if lexicon is None:
        return [], 0
    if not Path(lexicon).exists():
        return [Finding("lexicon", f"{lexicon}: not there yet; stage data is to make it")], 40
    try:
        phones = Phones.load(lexicon)
    except SpeechtxError as err:
        return [Finding("lexicon", str(err), "correct model.intermediate_ctc.lexicon, or the file")], 40
    return [Finding("lexicon", f"{lexicon}: {len(phones)} phones")], len(phones)


def check_shapes(train: TrainConfig, fbank: FbankConfig) -> Iterator[Finding]:
    """Limits that would leave the model without a frame or a bin, and features that training cannot compute."""
    from speechtx.model.subsampling import min_frames

    front_end = train.model.encoder.subsampling
    shortest = min_frames(front_end.factor)
    if train.training.min_frames < shortest:
        yield Finding(
            "frames",
            f"training.min_frames {train.training.min_frames}, but subsampling needs {shortest} frames for one of its own",
            f"set training.min_frames to {shortest} or more",
        )
    if front_end.type != "conv1d" and fbank.num_mel_bins < shortest:
        yield Finding("features", f"num_mel_bins {fbank.num_mel_bins} vanish in subsampling", f"use {shortest} bins or more")
    if train.training.waveforms:
        from speechtx.frontend.fbank_torch import unsupported

        if problem := unsupported(fbank):
            yield Finding("features", f"training.waveforms: {problem}", "correct the configuration of the features")


def check_searches(train: TrainConfig, searches: dict[Path, list[DecodeConfig]]) -> Iterator[Finding]:
    """Searches that need a decoder or phones which the model will not have; one finding a file."""
    from speechtx.search.decode import method_problem

    decoder = train.model.decoder.type if train.model.decoder.layers else "none"
    for path, configs in searches.items():
        for config in configs:
            if problem := method_problem(config.method, decoder):
                yield Finding("decoding", f"{path}: {problem[0]}", problem[1])
                break
            if config.phone_weight and train.model.phone_lexicon is None:
                yield Finding(
                    "decoding",
                    f"{path}: phone_weight {config.phone_weight:g} needs a model that predicts phones, by a lexicon in "
                    "model.intermediate_ctc",
                    "leave it out, or name the others with --decode-config",
                )
                break
            if decoder == "none" and config.method == "beam" and config.ctc_weight != 1.0:
                yield Finding(
                    "decoding",
                    f"{path}: ctc_weight {config.ctc_weight} needs a decoder, but model.decoder.layers is 0",
                    "set ctc_weight: 1.0 or method: ctc_greedy there",
                )
                break


def check_weights(searches: dict[Path, list[DecodeConfig]], lm_config: Path | None) -> Iterator[Finding]:
    """Weights of language models that the recipe does not make."""
    from speechtx.config.lm import LmConfig
    from speechtx.config.load import load_config, locate

    try:
        made = load_config(lm_config, LmConfig) if lm_config else LmConfig()
    except SpeechtxError:
        return  # `check_language_models` tells
    for path, configs in searches.items():
        for key, sections in (("lm_weight", ("transformer",)), ("ngram_weight", ("ngram", "lexicon"))):
            weight = max(getattr(config, key) for config in configs)
            if weight and all(getattr(made, section) is None for section in sections):
                where = f"{lm_config} has no section {' or '.join(sections)}" if lm_config else "there is no conf/lm.yaml"
                advice = f"add a section {' or '.join(sections)} to conf/lm.yaml, or set {key} to 0 in {path}"
                yield Finding("decoding", f"{locate(path, key)}: {key} {weight} needs a language model, but {where}", advice)


def check_units(train: TrainConfig, fbank: FbankConfig, path: Path, overrides: Sequence[str]) -> Iterator[Finding]:
    """Lengths in milliseconds that the subsampling cannot express."""
    from speechtx.config.load import locate
    from speechtx.config.penalty import unit_problem

    frame_ms = train.model.encoder.subsampling.factor * fbank.frame_shift_ms
    problem = unit_problem(train.model.attention_penalty.encoder_self, frame_ms)
    if problem is not None:
        key = f"model.attention_penalty.encoder_self.{problem[0]}"
        yield Finding("units", f"{locate(path, key, overrides)}: {key} {problem[1]}", f"correct {path}, or the --set")


def check_tokenizer(train: TrainConfig, text: Path) -> Finding:
    """Whether the vocabulary can hold the characters of a training text that exists already."""
    characters: set[str] = set()
    with text.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            characters.update(*line.split()[1:])
    needed = len(characters) + 2 + len(train.tokenizer.user_symbols)  # <unk>, the word boundary
    size = train.tokenizer.vocab_size
    coverage = train.tokenizer.character_coverage
    if train.tokenizer.type != "char" and coverage == 1.0 and not train.tokenizer.byte_fallback and size < needed:
        advice = f"set tokenizer.vocab_size to {needed} or more, or lower tokenizer.character_coverage"
        return Finding("tokenizer", f"vocab_size {size} is below the {needed} symbols of {text}", advice)
    return Finding("tokenizer", f"{train.tokenizer.type}, {len(characters)} characters in {text}")


def check_language_models(path: Path, data: Path, train: TrainConfig | None) -> Iterator[Finding]:
    """The configuration of language models, their shapes, and whether the texts they name are there."""
    import torch

    from speechtx.config.lm import LmConfig
    from speechtx.config.load import load_config
    from speechtx.model.language_model import TransformerLM

    try:
        config = load_config(path, LmConfig)
    except SpeechtxError as err:
        yield Finding("config", str(err), f"correct {path}")
        return
    yield Finding("config", str(path))
    for section in (config.ngram, config.lexicon, config.transformer):
        for text in (*section.text, *getattr(section, "words", ())) if section else ():
            if not Path(text).exists() and data not in Path(text).parents:  # stage 1 may make what lies in data
                yield Finding("language model", f"{path}: {text}: no such file or data directory", "correct its path")
    shapes = [f"{config.ngram.order}-gram"] if config.ngram else []
    if config.lexicon:
        shapes.append(f"{config.lexicon.order}-gram of whole words" if config.lexicon.order else "list of whole words")
    if config.transformer:
        with torch.device("meta"):
            model = TransformerLM(config=config.transformer, vocab_size=train.tokenizer.vocab_size + 2 if train else 102)
        number = sum(parameter.numel() for parameter in model.parameters())
        shapes.append(f"Transformer of {config.transformer.layers} layers, about {number:,} parameters")
    if shapes:
        yield Finding("language model", " and a ".join(shapes))


def check_sclite() -> Finding:
    """NIST's sclite, not something else of that name."""
    from speechtx.scoring.sclite import find_sclite

    try:
        found = find_sclite()
        return Finding("sclite", f"{found.version}, {found.path}")
    except SpeechtxError as err:
        return Finding("sclite", str(err), "run tools/install_sctk.sh")


def check_paths(data: Path, exp: Path, archive: Path | None) -> Iterator[Finding]:
    """Folders that must be writable and files that must be readable."""
    blocked = [str(path) for path in (data, exp) if not _writable(path)]
    if blocked:
        yield Finding(
            "paths", f"cannot write to {' and '.join(blocked)}", "change the owner or mode of the folder, or give another --exp"
        )
    else:
        yield Finding("paths", f"{data} and {exp} are writable")
    if archive is not None:
        if archive.is_file() and os.access(archive, os.R_OK):
            yield Finding("archive", f"{archive}, {archive.stat().st_size / 1e6:.0f} MB")
        else:
            yield Finding("archive", f"{archive}: no such readable file", "give the path of the archive to --archive")


def _writable(path: Path) -> bool:
    """Whether `path`, or the nearest folder above it that exists, can be written to."""
    nearest = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    return nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)


def check_disk(data: Path, *, audio_gib: float, parameters: int, epochs_kept: int, copies: int = 1, ema: bool = False) -> Finding:
    """Free space against what the stages will write: the unpacked corpus, its features at each speed, checkpoints."""
    # 80 float32 bins at 100 frames a second are 32 kB/s, as much as 16-bit audio at 16 kHz: once for the audio, and once for each
    # speed. Checkpoints hold weights, two moments and perhaps a moving average, and there may be three at once.
    weights_gib = parameters * 4 / GIB
    needed = (1 + copies) * audio_gib + weights_gib * (3 * (3 + ema) + epochs_kept + 2)
    nearest = next(p for p in (data.absolute(), *data.absolute().parents) if p.exists())
    free = shutil.disk_usage(nearest).free / GIB
    message = f"{free:.1f} GiB free, about {needed:.1f} GiB needed"
    return Finding("disk", message, "" if free > needed else f"free some space on the file system of {nearest}")


def check_processors(nj: int, ngpu: int) -> Iterator[Finding]:
    """Jobs against processors, and the GPUs that were asked for."""
    import torch

    cores = len(os.sched_getaffinity(0))
    if nj < 1:
        yield Finding("jobs", f"--nj {nj}", "give --nj 1 or more")
    else:
        more = f"; {nj - cores} of them wait their turn on this machine" if nj > cores else ""
        yield Finding("jobs", f"{nj} jobs, {cores} processors{more}")
    if ngpu > 0:
        there = torch.cuda.device_count()
        if there < ngpu:
            how = "this PyTorch was built without CUDA" if torch.version.cuda is None else f"PyTorch sees {there} GPU(s)"
            yield Finding(
                "gpu", f"--ngpu {ngpu}, but {how}", "use --ngpu 0, or run tools/install.sh --cuda where nvidia-smi lists GPUs"
            )
        else:
            yield Finding("gpu", f"{ngpu} of {there} GPU(s): {torch.cuda.get_device_name(0)}")


def report(findings: list[Finding]) -> int:
    """Prints the table; returns the exit status."""
    width = max(len(finding.subject) for finding in findings)
    for finding in findings:
        first, *rest = finding.message.splitlines()
        print(f"  {finding.subject:<{width}}  {'PROBLEM' if finding.advice else 'ok':<7}  {first}")
        for line in rest:
            print(f"  {'':<{width}}           {line}")
        if finding.advice:
            print(f"  {'':<{width}}           what to do: {finding.advice}")
    problems = sum(bool(finding.advice) for finding in findings)
    if problems:
        sys.stdout.flush()
        print(f"speechtx check: {problems} problem(s) found; nothing was started", file=sys.stderr)
    return 1 if problems else 0
