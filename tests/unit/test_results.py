"""RESULTS.md: complete, reproducible, and refused where its sources do not hold together."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from speechtx.bin import main
from speechtx.scoring.page import describe_search
from speechtx.scoring.results import mean_interval, read_score
from speechtx.scoring.sclite import Counts, Score, write_score


def make_decoding(exp: Path, name: str, test_set: str, counts: dict[str, tuple[int, int, int, int]], **decode: Any) -> Path:
    path = exp / f"decode_{test_set}_{name}"
    (path / "score_wer").mkdir(parents=True)
    text = "".join(f"{utt} X\n" for utt in counts)
    (path / "text").write_text(text)
    facts = {
        "config": {"method": "beam", "beam": 10},
        "num_utts": len(counts),
        "failed": {},
        "rtf": 0.0421,
        "device": "cpu",
        **decode,
    }
    (path / "decode.json").write_text(json.dumps(facts))
    utterances = {u: Counts(correct=c, substitutions=s, deletions=d, insertions=i) for u, (c, s, d, i) in counts.items()}
    total = sum(utterances.values(), start=Counts(correct=0, substitutions=0, deletions=0, insertions=0))
    write_score(
        path / "score_wer" / "score.json",
        Score(total=total, utterances=utterances, missing=[], sclite="sclite 2.10 (SCTK 1.3)"),
        unit="wer",
        facts={
            "set": test_set,
            "reference_words": total.reference,
            "reference_sha256": hashlib.sha256(test_set.encode()).hexdigest(),
            "hypothesis_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "ignore_case": False,
        },
    )
    return path


def make_experiment(exp: Path, *, seed: int = 1, wrong: int = 1) -> Path:
    exp.mkdir(parents=True)
    run = {
        "command": "speechtx train --config conf/train.yaml --train data/train --dev data/dev --exp exp/a",
        "git_hash": "0123456789ab",
        "versions": {"speechtx": "0.1.0", "torch": "2.13.0"},
        "device": "Some CPU, 2 threads",
        "num_parameters": 1234567,
        "seed": seed,
        "train_seconds": 5400.0,
    }
    (exp / "run.json").write_text(json.dumps(run))
    (exp / "metrics.jsonl").write_text('{"epoch": 1}\n{"epoch": 2}\n')
    (exp / "average.json").write_text(json.dumps({"by": "dev_acc", "num": 2, "epochs": [1, 2], "dev": {}}))
    make_decoding(exp, "decode", "test", {f"u{i}": (9 - wrong, wrong, 1, 0) for i in range(10)})
    make_decoding(exp, "decode", "dev", {f"v{i}": (8, 0, 0, 1) for i in range(4)})
    return exp


def results(*words: str | Path) -> int:
    return main.main(["results", *map(str, words)])


def test_the_page_says_what_was_scored_on_what_and_how(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exp = make_experiment(tmp_path / "exp")
    assert results("--exp", exp, "--note", "Synthetic speech.") == 0
    page = (exp / "RESULTS.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]
    search = "decode: beam 10, CTC 0.3"
    assert rows[2] == ["dev", "choosing epochs", search, "12.50", "12.50 - 12.50", "0", "0", "4", "4 / 32", "0.0421"]
    assert rows[3] == ["test", "test", search, "20.00", "20.00 - 20.00", "10", "10", "0", "20 / 100", "0.0421"]
    for fact in (
        "> Synthetic speech.",
        "test: 10 utterances, 100 words",
        "dev: 4 utterances, 32 words",
        "NIST sclite 2.10",
        "parameters: 1,234,567",
        "Some CPU, 2 threads",
        "1.50 hours, 2 epochs, seed 1",
        "mean of 2 epochs, best by dev_acc: 1 2",
        "chosen by their figures on dev",
        "git 0123456789ab; speechtx 0.1.0, torch 2.13.0",
        "beam 10",
        "speechtx train --config conf/train.yaml",
        "speechtx results --exp",
    ):
        assert fact in page
    assert "20.00" in capsys.readouterr().out


def test_the_page_does_not_say_that_dev_chose_epochs_when_the_last_were_averaged(tmp_path: Path) -> None:
    exp = make_experiment(tmp_path / "exp")
    (exp / "average.json").write_text(json.dumps({"by": "last", "num": 2, "epochs": [1, 2], "dev": {}}))
    assert results("--exp", exp) == 0
    page = (exp / "RESULTS.md").read_text(encoding="utf-8")
    assert "choosing epochs" not in page and "chosen by" not in page
    assert "| dev  | development |" in page
    assert "Training was watched on dev: its rows are not a test." in page
    assert "the bootstrap has no width" not in page


def test_the_page_says_by_which_commits_a_training_was_continued(tmp_path: Path) -> None:
    exp = make_experiment(tmp_path / "exp")
    run = json.loads((exp / "run.json").read_text())
    (exp / "run.json").write_text(json.dumps({**run, "continued": ["2026-01-02T03:04:05+0000 by git 89abcdef0123"]}))
    assert results("--exp", exp) == 0
    page = (exp / "RESULTS.md").read_text(encoding="utf-8")
    assert "- training was interrupted, and continued 2026-01-02T03:04:05+0000 by git 89abcdef0123" in page


def test_the_page_warns_that_no_error_at_all_gives_an_interval_without_width(tmp_path: Path) -> None:
    exp = make_experiment(tmp_path / "exp")
    make_decoding(exp, "decode", "perfect", {f"u{i}": (8, 0, 0, 0) for i in range(4)})
    assert results("--exp", exp) == 0
    assert "Without a single error the bootstrap has no width" in (exp / "RESULTS.md").read_text(encoding="utf-8")


def test_the_same_experiment_gives_the_same_page_but_for_the_date(tmp_path: Path) -> None:
    exp = make_experiment(tmp_path / "exp")
    pages = []
    for _ in range(2):
        assert results("--exp", exp) == 0
        pages.append((exp / "RESULTS.md").read_bytes().splitlines())
    assert pages[0][:-1] == pages[1][:-1]
    assert pages[0][-1].startswith(b"Generated on ")


def test_several_seeds_give_mean_least_and_greatest(tmp_path: Path) -> None:
    exps = [make_experiment(tmp_path / f"s{i}", seed=i, wrong=i) for i in (1, 2, 4)]
    words = [word for exp in exps for word in ("--exp", exp)]
    assert results(*words, "--out", tmp_path / "R.md") == 0
    page = (tmp_path / "R.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith("| test") and "mean of 3" in line)
    assert "min 20.00, max 50.00" in row
    assert [cell.strip() for cell in row.split("|")][5:10] == ["33.33", "33.33 - 33.33", "23.3", "10.0", "0.0"]
    assert "33.3 / 100" in row


def test_the_interval_of_a_mean_draws_the_same_utterances_for_every_seed(tmp_path: Path) -> None:
    exps = [make_experiment(tmp_path / name) for name in ("a", "b")]
    for exp, wrong in zip(exps, (5, 0), strict=True):  # the same two utterances are hard for both
        counts = {f"u{i}": (8 - wrong, wrong, 0, 0) if i < 2 else (8, 0, 0, 0) for i in range(10)}
        make_decoding(exp, "decode", "hard", counts)
    scores = [read_score(exp / "decode_hard_decode" / "score_wer") for exp in exps]
    assert mean_interval(scores) == tuple(bound / 2 for bound in scores[0].interval)
    assert mean_interval(scores[:1]) == scores[0].interval


def test_several_experiments_need_a_place_for_the_page_and_may_not_repeat(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exp = make_experiment(tmp_path / "a")
    assert results("--exp", exp, "--exp", make_experiment(tmp_path / "b")) == 1
    assert "--out" in capsys.readouterr().err
    assert results("--exp", exp, "--exp", exp, "--out", tmp_path / "R.md") == 1
    assert "twice" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("run.json", "train_seconds"),
        ("average.json", "epochs"),
        ("decode_test_decode/decode.json", "rtf"),
        ("decode_test_decode/score_wer/score.json", "counts"),
    ],
)
def test_a_source_that_lacks_something_is_named(file: str, key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exp = make_experiment(tmp_path / "exp")
    content = json.loads((exp / file).read_text())
    del content[key]
    (exp / file).write_text(json.dumps(content))
    assert results("--exp", exp) == 1
    message = capsys.readouterr().err
    assert file in message
    assert f"lacks {key}" in message
    (exp / file).write_text("{")
    assert results("--exp", exp) == 1
    assert "cannot be read as JSON" in capsys.readouterr().err
    assert not (exp / "RESULTS.md").exists()


@pytest.mark.parametrize("file", ["run.json", "average.json", "metrics.jsonl", "decode_dev_decode/decode.json"])
def test_a_missing_source_is_named(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exp = make_experiment(tmp_path / "exp")
    (exp / file).unlink()
    assert results("--exp", exp) == 1
    assert f"{file}: no such file" in capsys.readouterr().err


def test_a_score_that_was_edited_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exp = make_experiment(tmp_path / "exp")
    path = exp / "decode_test_decode" / "score_wer" / "score.json"
    good = path.read_text()
    for before, after in (('"sub": 10', '"sub": 1'), ('"errors": 20', '"errors": 2'), ('"utterances": 10', '"utterances": 11')):
        assert before in good
        path.write_text(good.replace(before, after))
        assert results("--exp", exp) == 1
        assert "score again" in capsys.readouterr().err


def test_a_score_of_another_hypothesis_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exp = make_experiment(tmp_path / "exp")
    (exp / "decode_test_decode" / "text").write_text("u0 OTHER\n")
    assert results("--exp", exp) == 1
    assert "was not made from" in capsys.readouterr().err
    assert results("--exp", exp, "--current-only") == 0
    assert "left out until it is scored again: " in capsys.readouterr().err
    assert "| test" not in (exp / "RESULTS.md").read_text(encoding="utf-8")


def test_experiments_scored_on_different_references_are_not_averaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = make_experiment(tmp_path / "a"), make_experiment(tmp_path / "b")
    path = b / "decode_test_decode" / "score_wer" / "score.json"
    path.write_text(path.read_text().replace('"reference_sha256": "', '"reference_sha256": "f'))
    assert results("--exp", a, "--exp", b, "--out", tmp_path / "R.md") == 1
    assert "cannot be compared" in capsys.readouterr().err


def test_utterances_that_could_not_be_decoded_are_on_the_page(tmp_path: Path) -> None:
    exp = make_experiment(tmp_path / "exp")
    make_decoding(exp, "greedy", "test", {f"u{i}": (8, 1, 1, 0) for i in range(10)}, failed={"u3": "too short"})
    assert results("--exp", exp) == 0
    page = (exp / "RESULTS.md").read_text(encoding="utf-8")
    assert "decode_test_greedy: 1 utterances could not be decoded and count as empty: u3" in page


def test_an_experiment_without_scores_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exp = make_experiment(tmp_path / "exp")
    for path in exp.glob("decode_*/score_wer/score.json"):
        path.unlink()
    assert results("--exp", exp) == 1
    assert "nothing scored yet" in capsys.readouterr().err


LM = {"path": "exp/lm/a/transformer", "sha256": "ab" * 32}


def test_rows_name_language_models_and_weights_and_where_they_were_chosen(tmp_path: Path) -> None:
    exp = make_experiment(tmp_path / "exp")
    config = {"method": "beam", "beam": 5, "ctc_weight": 0.4, "lm_weight": 0.25, "ngram_weight": 0.0, "length_bonus": 0.0}
    counts = {f"u{i}": (8, 0, 1, 1) for i in range(3)}
    for test_set in ("dev", "test"):
        make_decoding(exp, "decode_lm", test_set, counts, config=config, lm=LM, ngram=None, members=[])
    tuned = {"set": "dev", "unit": "wer", "grid": {"lm_weight": [0.0, 0.25]}, "chosen": {"lm_weight": 0.25}, "points": [{}, {}]}
    folder = exp / "tune_dev_decode_lm"
    folder.mkdir()
    (folder / "tune.json").write_text(json.dumps({**tuned, "config": config}))
    assert results("--exp", exp) == 0
    page = (exp / "RESULTS.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")][:3] for line in page.splitlines() if line.startswith("|")]
    assert ["dev", "choosing epochs and weights", "decode_lm: beam 5, CTC 0.4, LM transformer 0.25"] in rows
    assert ["dev", "choosing epochs", "decode: beam 10, CTC 0.3"] in rows
    assert ["test", "test", "decode_lm: beam 5, CTC 0.4, LM transformer 0.25"] in rows
    assert "The decoding weights of decode_lm were chosen on dev by `speechtx tune`: its rows are not a test." in page
    assert "chosen on dev by WER of 2 configurations: lm_weight 0.25 among [0.0, 0.25]" in page
    assert "lm: exp/lm/a/transformer (SHA-256 abababababababab)" in page
    (folder / "tune.json").write_text(json.dumps({**tuned, "config": {**config, "beam": 6}}))  # not what was decoded with
    assert results("--exp", exp) == 0
    assert "were chosen on" not in (exp / "RESULTS.md").read_text(encoding="utf-8").replace("epochs were chosen", "")


def test_weights_that_were_chosen_on_a_test_set_are_not_shown_as_a_test(tmp_path: Path) -> None:
    exp = make_experiment(tmp_path / "exp")
    config = {"method": "beam", "beam": 10}  # of make_decoding
    (exp / "tune_test_decode").mkdir()
    tuned = {"set": "test", "unit": "wer", "grid": {"beam": [10]}, "chosen": {"beam": 10}, "points": [{}], "config": config}
    (exp / "tune_test_decode" / "tune.json").write_text(json.dumps(tuned))
    assert results("--exp", exp) == 0
    page = (exp / "RESULTS.md").read_text(encoding="utf-8")
    assert "| test | choosing weights |" in page and "| test | test " not in page


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"method": "ctc_greedy"}, "CTC greedy"),
        ({"method": "mask_ctc"}, "Mask-CTC"),
        ({"method": "ctc_beam", "beam": 8, "ngram_weight": 0.5}, "CTC beam 8, n-gram 3gram.arpa 0.5"),
        ({"method": "attention_rescoring", "ctc_weight": 0.5}, "attention rescoring 10, CTC 0.5"),
        ({"ctc_weight": 1.0}, "beam 10, CTC only"),
        ({"length_bonus": 1.0}, "beam 10, CTC 0.3, length bonus 1"),
        ({"ctc_weight": 0.0, "hot_words": ["A", "B"]}, "beam 10, attention only, 2 hot words"),
    ],
)
def test_a_search_is_told_in_a_few_words(config: dict[str, Any], words: str) -> None:
    ngram = {"path": "lm/3gram.arpa", "sha256": ""} if "ngram_weight" in config else None
    assert describe_search({"config": config, "lm": None, "ngram": ngram}) == words
    assert describe_search({"config": config, "ngram": ngram, "members": [{}, {}]}) == f"{words}, 2 models"


def test_the_recipes_own_n_gram_is_not_called_n_gram_twice() -> None:
    decode = {"config": {"ngram_weight": 0.3}, "ngram": {"path": "exp/lm/train/ngram", "sha256": ""}}
    assert describe_search(decode) == "beam 10, CTC 0.3, n-gram 0.3"
