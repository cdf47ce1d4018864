"""`speechtx tune`: decoding weights chosen on a development set, on a whole experiment directory with a random model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_decode import make_data, make_exp, recording
from test_decode_lm import make_lm

from speechtx.bin.main import main
from speechtx.config.decode import DecodeConfig
from speechtx.config.errors import ConfigError
from speechtx.config.load import load_config
from speechtx.config.tune import load_grid
from speechtx.search.batch_decoder import BatchDecoder

GRID = "ngram_weight: [1.0, 0.0]\nlength_bonus: [0.0, 0.5]\n"


@pytest.fixture(scope="module")
def exp(tmp_path_factory) -> Path:
    return make_exp(tmp_path_factory.mktemp("exp") / "asr")


@pytest.fixture(scope="module")
def ngram(tmp_path_factory, exp) -> Path:
    return make_lm(tmp_path_factory.mktemp("lm"), exp / "tokenizer", "c c a c c a")


@pytest.fixture(scope="module")
def dev(tmp_path_factory) -> Path:
    data = make_data(tmp_path_factory.mktemp("data") / "dev", {f"utt{i}": recording(i, 0.4 + 0.1 * i) for i in range(5)})
    (data / "text").write_text("".join(f"utt{i} {'c' * (i + 1)} a\n" for i in range(5)))
    return data


@pytest.fixture
def conf(tmp_path) -> Path:
    (tmp_path / "decode.yaml").write_text("beam: 3\n")
    (tmp_path / "tune.yaml").write_text(GRID)
    return tmp_path


def tune(exp: Path, dev: Path, ngram: Path, conf: Path, out: Path, *more: str) -> int:
    files = ("--config", str(conf / "decode.yaml"), "--grid", str(conf / "tune.yaml"), "--ngram", str(ngram))
    return main(["tune", "--exp", str(exp), "--data", str(dev), "--out", str(out), *files, *more])


def test_the_chosen_configuration_has_the_fewest_errors_of_all_and_decodes_to_them(exp, dev, ngram, conf, tmp_path, capsys):
    out = tmp_path / "tune"
    assert tune(exp, dev, ngram, conf, out, "--unit", "cer") == 0
    printed = capsys.readouterr().out
    report = json.loads((out / "tune.json").read_text())
    assert [(p["ngram_weight"], p["length_bonus"]) for p in sorted(report["points"], key=lambda p: list(p.values())[:2])] == [
        (0.0, 0.0),
        (0.0, 0.5),
        (1.0, 0.0),
        (1.0, 0.5),
    ]
    errors = [point["errors"] for point in report["points"]]
    assert errors == sorted(errors) and len(set(errors)) > 1, "the grid is to make a difference"
    assert report["errors"] == errors[0] and report["set"] == "dev" and "sclite" in report["sclite"]
    assert report["ngram"]["path"] == str(ngram) or report["chosen"]["ngram_weight"] == 0.0
    tuned = load_config(out / "tuned.yaml", DecodeConfig)
    assert tuned.model_dump(mode="json") == report["config"] and tuned.beam == 3
    assert {key: getattr(tuned, key) for key in report["chosen"]} == report["chosen"]
    header = [line for line in (out / "tuned.yaml").read_text().splitlines() if line.startswith("#")]
    assert "4 configurations" in header[0] and str(dev) in header[0] and "ngram_weight" in " ".join(header)
    assert f"{errors[0]} / {report['reference_units']}" in printed
    # decoding and scoring with what was chosen gives what was promised
    decode = ["decode", "--exp", str(exp), "--data", str(dev), "--config", str(out / "tuned.yaml"), "--ngram", str(ngram)]
    assert main([*decode, "--out", str(tmp_path / "decode")]) == 0
    ref_hyp = ["--ref", str(dev / "text"), "--hyp", str(tmp_path / "decode" / "text")]
    assert main(["score", *ref_hyp, "--out", str(tmp_path / "score"), "--unit", "cer"]) == 0
    assert json.loads((tmp_path / "score" / "score.json").read_text())["errors"] == errors[0]


def test_each_point_gives_what_decoding_with_it_alone_gives(exp, dev, ngram, conf, tmp_path):
    assert tune(exp, dev, ngram, conf, tmp_path / "tune") == 0
    found = {}
    for folder in (tmp_path / "tune" / "points").iterdir():
        summary = json.loads((folder / "decode.json").read_text())["config"]
        found[summary["ngram_weight"], summary["length_bonus"]] = (folder / "text").read_text()
    for (weight, bonus), text in found.items():
        options = ["--set", "beam=3", "--set", f"ngram_weight={weight}", "--set", f"length_bonus={bonus}"]
        out = tmp_path / f"{weight}_{bonus}"
        decode = ["decode", "--exp", str(exp), "--data", str(dev), "--out", str(out), "--ngram", str(ngram), *options]
        assert main(decode) == 0
        assert (out / "text").read_text() == text
    assert len(set(found.values())) > 1


def test_of_equally_good_points_the_smallest_values_win_in_the_order_of_the_file(exp, dev, ngram, conf, tmp_path):
    (conf / "tune.yaml").write_text("max_repeats: [170, 130, 150]\nmax_len_ratio: [9, 8]\n")
    assert tune(exp, dev, ngram, conf, tmp_path / "tune") == 0  # limits that no hypothesis reaches
    report = json.loads((tmp_path / "tune" / "tune.json").read_text())
    assert report["chosen"] == {"max_repeats": 130, "max_len_ratio": 8.0}
    assert len({point["errors"] for point in report["points"]}) == 1
    assert "6 configurations have as few errors" in (tmp_path / "tune" / "tuned.yaml").read_text()


def test_audio_is_encoded_once_and_what_is_there_is_kept_when_the_grid_grows(exp, dev, ngram, conf, tmp_path, monkeypatch):
    encoded: list[int] = []
    encode = BatchDecoder._encode

    def counting(self, batch):
        encoded.append(len(batch) * 100 + len(self.configs))
        return encode(self, batch)

    monkeypatch.setattr(BatchDecoder, "_encode", counting)
    out = tmp_path / "tune"
    assert tune(exp, dev, ngram, conf, out) == 0
    assert sum(n // 100 for n in encoded) == 5 and {n % 100 for n in encoded} == {4}
    encoded.clear()
    (conf / "tune.yaml").write_text(GRID.replace("[1.0, 0.0]", "[0.5, 0.0, 1.0]"))
    assert tune(exp, dev, ngram, conf, out) == 0
    assert sum(n // 100 for n in encoded) == 5 and {n % 100 for n in encoded} == {2}, "only the two new points"
    assert len(json.loads((out / "tune.json").read_text())["points"]) == 6
    encoded.clear()
    assert tune(exp, dev, ngram, conf, out) == 0
    assert not encoded


def test_jobs_share_the_work_and_choose_what_one_job_chooses(exp, dev, ngram, conf, tmp_path, capsys):
    assert tune(exp, dev, ngram, conf, tmp_path / "one") == 0
    for job in ("1", "2"):
        assert tune(exp, dev, ngram, conf, tmp_path / "two", "--job", job, "--num-jobs", "2") == 0
        assert not (tmp_path / "two" / "tuned.yaml").exists()
    assert tune(exp, dev, ngram, conf, tmp_path / "two", "--num-jobs", "2", "--merge") == 0
    one, two = ((tmp_path / name / "tuned.yaml").read_text() for name in ("one", "two"))
    assert one == two
    capsys.readouterr()
    assert tune(exp, dev, ngram, conf, tmp_path / "none", "--num-jobs", "2", "--merge") == 1
    assert tune(exp, dev, ngram, conf, tmp_path / "none", "--num-jobs", "2", "--job", "0") == 1
    assert "missing" in capsys.readouterr().err


def test_results_of_other_data_are_not_scored_as_this_data(exp, dev, ngram, conf, tmp_path, capsys):
    assert tune(exp, dev, ngram, conf, tmp_path / "tune") == 0
    other = make_data(tmp_path / "dev", {f"utt{i}": recording(i + 50, 0.5) for i in range(5)})
    (other / "text").write_text((dev / "text").read_text())
    assert tune(exp, other, ngram, conf, tmp_path / "tune", "--merge") == 1
    assert "other data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("\nlm_wieght: [1.0]\n", ":2: lm_wieght: unknown key; did you mean 'lm_weight'?"),
        ("ctc_weight: 0.3\n", ":1: ctc_weight: must be a list, as in [0.3]"),
        ("beam: [3]\nctc_weight: [0.3, 2.0]\n", ":2: ctc_weight.1: input should be less than or equal to 1"),
        ("beam: [1, x]\n", ":1: beam.1: "),
        ("beam: [1, 1]\n", ":1: beam: 1 stands here twice"),
        ("beam: []\n", ":1: beam: list should have at least 1 item"),
        ("", "names no key"),
        ("- 1\n", ":1: expected a mapping"),
        ("method: [beam, ctc_greedy]\nlm_weight: [0.3]\n", "method ctc_greedy, lm_weight 0.3: these values do not go together"),
        ("beam: [1, 2]\nmin_len_ratio: [2.0]\n", "min_len_ratio 2.0: these values do not go together"),
        ("beam: [3]\nframes_per_batch: [4000, 8000]\n", ":2: frames_per_batch: trying values has no effect: it changes how fast"),
        ("nbest: [1, 2]\n", ":1: nbest: trying values has no effect: the best hypothesis is scored"),
        ("method: [beam, ctc_beam]\nmask_iterations: [1, 5]\n", ":2: mask_iterations: trying values has no effect: no comb"),
        ("method: [ctc_greedy]\nctc_weight: [0.1]\n", ":2: ctc_weight: trying values has no effect"),
        ("hot_word_bonus: [1.0, 2.0]\n", ":1: hot_word_bonus: trying values has no effect"),
        (f"beam: {list(range(1, 30))}\nlm_weight: {[i / 10 for i in range(30)]}\n", "870 combinations"),
    ],
)
def test_a_wrong_grid_is_an_error_with_file_and_line(tmp_path, text, words):
    path = tmp_path / "tune.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as err:
        load_grid(path, DecodeConfig())
    assert str(path) in str(err.value) and words in str(err.value)


def test_phrases_and_their_bonus_can_be_a_grid_too(tmp_path):
    path = tmp_path / "tune.yaml"
    path.write_text("hot_words: [[], [NEW YORK, BOSTON]]\nhot_word_bonus: [2, 1.5]\n")
    points = load_grid(path, DecodeConfig(beam=4))
    assert [(p.config.hot_words, p.config.hot_word_bonus) for p in points] == [
        ((), 1.5),
        ((), 2.0),
        (("NEW YORK", "BOSTON"), 1.5),
        (("NEW YORK", "BOSTON"), 2.0),
    ]
    assert {p.config.beam for p in points} == {4}


def test_a_key_that_some_of_the_methods_tried_read_may_be_tried(tmp_path):
    path = tmp_path / "tune.yaml"
    path.write_text("method: [ctc_greedy, beam]\nctc_weight: [0.3, 0.5]\nbeam: [2, 4]\nmax_len_ratio: [0.5]\n")
    assert len(load_grid(path, DecodeConfig())) == 8


def test_a_grid_with_a_language_model_that_was_not_given_is_refused_before_anything_is_decoded(
    exp, dev, ngram, conf, capsys, tmp_path
):
    (conf / "tune.yaml").write_text("lm_weight: [0.0, 0.3]\n")
    assert tune(exp, dev, ngram, conf, tmp_path / "tune") == 1
    assert "lm_weight 0.3" in capsys.readouterr().err
