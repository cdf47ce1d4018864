"""What decoding does when something is wrong: bad utterances stop no others, memory that runs out, jobs that are killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from test_decode import FBANK, decode, make_data, make_exp, recording, text_of
from test_decode_lm import make_lm

import speechtx
from speechtx.bin.main import main
from speechtx.config.errors import AudioError
from speechtx.config.load import dump_config
from speechtx.data.ark import ArkWriter
from speechtx.data.loader import FeatureReader
from speechtx.model.memory import is_out_of_memory
from speechtx.model.recognizer import Recognizer
from speechtx.search import memory
from speechtx.search.parts import only_one_job


@pytest.fixture(scope="module")
def exp(tmp_path_factory) -> Path:
    return make_exp(tmp_path_factory.mktemp("exp") / "asr")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "good", {f"utt{i}": recording(i, 0.4 + 0.1 * i) for i in range(5)})


@pytest.fixture(scope="module")
def good(exp, data, tmp_path_factory) -> dict[str, str]:
    """What the five good utterances decode to."""
    out = tmp_path_factory.mktemp("good") / "out"
    assert decode(exp, data, out) == 0
    return text_of(out)


def with_features(data: Path, path: Path, more: dict[str, np.ndarray]) -> Path:
    """A copy of a data directory with utterances whose features are given."""
    path.mkdir()
    with ArkWriter(ark=path / "more.ark", scp=path / "more.scp") as writer:
        for utt, feats in more.items():
            writer.write(utt, feats.astype(np.float32))
    rows = {
        "feats.scp": (path / "more.scp").read_text(),
        "utt2num_frames": "".join(f"{utt} {len(feats)}\n" for utt, feats in more.items()),
        "utt2spk": "".join(f"{utt} {utt}\n" for utt in more),
    }
    for name, text in rows.items():
        (path / name).write_text((data / name).read_text() + text)
    (path / "fbank.yaml").write_text(dump_config(FBANK))
    return path


def test_bad_utterances_are_named_with_the_cause_and_change_no_other(exp, data, good, tmp_path, capsys):
    bins = FBANK.num_mel_bins
    speech = np.random.default_rng(0).normal(size=(60, bins))
    nan, infinite = speech.copy(), speech.copy()
    nan[30, 3], infinite[10, 0] = 4321.0, 8765.0  # the writer refuses what they are to become
    bad = {"x_nan": nan, "x_inf": infinite, "x_30ms": speech[:1], "x_wide": np.ones((50, bins + 1))}
    silence = {"y_silence": np.full((80, bins), np.log(np.finfo(np.float32).eps)), "y_zero": np.zeros((40, bins))}
    broken = with_features(data, tmp_path / "data", bad | silence)
    ark = (broken / "more.ark").read_bytes()
    for marker, value in ((4321.0, np.nan), (8765.0, np.inf)):
        assert ark.count(np.float32(marker).tobytes()) == 1
        ark = ark.replace(np.float32(marker).tobytes(), np.float32(value).tobytes())
    (broken / "more.ark").write_bytes(ark)
    assert decode(exp, broken, tmp_path / "out") == 0
    text = text_of(tmp_path / "out")
    assert {utt: text[utt] for utt in good} == good
    failed = json.loads((tmp_path / "out" / "decode.json").read_text())["failed"]
    assert set(failed) == set(bad), "silence is no failure"
    assert all(word in failed[utt] for utt, word in (("x_30ms", "too short"), ("x_wide", "shape"), ("x_nan", "x_nan")))
    assert all(text[utt] == "" for utt in bad) and set(silence) <= set(text)
    printed = capsys.readouterr().out
    assert "4 utterance(s) could not be decoded" in printed and all(f"  {utt}: " in printed for utt in bad)


def test_failed_utterances_are_tried_again_and_the_others_are_not(exp, data, good, tmp_path, capsys):
    broken = with_features(data, tmp_path / "data", {})
    ark = Path((broken / "feats.scp").read_text().splitlines()[0].split()[1].rpartition(":")[0])
    aside = ark.with_suffix(".aside")
    ark.rename(aside)
    try:
        assert decode(exp, broken, tmp_path / "out") == 1
        assert "not one of 5 utterances" in capsys.readouterr().err
    finally:
        aside.rename(ark)
    assert decode(exp, broken, tmp_path / "out") == 0
    assert text_of(tmp_path / "out") == good
    assert "job 1: 5 utterances" in capsys.readouterr().out


@pytest.mark.parametrize("empty", ["feats.scp", "all"])
def test_an_empty_data_directory_is_an_error_not_an_empty_result(exp, tmp_path, capsys, empty):
    folder = tmp_path / "data"
    folder.mkdir()
    assert decode(exp, folder, tmp_path / "out") == 1
    assert str(folder) in capsys.readouterr().err
    for name in ("feats.scp", "utt2num_frames", "utt2spk"):
        (folder / name).write_text("")
    (folder / "fbank.yaml").write_text(dump_config(FBANK))
    assert decode(exp, folder, tmp_path / "out") == 1
    assert "feats.scp: " in capsys.readouterr().err and not (tmp_path / "out" / "text").exists()


def test_a_job_that_has_only_an_utterance_without_a_frame_says_why(exp, data, tmp_path, capsys):
    for name in ("feats.scp", "utt2spk"):
        (tmp_path / name).write_text((data / name).read_text().splitlines()[0] + "\n")
    (tmp_path / "utt2num_frames").write_text("utt0 0\n")
    (tmp_path / "fbank.yaml").write_text(dump_config(FBANK))
    assert decode(exp, tmp_path, tmp_path / "out") == 1
    assert "utt0: 0 frames are too short" in capsys.readouterr().err


def test_a_beam_larger_than_the_vocabulary_finds_at_least_as_much(exp, data, good, tmp_path):
    assert (
        main(["decode", "--exp", str(exp), "--data", str(data), "--out", str(tmp_path), "--set", "beam=50", "--set", "nbest=50"])
        == 0
    )
    for line in (tmp_path / "nbest.jsonl").read_text().splitlines():
        scores = [h["score"] for h in json.loads(line)["nbest"]]
        assert scores == sorted(scores, reverse=True) and len(scores) > 7
    assert set(text_of(tmp_path)) == set(good)


# --------------------------------------------------------------------------------------------------- memory


def full_memory(monkeypatch, *, utterances: int, frames: int) -> list[int]:
    """Batches of more than `utterances`, or with more than `frames` frames, find no memory; returns the sizes that were tried."""
    tried: list[int] = []
    encode = Recognizer.encode

    def encoding(self, feats, feat_lens, *, phones=None):
        tried.append(len(feats))
        if len(feats) > utterances or feats.shape[1] > frames:
            raise RuntimeError(
                "[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 64424509440 bytes."
            )
        return encode(self, feats, feat_lens, phones=phones)

    monkeypatch.setattr(Recognizer, "encode", encoding)
    return tried


def test_a_batch_that_does_not_fit_is_decoded_one_by_one_and_only_what_never_fits_fails(exp, data, good, tmp_path, monkeypatch):
    long = with_features(data, tmp_path / "data", {"x_long": np.random.default_rng(0).normal(size=(90, FBANK.num_mel_bins))})
    tried = full_memory(monkeypatch, utterances=1, frames=85)
    assert decode(exp, long, tmp_path / "out") == 0
    assert tried == [6, 1, 1, 1, 1, 1, 1]
    text = text_of(tmp_path / "out")
    assert {utt: text[utt] for utt in good} == good and text["x_long"] == ""
    failed = json.loads((tmp_path / "out" / "decode.json").read_text())["failed"]
    assert list(failed) == ["x_long"] and "90 frames (1 s) do not fit into memory (60.0 GiB at once)" in failed["x_long"]


def test_a_long_utterance_has_a_batch_of_its_own_and_makes_no_other_larger(exp, data, good, tmp_path, monkeypatch):
    long = with_features(data, tmp_path / "data", {"x_long": np.random.default_rng(0).normal(size=(900, FBANK.num_mel_bins))})
    tried = full_memory(monkeypatch, utterances=9, frames=9999)
    assert decode(exp, long, tmp_path / "out", "--set", "frames_per_batch=160") == 0
    assert tried == [1, 2, 2, 1]
    assert {utt: text for utt, text in text_of(tmp_path / "out").items() if utt != "x_long"} == good


def test_features_that_cannot_be_held_are_named_too(exp, data, good, tmp_path, monkeypatch):
    read = FeatureReader.__call__

    def reading(self, utterance):
        if utterance.id == "utt3":
            raise MemoryError
        return read(self, utterance)

    monkeypatch.setattr(FeatureReader, "__call__", reading)
    assert decode(exp, data, tmp_path / "out") == 0
    assert text_of(tmp_path / "out") == {**good, "utt3": ""}
    (error,) = json.loads((tmp_path / "out" / "decode.json").read_text())["failed"].values()
    assert "frames do not fit into memory" in error


def test_an_error_that_is_no_lack_of_memory_is_not_hidden(exp, data, tmp_path, monkeypatch):
    def broken(self, feats, feat_lens, *, phones=None):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(Recognizer, "encode", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        decode(exp, data, tmp_path / "out")


def test_a_recording_that_does_not_fit_into_memory_is_named(exp, data, monkeypatch):
    recognizer = speechtx.load_recognizer(exp, device="cpu")
    full_memory(monkeypatch, utterances=0, frames=0)
    with pytest.raises(AudioError, match=r"utt1.wav: \d+ feature frames do not fit into memory"):
        recognizer.transcribe(data / "utt1.wav")


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_more_memory_than_is_free_is_an_error_instead_of_a_kill(monkeypatch):
    monkeypatch.setattr(memory, "_available_bytes", lambda: 400 << 20)
    with memory.bounded_memory("cpu"):
        assert torch.ones(30 << 20, dtype=torch.uint8).sum() > 0
        with pytest.raises((RuntimeError, MemoryError)) as err:
            torch.empty(500 << 20, dtype=torch.uint8)
    assert is_out_of_memory(err.value) and memory.what_was_asked(err.value) == " (0.5 GiB at once)"
    torch.empty(500 << 20, dtype=torch.uint8)  # the limit went with the block
    assert not is_out_of_memory(RuntimeError("size mismatch"))
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB."))
    assert (
        memory.what_was_asked(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB.")) == " (2.50 GiB at once)"
    )


@pytest.mark.parametrize("version", [1, 2])
def test_a_group_whose_memory_is_full_of_cached_files_has_room_for_a_batch(tmp_path, version):
    if version == 2:
        mount, limit, used, total, membership = tmp_path, "memory.max", "memory.current", "", "0::/slurm/job_1\n"
    else:
        mount, limit, used, total = tmp_path / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        membership = "9:name=systemd:/\n4:memory,hugetlb:/slurm/job_1\n0::/\n"
    job = mount / "slurm" / "job_1"
    job.mkdir(parents=True)
    for folder, most, now, cached in ((job, "1000", "990", 700), (job.parent, "max" if version == 2 else str(1 << 62), "990", 0)):
        (folder / limit).write_text(most)
        (folder / used).write_text(now)
        (folder / "memory.stat").write_text(f"anon 200\n{total}inactive_file {cached - 90}\n{total}active_file 90\n")
    assert min(memory._left_in_groups(membership, tmp_path)) == 1000 - 990 + 700
    assert list(memory._left_in_groups("0::/elsewhere\n", tmp_path / "nothing")) == []


# ----------------------------------------------------------------------------------------------- being killed


def killed_midway(command: list[str], part: Path, lines: int) -> bytes:
    """Starts a command, kills it with SIGKILL once a part has that many lines, and returns what the part holds."""
    env = {**os.environ, "PYTHONPATH": str(Path(speechtx.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "speechtx.bin.main", *command], env=env, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            if part.read_bytes().count(b"\n") >= lines:
                break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    _, err = process.communicate()
    assert process.returncode == -signal.SIGKILL, err.decode()
    return part.read_bytes()


def test_a_job_killed_in_the_middle_with_language_models_continues_to_the_same_result(exp, tmp_path, capsys):
    ngram = make_lm(tmp_path / "lm", exp / "tokenizer", "c c a c c a")
    data = make_data(tmp_path / "data", {f"utt{i:02d}": recording(i, 0.3 + 0.01 * i) for i in range(30)})
    options = ["--exp", str(exp), "--data", str(data), "--ngram", str(ngram), "--set", "beam=8", "--set", "nbest=8"]
    options += ["--set", "ngram_weight=0.7", "--set", "frames_per_batch=40"]  # a batch is one utterance
    out = tmp_path / "out"
    before = killed_midway(["decode", *options, "--out", str(out)], out / "parts" / "1.jsonl", lines=4)
    kept = before[: before.rfind(b"\n") + 1]
    done = kept.count(b"\n") - 1
    assert 0 < done < 30
    assert main(["decode", *options, "--out", str(out)]) == 0
    assert f"job 1: {30 - done} utterances" in capsys.readouterr().out
    assert (out / "parts" / "1.jsonl").read_bytes().startswith(kept), "what was there stays as it was"
    assert main(["decode", *options, "--out", str(tmp_path / "whole")]) == 0
    assert (out / "nbest.jsonl").read_bytes() == (tmp_path / "whole" / "nbest.jsonl").read_bytes()


def test_a_job_that_a_killed_recipe_left_at_work_is_waited_for_instead_of_doubled(exp, data, good, tmp_path, caplog):
    out = tmp_path / "out"
    with ThreadPoolExecutor(1) as pool:
        with only_one_job(out, 1):
            second = pool.submit(decode, exp, data, out)
            deadline = time.monotonic() + 60
            while "another process is at job 1 here" not in caplog.text and time.monotonic() < deadline and not second.done():
                time.sleep(0.01)
            assert f"{out}: another process is at job 1 here" in caplog.text
            assert not second.done() and not (out / "parts").exists()
        assert second.result(timeout=60) == 0
    assert text_of(out) == good


def test_a_part_with_results_that_are_there_twice_is_mended_by_running_again(exp, data, good, tmp_path, capsys):
    out = tmp_path / "out"
    assert decode(exp, data, out) == 0
    part = out / "parts" / "1.jsonl"
    header, *lines = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(header + b"".join(lines + lines[:2]))
    assert main(["decode", "--merge", "--data", str(data), "--out", str(out)]) == 1
    assert "2 utterance(s) were decoded twice" in capsys.readouterr().err
    assert decode(exp, data, out) == 0
    assert text_of(out) == good and part.read_bytes() == header + b"".join(lines)


def test_a_killed_tuning_keeps_what_it_decoded_and_chooses_the_same(exp, tmp_path, capsys):
    data = make_data(tmp_path / "data", {f"utt{i:02d}": recording(i, 0.3 + 0.01 * i) for i in range(16)})
    (data / "text").write_text("".join(f"utt{i:02d} ab\n" for i in range(16)))
    (tmp_path / "decode.yaml").write_text("beam: 4\nframes_per_batch: 40\n")
    (tmp_path / "tune.yaml").write_text("ctc_weight: [0.2, 0.5]\nlength_bonus: [0.0, 1.0]\n")
    options = ["--config", str(tmp_path / "decode.yaml"), "--grid", str(tmp_path / "tune.yaml"), "--unit", "cer"]
    command = ["tune", "--exp", str(exp), "--data", str(data), *options]
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    (some, *_) = (tmp_path / "whole" / "points").iterdir()
    out = tmp_path / "out"
    before = killed_midway([*command, "--out", str(out)], out / "points" / some.name / "parts" / "1.jsonl", lines=4)
    capsys.readouterr()
    assert main([*command, "--out", str(out)]) == 0
    (count,) = [int(line.split()[2]) for line in capsys.readouterr().out.splitlines() if line.startswith("job 1:")]
    assert 0 < count < 4 * 16 and before.count(b"\n") > 3
    tuned = [(folder / "tuned.yaml").read_text() for folder in (out, tmp_path / "whole")]
    assert tuned[0] == tuned[1]
