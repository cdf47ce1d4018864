"""The verbs decode and transcribe, on a whole experiment directory with a random model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import speechtx
from speechtx.bin.main import main
from speechtx.config.decode import DecodeConfig
from speechtx.config.errors import AudioError, ConfigError
from speechtx.config.load import dump_config, load_config
from speechtx.config.penalty import PenaltyConfig
from speechtx.config.schema import (
    DecoderConfig,
    EncoderConfig,
    FbankConfig,
    FeaturesConfig,
    ModelConfig,
    SubsamplingConfig,
    TokenizerConfig,
    TrainConfig,
)
from speechtx.data.ark import ArkWriter
from speechtx.experiment.experiment import Experiment
from speechtx.frontend.cmvn import CmvnStats
from speechtx.frontend.fbank import Fbank
from speechtx.search.hypothesis import Hypothesis
from speechtx.text.tokenizer import train_tokenizer

FBANK = FbankConfig(num_mel_bins=20)
MODEL = ModelConfig(
    encoder=EncoderConfig(layers=1, dim=16, heads=2, ff_dim=32, subsampling=SubsamplingConfig(channels=4)),
    decoder=DecoderConfig(layers=1, heads=2, ff_dim=32),
)


def recording(seed: int, seconds: float, rate: int = 16000) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.round(rng.uniform(-0.5, 0.5, int(seconds * rate)) * 32768).astype(np.int16)


def make_exp(path: Path, *, cmvn: str = "global") -> Path:
    (path / "tokenizer").mkdir(parents=True)
    tokenizer = train_tokenizer(["ab ba", "b a c", "cab"], config=TokenizerConfig(type="char"), out_dir=path / "tokenizer")
    config = TrainConfig(model=MODEL, features=FeaturesConfig(cmvn=cmvn))
    (path / "config.yaml").write_text(dump_config(config))
    (path / "fbank.yaml").write_text(dump_config(FBANK))
    stats = CmvnStats.from_feats(Fbank(config=FBANK)(recording(99, 2.0) / np.float32(32768)))
    with ArkWriter(ark=path / "global_cmvn.ark", scp=path / "global_cmvn.scp") as writer:
        writer.write("global", stats.to_matrix())
    torch.manual_seed(1)
    model = Experiment.open(path).new_model()
    assert model.decoder is not None and tokenizer.vocab_size == model.sos_eos_id + 1
    with torch.no_grad():
        model.decoder.output.weight.mul_(4)
    torch.save(model.state_dict(), path / "model.pt")
    return path


def make_data(path: Path, recordings: dict[str, np.ndarray]) -> Path:
    path.mkdir(parents=True)
    fbank = Fbank(config=FBANK)
    frames = {}
    with ArkWriter(ark=path / "feats.ark", scp=path / "feats.scp") as writer:
        for utt, samples in sorted(recordings.items()):
            soundfile.write(path / f"{utt}.wav", samples, 16000, subtype="PCM_16")
            feats = fbank(samples / np.float32(32768))
            frames[utt] = len(feats)
            writer.write(utt, feats)
    (path / "utt2num_frames").write_text("".join(f"{utt} {n}\n" for utt, n in frames.items()))
    (path / "utt2spk").write_text("".join(f"{utt} {utt}\n" for utt in frames))
    (path / "fbank.yaml").write_text(dump_config(FBANK))
    return path


@pytest.fixture(scope="module")
def exp(tmp_path_factory) -> Path:
    return make_exp(tmp_path_factory.mktemp("exp") / "asr")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    recordings = {f"utt{i}": recording(i, 0.5 + 0.2 * i) for i in range(7)}
    recordings["tiny"] = recording(50, 0.05)  # three frames: features, but nothing is left after subsampling
    return make_data(tmp_path_factory.mktemp("data") / "test", recordings)


def decode(exp: Path, data: Path, out: Path, *more: str) -> int:
    return main(["decode", "--exp", str(exp), "--data", str(data), "--out", str(out), "--set", "beam=3", *more])


def text_of(out: Path) -> dict[str, str]:
    lines = (out / "text").read_text().splitlines()
    assert lines == sorted(lines, key=lambda line: line.split(" ")[0].encode())
    return {line.split(" ")[0]: line.partition(" ")[2] for line in lines}


def test_every_utterance_comes_out_once_whatever_the_number_of_jobs(exp, data, tmp_path, capsys):
    assert decode(exp, data, tmp_path / "one", "--set", "nbest=2") == 0
    assert "RTF" in capsys.readouterr().out
    for job in (1, 2, 3):
        assert decode(exp, data, tmp_path / "three", "--set", "nbest=2", "--job", str(job), "--num-jobs", "3") == 0
    assert main(["decode", "--merge", "--data", str(data), "--out", str(tmp_path / "three"), "--num-jobs", "3"]) == 0
    text = text_of(tmp_path / "one")
    assert text == text_of(tmp_path / "three")
    assert set(text) == {"tiny", *(f"utt{i}" for i in range(7))} and any(text.values())
    summary = json.loads((tmp_path / "three" / "decode.json").read_text())
    assert summary["num_utts"] == 8 and summary["num_jobs"] == 3 and summary["config"]["beam"] == 3
    assert summary["rtf"] == pytest.approx(summary["decode_seconds"] / summary["audio_seconds"], rel=1e-2)
    one, three = ((tmp_path / d / "nbest.jsonl").read_text().splitlines() for d in ("one", "three"))
    for a, b in zip(map(json.loads, one), map(json.loads, three), strict=True):
        assert [h["text"] for h in a["nbest"]] == [h["text"] for h in b["nbest"]]
        assert [h["score"] for h in a["nbest"]] == pytest.approx([h["score"] for h in b["nbest"]], abs=1e-4)


def test_an_utterance_that_cannot_be_decoded_is_named_and_has_an_empty_hypothesis(exp, data, tmp_path):
    broken = tmp_path / "data"
    shutil.copytree(data, broken)
    scp = (broken / "feats.scp").read_text().splitlines()
    (broken / "feats.scp").write_text(
        "\n".join("utt3 /no/such/file.ark:5" if line.startswith("utt3 ") else line for line in scp) + "\n"
    )
    with (broken / "utt2spk").open("a") as stream:
        stream.write("zzz zzz\n")  # the feature stage skipped it
    assert decode(exp, broken, tmp_path / "out") == 0
    assert decode(exp, data, tmp_path / "whole") == 0
    failed = json.loads((tmp_path / "out" / "decode.json").read_text())["failed"]
    assert set(failed) == {"tiny", "utt3", "zzz"}
    assert "too short" in failed["tiny"] and "/no/such/file.ark" in failed["utt3"] and "no features" in failed["zzz"]
    text, whole = text_of(tmp_path / "out"), text_of(tmp_path / "whole")
    assert {"tiny", "utt3", "zzz"} <= set((tmp_path / "out" / "text").read_text().splitlines())  # the id alone
    assert all(text[utt] == whole[utt] for utt in whole if utt not in failed)


def test_a_killed_job_continues_and_decodes_nothing_twice(exp, data, tmp_path, capsys):
    out = tmp_path / "out"
    assert decode(exp, data, out, "--job", "1") == 0
    part = out / "parts" / "1.jsonl"
    lines = part.read_bytes().splitlines(keepends=True)
    marked = lines[1].replace(b'"decode_seconds": ', b'"decode_seconds": 1234')  # would be lost if it were decoded again
    part.write_bytes(lines[0] + marked + b"".join(lines[2:4]) + lines[4][:17])  # the kill broke a line off
    capsys.readouterr()
    assert decode(exp, data, out, "--job", "1") == 0
    assert f"{len(lines) - 4} utterances" in capsys.readouterr().out
    again = part.read_bytes().splitlines(keepends=True)
    assert again[1] == marked and len(again) == len(lines)
    assert main(["decode", "--merge", "--data", str(data), "--out", str(out)]) == 0
    assert len(text_of(out)) == 8


def test_other_weights_or_another_configuration_start_from_the_beginning(exp, data, tmp_path, capsys):
    out = tmp_path / "out"
    assert decode(exp, data, out) == 0
    for more in (["--set", "ctc_weight=0.5"], ["--weights", str(tmp_path / "other.pt")]):
        state = torch.load(exp / "model.pt", weights_only=True)
        torch.save({name: 0.5 * value for name, value in state.items()}, tmp_path / "other.pt")
        capsys.readouterr()
        assert decode(exp, data, out, *more) == 0
        assert "job 1: 8 utterances" in capsys.readouterr().out


def test_another_penalty_with_the_same_weights_starts_from_the_beginning(exp, data, tmp_path, capsys):
    other, out = tmp_path / "exp", tmp_path / "out"
    shutil.copytree(exp, other)
    assert decode(other, data, out) == 0
    config = Experiment.open(other).config
    penalty = config.model.attention_penalty.model_copy(update={"encoder_self": PenaltyConfig(shape="linear", scale=1.0)})
    model = config.model.model_copy(update={"attention_penalty": penalty})
    (other / "config.yaml").write_text(dump_config(config.model_copy(update={"model": model})))
    capsys.readouterr()
    assert decode(other, data, out) == 0
    assert "job 1: 8 utterances" in capsys.readouterr().out


def test_merging_refuses_lost_doubled_and_unknown_utterances(exp, data, tmp_path, capsys):
    out = tmp_path / "out"
    assert decode(exp, data, out, "--job", "1") == 0
    part = out / "parts" / "1.jsonl"
    lines = part.read_bytes().splitlines(keepends=True)
    merge = ["decode", "--merge", "--data", str(data), "--out", str(out)]
    lost = json.loads(lines[-1])["utt"]
    for content, words in (
        (lines[:-1], [f"1 utterance(s) of {data} were not decoded: {lost};"]),
        ([*lines, lines[-1]], [f"1 utterance(s) were decoded twice: {lost};"]),
        ([*lines, lines[-1].replace(lost.encode(), b"stranger")], [f"1 utterance(s) are not in {data}: stranger;"]),
        ([*lines[:2], b'{"utt": 1}\n', *lines[2:]], ["1.jsonl:3", "not a result"]),
        ([], ["1.jsonl: missing"]),
    ):
        part.write_bytes(b"".join(content))
        assert main(merge) == 1
        error = capsys.readouterr().err
        assert all(word in error for word in words), error
        assert not (out / "text").exists()
    assert main([*merge, "--num-jobs", "2"]) == 1


def test_parts_of_different_configurations_are_not_mixed(exp, data, tmp_path, capsys):
    assert decode(exp, data, tmp_path, "--job", "1", "--num-jobs", "2") == 0
    assert decode(exp, data, tmp_path, "--job", "2", "--num-jobs", "2", "--set", "length_bonus=1.0") == 0
    assert main(["decode", "--merge", "--data", str(data), "--out", str(tmp_path), "--num-jobs", "2"]) == 1
    error = capsys.readouterr().err
    assert "2.jsonl" in error and "config" in error


def test_features_computed_otherwise_are_refused_by_field(exp, data, tmp_path, capsys):
    other = tmp_path / "data"
    shutil.copytree(data, other)
    (other / "fbank.yaml").write_text(dump_config(FBANK.model_copy(update={"window_type": "hamming"})))
    assert decode(exp, other, tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "window_type" in error and "hamming" in error and "povey" in error and "num_mel_bins" not in error


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--job", "3", "--num-jobs", "2"], "--job 3"),
        (["--job", "0", "--num-jobs", "2"], "--job 0"),
        (["--num-jobs", "2"], "needs --job"),
        (["--num-jobs", "0"], "at least 1"),
        (["--set", "baem=4"], "did you mean 'beam'"),
        (["--weights", "/no/such.pt"], "/no/such.pt"),
        (["--weights", __file__], "not a file of weights, or a damaged one (UnpicklingError"),
    ],
)
def test_wrong_requests_are_errors_with_the_cause(exp, data, tmp_path, capsys, arguments, word):
    assert decode(exp, data, tmp_path / "out", *arguments) == 1
    assert word in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_an_error_not_a_slow_run(exp, data, tmp_path, capsys):
    assert decode(exp, data, tmp_path / "out", "--ngpu", "1") == 1
    assert "no CUDA device" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="cuda"):
        speechtx.load_recognizer(exp, device="cuda")


def test_greedy_decodes_a_directory_too(exp, data, tmp_path):
    assert decode(exp, data, tmp_path, "--set", "method=ctc_greedy") == 0
    assert len(text_of(tmp_path)) == 8


@pytest.mark.parametrize("method", ["ctc_beam", "attention_rescoring"])
def test_ctc_beam_and_rescoring_decode_a_directory_with_hot_words(exp, data, tmp_path, method, capsys):
    for name, more in (("cold", []), ("hot", ["--set", "hot_words=[cab, b a]", "--set", "hot_word_bonus=3.0"])):
        assert decode(exp, data, tmp_path / name, "--set", f"method={method}", "--set", "nbest=2", *more) == 0
        found = [json.loads(line) for line in (tmp_path / name / "nbest.jsonl").read_text().splitlines()]
        assert len(text_of(tmp_path / name)) == 8 and sum(len(line["nbest"]) == 2 for line in found) == 7
        for hypothesis in (h for line in found for h in line["nbest"]):
            att = hypothesis["att"] if method == "attention_rescoring" else None
            ctc = hypothesis["ctc"] if att is None else 0.7 * att + 0.3 * hypothesis["ctc"]
            assert hypothesis["score"] == pytest.approx(ctc + (hypothesis["hot_words"] or 0.0), abs=1e-4)
            assert (hypothesis["hot_words"] is not None) == (name == "hot")
            if name == "hot":
                assert (hypothesis["hot_words"] > 0) == any(word in f" {hypothesis['text']}" for word in (" cab", " b a"))
    assert any("cab" in text for text in text_of(tmp_path / "hot").values())
    assert text_of(tmp_path / "hot") != text_of(tmp_path / "cold")
    assert decode(exp, data, tmp_path / "bad", "--set", f"method={method}", "--set", "hot_words=[xyz]") == 1
    assert "cannot spell 'xyz'" in capsys.readouterr().err
    from_python = speechtx.load_recognizer(
        exp, decode=DecodeConfig(method=method, beam=3, hot_words=("cab", "b a"), hot_word_bonus=3.0)
    )
    assert from_python.transcribe(data / "utt3.wav") == text_of(tmp_path / "hot")["utt3"]


def test_the_decode_step_runs_jobs_and_merges(exp, data, tmp_path, repo):
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    speechtx_command = bin_dir / "speechtx"
    speechtx_command.write_text(f'#!/bin/sh\nPYTHONPATH="{repo}" exec "{sys.executable}" -m speechtx.bin.main "$@"\n')
    speechtx_command.chmod(0o755)
    config = tmp_path / "decode.yaml"
    config.write_text("beam: 3\n")
    step = [str(repo / "utils" / "steps" / "decode.sh"), "--nj", "2", "--config", str(config), "--set", "nbest=2"]
    env = {"PATH": f"{bin_dir}:/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    arguments = ["--exp", str(exp), str(exp), str(data), str(tmp_path / "out")]  # an ensemble of a model with itself
    done = subprocess.run([*step, *arguments], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 utterance(s) could not be decoded" in done.stdout and "  tiny: utterance tiny: 3 frames" in done.stdout
    assert len(json.loads((tmp_path / "out" / "decode.json").read_text())["members"]) == 2
    assert not list((tmp_path / "out" / "parts").glob("*.progress"))
    assert len(text_of(tmp_path / "out")) == 8 and (tmp_path / "out" / "log" / "decode.2.log").is_file()
    missing = subprocess.run(
        [*step, str(exp), str(tmp_path / "none"), str(tmp_path / "out")], env=env, capture_output=True, text=True
    )
    assert missing.returncode == 1 and "feats.scp" in missing.stderr


# ------------------------------------------------------------------------------------------------- transcribe


def test_transcribing_a_file_gives_what_decoding_its_features_gave(exp, data, tmp_path):
    assert decode(exp, data, tmp_path, "--set", "nbest=3") == 0
    recognizer = speechtx.load_recognizer(exp, device="cpu", decode=DecodeConfig(beam=3, nbest=3))
    for line in map(json.loads, (tmp_path / "nbest.jsonl").read_text().splitlines()):
        if line["error"] is None:
            found = recognizer.transcribe_nbest(data / f"{line['utt']}.wav")
            assert [h.text for h in found] == [h["text"] for h in line["nbest"]]
            assert [h.score for h in found] == pytest.approx([h["score"] for h in line["nbest"]], abs=1e-4)
            assert recognizer.transcribe(str(data / f"{line['utt']}.wav")) == found[0].text


def test_samples_and_a_file_of_them_give_the_same_text(exp, data):
    recognizer = speechtx.load_recognizer(exp, device="cpu")
    samples = recording(5, 1.5)
    assert recognizer.transcribe((samples, 16000)) == recognizer.transcribe(data / "utt5.wav")
    assert recognizer.transcribe((samples / np.float32(32768), 16000)) == recognizer.transcribe((samples, 16000))


@pytest.mark.parametrize(
    ("samples", "word"),
    [
        (np.zeros((2, 16000), dtype=np.float32), "one channel"),
        (np.zeros(0, dtype=np.float32), "shape"),
        (np.zeros(16000, dtype=np.int64), "int16"),
        (np.full(16000, np.nan, dtype=np.float32), "NaN"),
        (np.full(16000, 12000.0, dtype=np.float32), "divide"),
        (np.zeros(900, dtype=np.float32), "too short"),
        (np.zeros(100, dtype=np.float32), "too short"),
    ],
)
def test_samples_that_cannot_be_speech_are_errors(exp, samples, word):
    with pytest.raises(AudioError, match=word):
        speechtx.load_recognizer(exp, device="cpu").transcribe((samples, 16000))


def test_speaker_cmvn_falls_back_to_the_recordings_own_statistics(tmp_path, data):
    speaker, utterance = make_exp(tmp_path / "speaker", cmvn="speaker"), make_exp(tmp_path / "utterance", cmvn="utterance")
    a, b = (speechtx.load_recognizer(path, device="cpu").features(data / "utt2.wav") for path in (speaker, utterance))
    assert np.array_equal(a, b)
    assert np.allclose(a.mean(axis=0), 0, atol=1e-3) and np.allclose(a.std(axis=0), 1, atol=1e-2)


def test_the_command_line_prints_one_line_a_file_and_a_bad_file_does_not_stop_the_others(exp, data, tmp_path, capsys):
    bad = tmp_path / "bad.wav"
    bad.write_bytes(b"this is no audio")
    files = [str(data / "utt1.wav"), str(bad), str(data / "utt2.wav")]
    assert main(["transcribe", str(exp), *files]) == 1
    out, err = capsys.readouterr()
    recognizer = speechtx.load_recognizer(exp, device="cpu")
    assert out == "".join(f"{name}\t{recognizer.transcribe(name)}\n" for name in (files[0], files[2]))
    assert "bad.wav" in err
    assert main(["transcribe", str(exp), files[0]]) == 0


def test_json_lists_the_n_best_with_the_parts_of_their_scores(exp, data, capsys):
    assert main(["transcribe", str(exp), "--json", "--nbest", "3", str(data / "utt4.wav")]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    nbest = json.loads(line)["nbest"]
    assert len(nbest) == 3
    for h in nbest:
        assert set(h) == {"text", "tokens", *(field.name for field in fields(Hypothesis))}
        assert h["lm"] is None and h["hot_words"] is None
        assert h["score"] == pytest.approx(0.7 * h["att"] + 0.3 * h["ctc"] + h["length_bonus"], abs=1e-6)
    assert main(["transcribe", str(exp), "--json", "--nbest", "30", str(data / "utt4.wav")]) == 1
    assert "error: options: (top level): nbest 30 exceeds beam 10" in capsys.readouterr().err


def test_options_of_a_model_without_decoder_start_from_the_search_that_suits_it(exp, data, tmp_path, capsys):
    other = tmp_path / "exp"
    shutil.copytree(exp, other)
    changes = ["model.decoder.layers=0", "model.ctc_weight=1.0", "training.average.by=dev_loss"]
    (other / "config.yaml").write_text(dump_config(load_config(exp / "config.yaml", TrainConfig, changes)))
    torch.save(Experiment.open(other).new_model().state_dict(), other / "model.pt")
    assert main(["transcribe", str(other), "--json", "--nbest", "2", str(data / "utt4.wav")]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert len(json.loads(line)["nbest"]) == 2


def test_a_file_at_another_rate_is_resampled_and_the_log_says_so(exp, tmp_path, caplog):
    soundfile.write(tmp_path / "slow.wav", recording(3, 1.0, 8000), 8000, subtype="PCM_16")
    recognizer = speechtx.load_recognizer(exp, device="cpu")
    with caplog.at_level("INFO"):
        feats = recognizer.features(tmp_path / "slow.wav")
    assert len(feats) == 98 and "resampled from 8000 to 16000 Hz" in caplog.text
    assert "slow.wav" in caplog.text
