"""Training from waveforms: the same batches, draws and losses as from stored features, and no option silently dropped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from test_training import Killed, history, kill_after, weights
from toy_corpus import tiny_config

from speechtx.config.errors import ConfigError, DataError
from speechtx.config.load import dump_config
from speechtx.config.schema import FbankConfig, TokenizerConfig, TrainConfig
from speechtx.data.features import compute_cmvn, extract_shard, merge_shards, read_sources
from speechtx.data.kaldi_dir_fix import fix_data_dir
from speechtx.text.tokenizer import train_tokenizer
from speechtx.training import trainer as trainer_module
from speechtx.training.checkpoint import load_checkpoint
from speechtx.training.prepare import TrainingData, build_corpora, check_features_agree, lay_out_experiment
from speechtx.training.train import train

LETTERS = "ABCDE"
FBANK = FbankConfig(sample_rate=8000, num_mel_bins=20)
CPU = torch.device("cpu")
VIEWS = "training.consistency.weight=0.2"


def write_recordings(path: Path, *, num: int, seed: int) -> None:
    """A data directory before stage 2: recordings of two utterances each (each letter is a chord), some of them perturbed."""
    rng = np.random.default_rng(seed)
    path.mkdir(parents=True)
    rows: dict[str, list[str]] = {name: [] for name in ("wav.scp", "segments", "text", "utt2spk", "utt2speed")}
    for number in range(num):
        recording, pieces, at = f"s{number % 2}-tape{number:02d}", [], 0.0
        for part in range(2):
            key = f"{recording}-{part}"
            letters = rng.choice(list(LETTERS), size=rng.integers(3, 6))
            t = np.arange(1600) / 8000
            chords = [np.sin(2 * np.pi * (300 + 500 * LETTERS.index(c)) * t) + np.sin(2 * np.pi * 700 * t) for c in letters]
            wave = 0.1 * np.concatenate(chords) + rng.normal(scale=0.02, size=1600 * len(letters))
            rows["segments"].append(f"{key} {recording} {at:.2f} {at + len(wave) / 8000:.2f}")
            rows["text"].append(f"{key} {' '.join(letters)}")
            rows["utt2spk"].append(f"{key} s{number % 2}")
            rows["utt2speed"].append(f"{key} {('1.0', '0.9', '1.1')[number % 3]}")
            pieces.append(wave)
            at += len(wave) / 8000
        soundfile.write(path / f"{recording}.wav", np.concatenate(pieces), 8000, subtype="PCM_16")
        rows["wav.scp"].append(f"{recording} {path / recording}.wav")
    for name, lines in rows.items():
        (path / name).write_text("".join(line + "\n" for line in sorted(lines)))
    fix_data_dir(path)


def run_stage_fbank(path: Path, fbank: FbankConfig = FBANK) -> None:
    (path / "fbank").mkdir(exist_ok=True)
    ark, scp = path / "fbank" / "feats.1.ark", path / "fbank" / "feats.1.scp"
    extract_shard(read_sources(path), config=fbank, ark=ark, scp=scp)
    merge_shards(path, config=fbank, num_jobs=1)
    compute_cmvn(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    root = tmp_path_factory.mktemp("recordings")
    for name, num, seed in (("train", 12, 1), ("dev", 2, 2)):
        write_recordings(root / name, num=num, seed=seed)
        run_stage_fbank(root / name)
    texts = [line.split(" ", 1)[1] for line in (root / "train" / "text").read_text().splitlines()]
    train_tokenizer(texts, config=TokenizerConfig(type="char"), out_dir=root / "tokenizer")
    return TrainingData(train=root / "train", dev=root / "dev", tokenizer=root / "tokenizer")


def config_of(waveforms: bool, *overrides: str) -> TrainConfig:
    return tiny_config(f"training.waveforms={str(waveforms).lower()}", *overrides)


def corpora(data: TrainingData, exp: Path, config: TrainConfig):
    exp.mkdir(exist_ok=True)
    lay_out_experiment(exp, config, check_features_agree(data), data)
    return build_corpora(exp, data, config)


OPTIONS = {
    "stage 2's defaults": [],
    "speaker's statistics": ["features.cmvn=speaker"],
    "the utterance's statistics": ["features.cmvn=utterance"],
    "means alone": ["features.cmvn=speaker", "features.norm_vars=false"],
    "no normalisation": ["features.cmvn=none"],
    "no augmentation": ["training.specaugment=null"],
    "no time warp": ["training.specaugment.time_warp=0"],
    "two views": [VIEWS, "training.specaugment.frames_per_time_mask=30"],
}


@pytest.mark.parametrize("name", OPTIONS)
def test_batches_are_those_of_stored_features_with_the_same_draws(name: str, data: TrainingData, tmp_path: Path) -> None:
    pairs = []
    for waveforms in (False, True):
        corpus, _, _ = corpora(data, tmp_path / str(waveforms), config_of(waveforms, *OPTIONS[name]))
        pairs.append([batch.to(CPU) for epoch in (1, 2) for batch in corpus.at_epoch(epoch).batches([[0, 5, 3], [7, 2]])])
    for stored, computed in zip(*pairs, strict=True):
        assert stored.ids == computed.ids
        for field in ("feat_lens", "tokens", "token_lens"):
            assert torch.equal(getattr(stored, field), getattr(computed, field))
        assert computed.feats.dtype == torch.float32
        assert torch.equal(stored.feats == 0, computed.feats == 0)  # masks and padding
        torch.testing.assert_close(stored.feats, computed.feats, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("overrides", [[], [VIEWS, "features.cmvn=utterance"]])
def test_losses_of_the_first_steps_are_those_of_stored_features(
    overrides: list[str], data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: dict[bool, list[float]] = {}
    book = trainer_module.Trainer.book
    for waveforms in (False, True):
        seen = losses.setdefault(waveforms, [])

        def watched(self, outcome, seen=seen):
            seen.append(float(outcome.sums[0] / outcome.sums[3]))
            book(self, outcome)

        monkeypatch.setattr(trainer_module.Trainer, "book", watched)
        train(config_of(waveforms, *overrides), data, tmp_path / f"exp{waveforms}")
    assert len(losses[True]) == len(losses[False]) >= 10
    np.testing.assert_allclose(losses[True][:8], losses[False][:8], atol=1e-4, rtol=0)
    assert losses[True] != losses[False]  # else they did not come from waveforms


def test_a_killed_training_continues_bit_for_bit_and_workers_change_nothing(
    data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config_of(True), data, tmp_path / "whole")
    with monkeypatch.context() as context:
        kill_after(context, steps=4)
        context.setattr(trainer_module.time, "monotonic", iter(range(0, 100_000, 1000)).__next__)  # a checkpoint at every step
        with pytest.raises(Killed):
            train(config_of(True), data, tmp_path / "killed")
    state = load_checkpoint(tmp_path / "killed" / "checkpoints")
    assert state is not None and state["index"] > 0, "it was to be killed inside an epoch"
    train(config_of(True, "training.loader_workers=2"), data, tmp_path / "killed")
    whole, continued = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(whole[name], continued[name]) for name in whole)
    for one, other in zip(history(tmp_path / "whole"), history(tmp_path / "killed"), strict=True):
        assert one["train"] == other["train"]


def test_stored_archives_of_the_training_set_may_be_gone(data: TrainingData, tmp_path: Path) -> None:
    changed = tmp_path / "train"
    changed.mkdir()
    for path in data.train.iterdir():
        if path.is_file():
            (changed / path.name).write_bytes(path.read_bytes())
    scp = (changed / "feats.scp").read_text().replace(str(data.train), str(changed))
    (changed / "feats.scp").write_text(scp)  # points to archives that are not there
    moved = TrainingData(train=changed, dev=data.dev, tokenizer=data.tokenizer)
    train(config_of(True, "training.epochs=1"), moved, tmp_path / "exp")
    with pytest.raises(DataError):
        train(config_of(False, "training.epochs=1"), moved, tmp_path / "other")


# ------------------------------------------------------------------------------------------------ refused


def test_feature_space_noise_is_refused_and_not_ignored() -> None:
    with pytest.raises(ConfigError, match="waveforms: true"):
        config_of(True, "training.perturb.vtlp=0.1")


def altered(data: TrainingData, to: Path) -> TrainingData:
    """The same data with tables of its own, to be broken."""
    to.mkdir()
    for path in data.train.iterdir():
        if path.is_file() and path.suffix != ".wav":
            (to / path.name).write_bytes(path.read_bytes())
    return TrainingData(train=to, dev=data.dev, tokenizer=data.tokenizer)


def test_audio_that_changed_since_stage_fbank_is_named(data: TrainingData, tmp_path: Path) -> None:
    broken = altered(data, tmp_path / "train")
    segments = (broken.train / "segments").read_text().splitlines()
    key, recording, start, _ = segments[0].split()
    (broken.train / "segments").write_text("\n".join([f"{key} {recording} {start} 0.3", *segments[1:]]) + "\n")
    with pytest.raises(DataError, match=rf"utterance {key} .*utt2num_frames says .* run stage fbank again"):
        train(config_of(True), broken, tmp_path / "exp")


def test_audio_that_is_missing_is_named_with_its_utterance(data: TrainingData, tmp_path: Path) -> None:
    broken = altered(data, tmp_path / "train")
    wavs = (broken.train / "wav.scp").read_text()
    (broken.train / "wav.scp").write_text(wavs.replace("s0-tape00.wav", "nowhere.wav"))
    with pytest.raises(DataError, match=r"utterance s0-tape00-\d: .*nowhere\.wav: cannot be read"):
        train(config_of(True), broken, tmp_path / "exp")
    (broken.train / "segments").write_text(
        "".join(line for line in (data.train / "segments").open() if not line.startswith("s1-tape01-0 "))
    )
    with pytest.raises(DataError, match=r"utterance s1-tape01-0 of feats\.scp has no audio"):
        train(config_of(True), broken, tmp_path / "exp2")


def test_commands_in_wav_scp_never_run_in_training(data: TrainingData, tmp_path: Path) -> None:
    broken = altered(data, tmp_path / "train")
    wavs = (broken.train / "wav.scp").read_text().splitlines()
    key, audio = wavs[0].split(" ", 1)
    (broken.train / "wav.scp").write_text("\n".join([f"{key} touch {tmp_path}/ran; cat {audio} |", *wavs[1:]]) + "\n")
    with pytest.raises(DataError, match=r"a command .*training\.waveforms"):
        train(config_of(True), broken, tmp_path / "exp")
    assert not (tmp_path / "ran").exists()


def test_dithered_features_are_refused(data: TrainingData, tmp_path: Path) -> None:
    broken = altered(data, tmp_path / "train")
    dithered = FBANK.model_copy(update={"dither": 1.0})
    dev = tmp_path / "dev"
    altered(TrainingData(train=data.dev, dev=data.dev, tokenizer=data.tokenizer), dev)
    for directory in (broken.train, dev):
        (directory / "fbank.yaml").write_text(dump_config(dithered))
    with pytest.raises(ConfigError, match=r"training\.waveforms: dither 1\.0"):
        train(config_of(True), TrainingData(train=broken.train, dev=dev, tokenizer=data.tokenizer), tmp_path / "exp")
