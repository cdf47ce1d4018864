"""Stage 2 on small data directories: what is bad is named and left out, what is left agrees, and too little is a failure."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from speechtx.bin.main import main
from speechtx.config.errors import DataError
from speechtx.config.load import load_config
from speechtx.config.schema import FbankConfig
from speechtx.data.ark import read_matrix, read_scp
from speechtx.data.features import Source, compute_cmvn, extract_shard, merge_shards, read_sources, shard
from speechtx.data.kaldi_table import read_table
from speechtx.frontend.cmvn import CmvnStats
from speechtx.frontend.fbank import Fbank

CONFIG = FbankConfig(num_mel_bins=20)


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.3, 0.3, round(16000 * seconds)).astype(np.float32)


def make_data(directory: Path, num_utterances: int = 6, speakers: int = 2) -> Path:
    """`num_utterances` recordings of 0.1, 0.12, ... s."""
    data = directory / "data"
    data.mkdir()
    wavs, utt2spk = [], []
    for i in range(num_utterances):
        utterance = f"s{i * speakers // num_utterances}-u{i:02d}"
        soundfile.write(directory / f"{utterance}.wav", noise(0.1 + 0.02 * i, i), 16000)
        wavs.append(f"{utterance} {directory}/{utterance}.wav\n")
        utt2spk.append(f"{utterance} {utterance[:2]}\n")
    (data / "wav.scp").write_text("".join(wavs))
    (data / "utt2spk").write_text("".join(utt2spk))
    return data


def extract(data: Path, num_jobs: int = 2) -> None:
    (data / "fbank").mkdir(exist_ok=True)
    for job in range(1, num_jobs + 1):
        base = f"{data}/fbank/feats.{job}"
        extract_shard(shard(read_sources(data), job, num_jobs), config=CONFIG, ark=f"{base}.ark", scp=f"{base}.scp")


def features(data: Path) -> dict[str, np.ndarray]:
    return {key: read_matrix(location) for key, location in read_scp(data / "feats.scp").items()}


def test_tables_agree_with_each_other_and_with_the_features(tmp_path: Path) -> None:
    data = make_data(tmp_path)
    extract(data)
    result = merge_shards(data, config=CONFIG, num_jobs=2)
    feats, frames, seconds = features(data), read_table(data / "utt2num_frames"), read_table(data / "utt2dur")
    assert list(feats) == list(frames) == list(seconds) == sorted(read_table(data / "wav.scp"))
    assert {key: str(len(matrix)) for key, matrix in feats.items()} == frames
    assert seconds["s0-u01"] == "0.120"
    assert (result.utterances, result.skipped) == (6, {})
    assert result.frames == sum(map(len, feats.values()))
    assert load_config(data / "fbank.yaml", FbankConfig) == CONFIG
    expected = Fbank(config=CONFIG)(soundfile.read(tmp_path / "s1-u05.wav", dtype="float32")[0])
    assert np.array_equal(feats["s1-u05"], expected)


def test_the_number_of_jobs_changes_nothing(tmp_path: Path) -> None:
    data = make_data(tmp_path)
    results = []
    for num_jobs in (1, 4):
        extract(data, num_jobs)
        merge_shards(data, config=CONFIG, num_jobs=num_jobs)
        results.append(features(data))
    assert list(results[0]) == list(results[1])
    assert all(np.array_equal(results[0][key], results[1][key]) for key in results[0])


@given(num_sources=st.integers(0, 50), num_jobs=st.integers(1, 60))
def test_shards_are_contiguous_even_and_lose_nothing(num_sources: int, num_jobs: int) -> None:
    sources = [Source(str(i), "", 0.0, None, 1.0) for i in range(num_sources)]
    shards = [shard(sources, job, num_jobs) for job in range(1, num_jobs + 1)]
    assert [source for piece in shards for source in piece] == sources
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@pytest.mark.parametrize("job", [0, 3])
def test_a_job_that_does_not_exist_is_refused(job: int) -> None:
    with pytest.raises(DataError, match=f"job {job} of 2"):
        shard([], job, 2)


def test_segments_and_speeds_are_honoured(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    samples = noise(2.0)
    soundfile.write(tmp_path / "long.wav", samples, 16000)
    (data / "wav.scp").write_text(f"rec {tmp_path}/long.wav\n")
    (data / "segments").write_text("u-b rec 1.0 -1\nu-a rec 0.25 0.75\n")
    (data / "utt2spk").write_text("u-a u\nu-b u\n")
    (data / "utt2speed").write_text("u-b 1.1\n")
    extract(data, 1)
    merge_shards(data, config=CONFIG, num_jobs=1)
    assert read_table(data / "utt2dur") == {"u-a": "0.500", "u-b": f"{1 / 1.1:.3f}"}
    stored = soundfile.read(tmp_path / "long.wav", dtype="float32")[0]
    assert np.array_equal(features(data)["u-a"], Fbank(config=CONFIG)(stored[4000:12000]))


BREAK: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda p: p.unlink(), "No such file"),
    "empty": (lambda p: p.write_bytes(b""), "the file is empty"),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-200]), "truncated"),
    "corrupt": (lambda p: p.write_bytes(bytes(1000)), "not an audio file"),
    "too short": (lambda p: soundfile.write(p, noise(0.02), 16000), "less than one frame"),
    "wrong rate": (lambda p: soundfile.write(p, noise(0.2), 8000), "8000 Hz"),
    "stereo": (lambda p: soundfile.write(p, noise(0.2).reshape(-1, 2), 16000), "2 channels"),
    "nan": (lambda p: soundfile.write(p, noise(0.2) * np.nan, 16000, subtype="FLOAT"), "NaN"),
}


@pytest.mark.parametrize("fault", BREAK)
def test_one_bad_recording_is_named_with_its_cause_and_left_out_everywhere(
    tmp_path: Path, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_data(tmp_path, 21)
    damage, cause = BREAK[fault]
    damage(tmp_path / "s0-u03.wav")
    (data / "text").write_text("".join(f"{key} WORD\n" for key in read_table(data / "wav.scp")))
    extract(data)
    result = merge_shards(data, config=CONFIG, num_jobs=2)
    assert list(result.skipped) == ["s0-u03"]
    for message in (result.skipped["s0-u03"], read_table(data / "fbank" / "skipped.txt")["s0-u03"], capsys.readouterr().err):
        assert "s0-u03.wav" in message
        assert cause in message
    for table in ("feats.scp", "utt2num_frames", "utt2dur"):
        assert len(read_table(data / table)) == 20
        assert "s0-u03" not in read_table(data / table)
    assert len(read_table(data / "text")) == 21  # what people wrote is left alone


def test_less_than_95_per_cent_fails_and_writes_no_table(tmp_path: Path) -> None:
    data = make_data(tmp_path, 19)
    (tmp_path / "s0-u03.wav").unlink()
    extract(data)
    with pytest.raises(DataError, match=r"only 18 of 19 utterances, less than 95%(.|\n)*s0-u03.wav: cannot be read"):
        merge_shards(data, config=CONFIG, num_jobs=2)
    assert not (data / "feats.scp").exists()
    assert list(read_table(data / "fbank" / "skipped.txt")) == ["s0-u03"]


def test_a_shard_that_never_finished_is_an_error(tmp_path: Path) -> None:
    data = make_data(tmp_path)
    extract(data)
    (data / "fbank" / "feats.2.scp").unlink()
    with pytest.raises(DataError, match=r"feats.2.scp"):
        merge_shards(data, config=CONFIG, num_jobs=2)


def test_shards_of_another_number_of_jobs_are_not_mixed(tmp_path: Path) -> None:
    data = make_data(tmp_path)
    extract(data, 3)
    with pytest.raises(DataError, match="2 utterances differ"):
        merge_shards(data, config=CONFIG, num_jobs=2)


@pytest.mark.parametrize(
    ("table", "content", "why"),
    [
        ("wav.scp", "a touch ran; cat x.wav |\n", r"wav.scp: a: a command .*--allow-pipes"),
        ("segments", "a nowhere 0 1\n", "recording nowhere is not in"),
        ("utt2speed", "s0-u00 fast\n", "'fast' is not a number"),
        ("wav.scp", "", "holds no utterance"),
    ],
)
def test_tables_that_cannot_be_meant_stop_the_stage_at_once(tmp_path: Path, table: str, content: str, why: str) -> None:
    data = make_data(tmp_path)
    (data / table).write_text(content)
    with pytest.raises(DataError, match=why):
        read_sources(data)


def test_cmvn_by_speaker_adds_up_to_cmvn_of_the_whole(tmp_path: Path) -> None:
    data = make_data(tmp_path)
    extract(data)
    merge_shards(data, config=CONFIG, num_jobs=2)
    whole, num_speakers = compute_cmvn(data)
    assert num_speakers == 2
    feats = features(data)
    expected = CmvnStats.from_feats(np.concatenate(list(feats.values()))).to_matrix()
    stored = read_matrix(str(data / "global_cmvn.ark"), dtype=np.float64)
    assert stored.dtype == np.float64
    np.testing.assert_allclose(stored, expected, rtol=1e-12)
    assert np.array_equal(whole.to_matrix(), stored)
    speakers = {key: read_matrix(location, dtype=np.float64) for key, location in read_scp(data / "cmvn.scp").items()}
    assert list(speakers) == ["s0", "s1"]
    np.testing.assert_allclose(speakers["s0"] + speakers["s1"], stored, rtol=1e-12)
    own = CmvnStats.from_feats(np.concatenate([m for key, m in feats.items() if key.startswith("s1")]))
    np.testing.assert_allclose(speakers["s1"], own.to_matrix(), rtol=1e-12)


def test_cmvn_names_an_utterance_without_speaker(tmp_path: Path) -> None:
    data = make_data(tmp_path)
    extract(data)
    merge_shards(data, config=CONFIG, num_jobs=2)
    (data / "utt2spk").write_text("s0-u00 s0\n")
    with pytest.raises(DataError, match=r"s0-u01 of feats.scp has no speaker"):
        compute_cmvn(data)


@pytest.mark.parametrize("ark_backend", ["kaldiio", "kaldi_native_io"])
@pytest.mark.parametrize("backend", ["kaldi-native-fbank", "torchaudio"])
def test_the_verb_gives_the_same_features_with_every_library(
    tmp_path: Path, backend: str, ark_backend: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPEECHTX_ARK_BACKEND", ark_backend)
    if ark_backend == "kaldi_native_io":
        monkeypatch.setitem(sys.modules, "kaldiio", None)  # importing it now fails: nothing may need it
    data = make_data(tmp_path)
    extract(data, 1)
    plain = {key: read_matrix(location) for key, location in read_scp(data / "fbank" / "feats.1.scp").items()}
    flags = ["--data", str(data), "--set", "num_mel_bins=20", "--backend", backend]
    assert main(["fbank", *flags, "--compress"]) == 0
    assert "6 of 6 utterances" in capsys.readouterr().out
    assert main(["fbank", *flags, "--merge"]) == 0
    assert "6 of 6 utterances" in capsys.readouterr().out
    assert main(["cmvn", "--data", str(data)]) == 0
    assert "2 speakers" in capsys.readouterr().out
    for key, matrix in features(data).items():
        assert np.abs(matrix - plain[key]).max() < 0.2  # compressed


def test_one_output_without_the_other_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fbank", "--data", str(make_data(tmp_path)), "--out-ark", str(tmp_path / "f.ark")]) == 1
    assert "--out-ark and --out-scp go together" in capsys.readouterr().err


@pytest.fixture
def step(repo: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        command = [str(repo / "utils" / "steps" / "fbank.sh"), *map(str, arguments)]
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)

    return run


def test_the_step_makes_a_complete_directory_and_stale_tables_vanish_when_it_fails(
    tmp_path: Path, step: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    data = make_data(tmp_path)
    (tmp_path / "fbank.yaml").write_text("num_mel_bins: 20\n")
    done = step("--nj", 2, "--config", "fbank.yaml", "data", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "6 of 6 utterances" in done.stdout
    assert "\r" not in done.stderr  # no live line outside a terminal
    tables = {"feats.scp", "utt2num_frames", "utt2dur", "cmvn.scp", "global_cmvn.ark", "fbank.yaml"}
    assert tables <= {path.name for path in data.iterdir()}
    assert {path.name for path in (data / "fbank").iterdir()} == {"feats.1.ark", "feats.2.ark", "cmvn.ark", "skipped.txt", "log"}
    for path in tmp_path.glob("s0*.wav"):
        path.unlink()
    failed = step("--nj", 2, "--config", "fbank.yaml", "data", cwd=tmp_path)
    assert failed.returncode == 1
    assert "only 3 of 6 utterances" in failed.stderr
    assert not tables & {path.name for path in data.iterdir()}


def test_the_step_says_what_is_missing(tmp_path: Path, step: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    nothing = step("nowhere", cwd=tmp_path)
    assert nothing.returncode == 1
    assert "no such file: conf/fbank.yaml" in nothing.stderr
    assert step(cwd=tmp_path).returncode == 2
    typo = step("--njj", 3, "data", cwd=tmp_path)
    assert typo.returncode == 2
    assert "did you mean --nj?" in typo.stderr
