"""A made-up corpus that a tiny model can learn in seconds: each token is a pattern of mel bins."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from speechtx.config.load import dump_config, parse_config
from speechtx.config.schema import FbankConfig, TokenizerConfig, TrainConfig
from speechtx.data.ark import ArkWriter
from speechtx.data.manifest import load_manifest
from speechtx.frontend.cmvn import CmvnStats
from speechtx.text.tokenizer import train_tokenizer
from speechtx.training.prepare import TrainingData

BINS = 12
LETTERS = "ABCDE"
TINY = """\
tokenizer: {type: char}
model:
  encoder: {layers: 1, dim: 16, heads: 2, ff_dim: 32, dropout: 0.1, subsampling: {channels: 4}}
  decoder: {layers: 1, heads: 2, ff_dim: 32}
  attention_penalty: {encoder_self: {shape: log}}
training:
  epochs: 2
  frames_per_batch: 400
  max_frames: 400
  optimizer: {lr: 5e-3}
  schedule: {warmup_steps: 5}
  average: {num: 2}
  loader_workers: 0
"""

# Every option of regularisation that draws random numbers or keeps a state of its own.
REGULARISERS = [
    "training.consistency.weight=0.2",
    "training.consistency.decoder_weight=0.5",
    "model.decoder.input_noise=0.1",
    "model.encoder.layers=3",
    "model.encoder.stochastic_depth=0.5",
    "model.intermediate_ctc.layers=[1]",
    "model.intermediate_ctc.condition=true",
    "training.ema.decay=0.8",
    "training.perturb.tempo=0.2",
    "training.perturb.vtlp=0.1",
    "training.perturb.volume_db=3",
    "training.perturb.noise.probability=0.5",
    "training.specaugment.frames_per_time_mask=30",
]


# And those that read files, to be made by `write_lexicon` and `write_words`.
WORDS_AND_PHONES = ["model.encoder.layers=2", "model.intermediate_ctc.layers=[1]", "training.perturb.tempo=0.2"]


def tiny_config(*overrides: str) -> TrainConfig:
    return parse_config(TINY, TrainConfig, overrides)


def write_data_dir(path: Path, *, num: int, seed: int) -> None:
    """A data directory after stage 2 with `num` utterances of 3 to 5 letters, about 24 frames a letter."""
    rng = np.random.default_rng(seed)
    patterns = np.random.default_rng(0).normal(size=(len(LETTERS), BINS)).astype(np.float32)
    path.mkdir(parents=True)
    rows: dict[str, list[str]] = {"text": [], "utt2spk": [], "utt2num_frames": []}
    speakers: dict[str, CmvnStats] = {}
    with ArkWriter(ark=path / "feats.ark", scp=path / "feats.scp") as writer:
        for number in range(num):
            letters = rng.choice(list(LETTERS), size=rng.integers(3, 6))
            frames = [np.repeat(patterns[[LETTERS.index(c)]], rng.integers(20, 28), axis=0) for c in letters]
            feats = np.concatenate(frames) + rng.normal(scale=0.3, size=(sum(map(len, frames)), BINS)).astype(np.float32)
            speaker = f"s{number % 2}"
            key = f"{speaker}-{number:03d}"
            writer.write(key, feats.astype(np.float32))
            stats = CmvnStats.from_feats(feats)
            speakers[speaker] = speakers[speaker] + stats if speaker in speakers else stats
            rows["text"].append(f"{key} {' '.join(letters)}")
            rows["utt2spk"].append(f"{key} {speaker}")
            rows["utt2num_frames"].append(f"{key} {len(feats)}")
    for name in [*rows, "feats.scp"]:
        lines = rows.get(name) or (path / name).read_text().splitlines()
        (path / name).write_text("".join(line + "\n" for line in sorted(lines)))
    with ArkWriter(ark=path / "cmvn.ark", scp=path / "cmvn.scp") as writer:
        for speaker in sorted(speakers):
            writer.write(speaker, speakers[speaker].to_matrix())
    total = sum(list(speakers.values())[1:], start=next(iter(speakers.values())))
    with ArkWriter(ark=path / "global_cmvn.ark", scp=path / "global_cmvn.scp") as writer:
        writer.write("global", total.to_matrix())
    (path / "fbank.yaml").write_text(dump_config(FbankConfig(num_mel_bins=BINS)))


def write_words(data_dir: Path, words: Path) -> Path:
    """What `speechtx align` writes, with every word cut where the toy corpus may have put it: equal shares are near enough."""
    words.mkdir()
    tables: dict[str, list[str]] = {"segments": [], "text": [], "utt2spk": []}
    for utterance in load_manifest(data_dir):
        letters = utterance.text.split()
        cuts = [round(utterance.num_frames * i / len(letters)) / 100 for i in range(len(letters) + 1)]
        for i, letter in enumerate(letters):
            key = f"{utterance.id}-{i:03d}-{i + 1:03d}"
            tables["segments"].append(f"{key} {utterance.id} {cuts[i]:.3f} {cuts[i + 1]:.3f}")
            tables["text"].append(f"{key} {letter}")
            tables["utt2spk"].append(f"{key} {utterance.speaker}")
    for name, lines in tables.items():
        (words / name).write_text("".join(line + "\n" for line in sorted(lines)))
    return words


def write_lexicon(path: Path) -> Path:
    """Two phones a letter, one of which it shares with others."""
    path.write_text("".join(f"{letter} P{i % 2} Q{i}\n" for i, letter in enumerate(LETTERS)))
    return path


def make_training_data(root: Path, *, num_train: int = 24, num_dev: int = 6) -> TrainingData:
    """Train and dev directories and a character tokenizer under `root`."""
    write_data_dir(root / "train", num=num_train, seed=1)
    write_data_dir(root / "dev", num=num_dev, seed=2)
    texts = [line.split(" ", 1)[1] for line in (root / "train" / "text").read_text().splitlines()]
    train_tokenizer(texts, config=TokenizerConfig(type="char"), out_dir=root / "tokenizer")
    return TrainingData(train=root / "train", dev=root / "dev", tokenizer=root / "tokenizer")
