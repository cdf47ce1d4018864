"""Stage 0 finds each kind of mistake, and only mistakes."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest

from speechtx.bin import check, main
from speechtx.config.decode import DecodeConfig
from speechtx.config.errors import ScoringError
from speechtx.config.load import load_config, locate
from speechtx.config.schema import FbankConfig, TrainConfig

FILES = {
    "train.yaml": "tokenizer: {vocab_size: 30}\nmodel: {encoder: {layers: 2, dim: 32}, decoder: {layers: 1}}\n",
    "fbank.yaml": "num_mel_bins: 40\n",
    "decode.yaml": "beam: 4\n",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        Path(name).write_text(text)
    monkeypatch.setattr(check, "check_sclite", lambda: check.Finding("sclite", "there"))
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str]:
    command = [
        "check",
        "--config",
        "train.yaml",
        "--fbank-config",
        "fbank.yaml",
        "--decode-config",
        "decode.yaml",
        "--exp",
        "exp/a",
    ]
    status = main.main([*command, "--corpus-gib", "0.001", *more])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def test_a_sound_run_passes_before_any_data_exist(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out = run(capsys, "--train-text", "data/train/text")
    assert status == 0, out
    assert "PROBLEM" not in out
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES), "a check leaves nothing behind"


def test_features_too_narrow_for_the_front_end_are_a_finding_with_advice(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("fbank.yaml").write_text("num_mel_bins: 4\n")
    status, out = run(capsys)
    assert status == 1 and "num_mel_bins 4 vanish in subsampling" in out and "use 7 bins or more" in out


def test_the_number_of_parameters_is_that_of_the_model(folder: Path) -> None:
    from speechtx.model.recognizer import Recognizer

    train, fbank = load_config("train.yaml", TrainConfig), load_config("fbank.yaml", FbankConfig)
    number, findings = check.check_model(train, fbank)
    model = Recognizer(config=train.model, num_mel_bins=40, vocab_size=32)
    assert number == sum(p.numel() for p in model.parameters())
    assert f"{number:,} parameters" in findings[0].message


def test_every_mistake_in_every_file_is_shown_at_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("train.yaml").write_text("model:\n  encoder:\n    layer: 3\n  decoder:\n    headz: 4\n")
    Path("decode.yaml").write_text("beam: wide\n")
    status, out = run(capsys, "--set", "training.epoch=3")
    assert status == 1
    assert "train.yaml:3: model.encoder.layer: unknown key; did you mean 'layers'?" in out
    assert "train.yaml:5: model.decoder.headz: unknown key; did you mean 'heads'?" in out
    assert "--set training.epoch=3: training.epoch: unknown key; did you mean 'epochs'?" in out
    assert "decode.yaml:1: beam:" in out
    assert "2 problem(s) found; nothing was started" in out


def test_missing_files_are_problems(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("fbank.yaml").unlink()
    status, out = run(capsys, "--archive", "corpus.tar.gz")
    assert status == 1
    assert "fbank.yaml: no such configuration file" in out
    assert "corpus.tar.gz: no such readable file" in out


def test_limits_that_leave_no_frame_no_bin_or_no_decoder(folder: Path) -> None:
    def problems(train: str = "{}", fbank: str = "{}", decode: str = "{}") -> list[str]:
        from speechtx.config.load import parse_config

        model = parse_config(train, TrainConfig)
        found = list(check.check_shapes(model, parse_config(fbank, FbankConfig)))
        found += check.check_searches(model, {Path("d.yaml"): [parse_config(decode, DecodeConfig)]})
        return [finding.subject for finding in found]

    assert problems() == []
    assert problems("training: {min_frames: 6}") == ["frames"]
    assert problems("training: {min_frames: 7}") == []
    assert problems(fbank="num_mel_bins: 6") == ["features"]
    alone = "{model: {ctc_weight: 1.0, decoder: {layers: 0}}, training: {average: {by: dev_loss}}}"
    assert problems(alone) == ["decoding"]
    assert problems(alone, decode="ctc_weight: 1.0") == []
    assert problems(alone, decode="method: ctc_greedy") == []


def test_a_vocabulary_below_the_characters_of_the_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("text").write_text("a-1 " + " ".join("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123") + "\n")
    status, out = run(capsys, "--train-text", "text")
    assert status == 1
    assert "vocab_size 30 is below the 32 symbols of text" in out
    assert "set tokenizer.vocab_size to 32 or more" in out
    status, out = run(capsys, "--train-text", "text", "--set", "tokenizer.vocab_size=32")
    assert status == 0, out
    status, out = run(capsys, "--train-text", "text", "--set", "tokenizer.type=char")
    assert status == 0, out


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_folder_by_its_mode(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("exp").mkdir(mode=0o555)
    status, out = run(capsys)
    assert status == 1
    assert "cannot write to exp/a" in out


def test_a_file_where_a_folder_must_be(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("exp").write_text("")
    status, out = run(capsys)
    assert status == 1
    assert "cannot write to exp/a" in out


def test_a_moving_average_is_counted_in_all_three_checkpoints(folder: Path) -> None:
    plain, averaged = (
        check.check_disk(folder, audio_gib=0.0, parameters=check.GIB // 4, epochs_kept=5, ema=ema).message
        for ema in (False, True)
    )
    assert "about 16.0 GiB needed" in plain
    assert "about 19.0 GiB needed" in averaged


def test_too_little_disk(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out = run(capsys, "--corpus-gib", "1e9")
    assert status == 1
    assert "GiB free, about 2000000000." in out


def test_every_copy_of_the_training_set_at_another_speed_needs_room_for_its_features(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out = run(capsys, "--corpus-gib", "1e9", "--speeds", "")
    assert "about 2000000000." in out
    _, out = run(capsys, "--corpus-gib", "1e9", "--speeds", "0.9,1.0,1.1")
    assert "about 4000000000." in out, "the audio once, its features three times"


def test_gpus_that_are_not_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out = run(capsys, "--ngpu", "99")
    assert status == 1
    assert "--ngpu 99, but" in out


def test_no_jobs_is_a_problem_and_many_are_a_remark(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--nj", "0")[0] == 1
    status, out = run(capsys, "--nj", "9999")
    assert status == 0
    assert "wait their turn" in out


def test_missing_packages_and_sclite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "PACKAGES", ("json", "no_such_package_of_ours"))
    (finding,) = check.check_packages()
    assert "no_such_package_of_ours" in finding.message
    assert finding.advice

    def nowhere() -> None:
        raise ScoringError("sclite is nowhere")

    monkeypatch.setattr("speechtx.scoring.sclite.find_sclite", nowhere)
    assert check.check_sclite().advice


def test_the_recipes_configurations_pass(repo: Path) -> None:
    recipes = sorted(repo.glob("egs/*/asr1"))
    assert len(recipes) >= 4
    for recipe in recipes:
        arguments = argparse.Namespace(
            config=recipe / "conf/train.yaml",
            overrides=[],
            align_config=next(recipe.glob("conf/align.yaml"), None),
            fbank_config=recipe / "conf/fbank.yaml",
            decode_config=sorted(recipe.glob("conf/decode*.yaml")),
            tune=[(grid.with_name(grid.name.replace("tune", "decode")), grid) for grid in recipe.glob("conf/tune*.yaml")],
        )
        configs, findings = check.load_all(arguments)
        assert not [finding for finding in findings if finding.advice], recipe
        assert configs.train is not None
        assert configs.fbank is not None
        assert list(check.check_shapes(configs.train, configs.fbank)) == []
        assert list(check.check_searches(configs.train, configs.searches)) == []
        lm_config = recipe / "conf/lm.yaml"
        assert list(check.check_weights(configs.searches, lm_config if lm_config.is_file() else None)) == []
        assert check.check_model(configs.train, configs.fbank)[0] > 0


def test_a_lexicon_is_counted_where_it_is_and_awaited_where_it_is_not(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    phones = ("--set", "model.intermediate_ctc.layers=[1]", "--set", "model.intermediate_ctc.lexicon=lexicon.txt")
    status, out = run(capsys, *phones)
    assert status == 0 and "lexicon.txt: not there yet; stage data is to make it" in out
    Path("lexicon.txt").write_text("HELLO HH AH L OW\n")
    status, out = run(capsys, *phones)
    assert status == 0 and "lexicon.txt: 4 phones" in out
    Path("lexicon.txt").write_text("HELLO\n")
    status, out = run(capsys, *phones)
    assert status == 1 and "lexicon.txt:1: HELLO has no phones" in out


def test_a_search_by_phones_needs_a_model_that_predicts_them(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("decode.yaml").write_text("phone_weight: 0.5\n")
    status, out = run(capsys)
    assert status == 1 and "decode.yaml: phone_weight 0.5 needs a model that predicts phones" in out
    status, out = run(capsys, "--set", "model.intermediate_ctc.layers=[1]", "--set", "model.intermediate_ctc.lexicon=lexicon.txt")
    assert status == 0


def test_the_first_model_is_looked_at_too(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("align.yaml").write_text("model: {encoder: {layer: 3}}\n")
    status, out = run(capsys, "--align-config", "align.yaml")
    assert status == 1 and "align.yaml" in out and "did you mean 'layers'?" in out


def test_language_models_are_looked_at_if_there_are_any(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("lm.yaml").write_text("ngram: {order: 3, text: [data/train, data/made_by_stage_1.txt]}\ntransformer: {dim: 32}\n")
    status, out = run(capsys, "--lm-config", "lm.yaml")
    assert status == 0, out
    assert "3-gram and a Transformer of 2 layers, about" in out
    Path("lm.yaml").write_text("ngram: {ordr: 3, text: [data/train]}\ntransformer: {dim: 30}\n")
    status, out = run(capsys, "--lm-config", "lm.yaml")
    assert status == 1
    assert "lm.yaml:1: ngram.ordr: unknown key; did you mean 'order'?" in out
    assert "lm.yaml:2: transformer: dim 30 is not divisible by heads 4" in out
    for section, missing in (("ngram: {text: [corpus.txt]}", "corpus.txt"), ("lexicon: {words: [names.txt]}", "names.txt")):
        Path("lm.yaml").write_text(f"{section}\n")
        status, out = run(capsys, "--lm-config", "lm.yaml")
        assert status == 1
        assert f"lm.yaml: {missing}: no such file or data directory" in out
    assert "2-gram of whole words" in out


def test_milliseconds_that_subsampling_cannot_express_are_shown_with_their_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = Path("train.yaml").read_text()
    overrides = ["model.attention_penalty={encoder_self: {shape: log, unit: ms, window: 90}}"]
    status, out = run(capsys, "--set", overrides[0])
    assert status == 1 and f"--set {overrides[0]}: model.attention_penalty.encoder_self.window is 90 ms" in out
    assert "an encoder frame lasts 40 ms" in out
    where = locate("train.yaml", "model.encoder.layers")
    line = int(where.removeprefix("train.yaml:"))
    assert "layers" in text.splitlines()[line - 1] or "encoder" in text.splitlines()[line - 1]


def test_a_weight_without_the_language_model_is_found_before_training(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("decode.yaml").write_text("beam: 4\nlm_weight: 0.3\n")
    Path("tune.yaml").write_text("lm_weight: [0.0, 0.5]\nngram_weight: [0.0, 0.2]\n")
    tune = ("--tune", "decode.yaml", "tune.yaml")
    status, out = run(capsys, *tune)
    assert status == 1
    assert "decode.yaml:2: lm_weight 0.3 needs a language model, but there is no conf/lm.yaml" in out
    assert "tune.yaml:1: lm_weight 0.5" in out and "tune.yaml:2: ngram_weight 0.2" in out
    Path("lm.yaml").write_text("ngram: {order: 3}\n")
    status, out = run(capsys, *tune, "--lm-config", "lm.yaml")
    assert status == 1 and "lm.yaml has no section transformer" in out and "ngram_weight" not in out
    for ngram in ("ngram: {order: 3}", "lexicon: {order: 2}"):
        Path("lm.yaml").write_text(f"{ngram}\ntransformer: {{layers: 1}}\n")
        status, out = run(capsys, *tune, "--lm-config", "lm.yaml")
        assert status == 0, out


def test_a_wrong_grid_and_one_for_a_missing_decoder_are_problems(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tune, by_loss = ("--tune", "decode.yaml", "tune.yaml"), ("--set", "training.average.by=dev_loss")
    Path("tune.yaml").write_text("beam: [2]\nctc_wieght: [0.5]\n")
    status, out = run(capsys, *tune)
    assert status == 1 and "tune.yaml:2: ctc_wieght: unknown key; did you mean 'ctc_weight'?" in out
    Path("tune.yaml").write_text("ctc_weight: [0.5, 1.0]\n")
    Path("decode.yaml").write_text("ctc_weight: 1.0\n")
    status, out = run(capsys, *tune, "--set", "model.decoder.layers=0", "--set", "model.ctc_weight=1.0", *by_loss)
    assert status == 1 and "tune.yaml: ctc_weight 0.5 needs a decoder" in out and "decode.yaml: ctc_weight" not in out
    status, out = run(capsys, "--tune", "decode.yaml", "nothing.yaml")
    assert status == 1 and "nothing.yaml: no such configuration file" in out


def test_dithered_features_that_training_would_compute_are_a_problem(folder: Path) -> None:
    train = load_config("train.yaml", TrainConfig, ["training.waveforms=true"])
    assert list(check.check_shapes(train, FbankConfig())) == []
    (finding,) = check.check_shapes(train, FbankConfig(dither=1.0))
    assert "training.waveforms: dither 1.0" in finding.message and finding.advice
