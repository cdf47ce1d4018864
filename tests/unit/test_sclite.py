"""Scoring through sclite: right for every word, and loud about everything that does not join."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from speechtx.bin import main
from speechtx.config.errors import ScoringError
from speechtx.scoring.sclite import find_sclite, score
from speechtx.text.normalize import split_characters


def sclite_is_missing() -> bool:
    try:
        find_sclite()
    except ScoringError:
        return True
    return False


needs_sclite = pytest.mark.skipif(sclite_is_missing(), reason="NIST sclite is not installed (tools/install_sctk.sh)")

NASTY = [
    "(", ")", "{", "}", "{ a / b }", "/", "\\", "@", "*", "**", ";;", ";", "<", ">", "<unk>", "<space>",
    "%", "%28", "(%uh)", "-", "a-", "-a", "&amp;", '"', "'", ",", ":", "a:b", 'C,"a","b"', "A", "a",
    "É", "é", "e\u0301", "你好", "你", "שלום", "🙂", "👩\u200d👧", "ß", "\u200d", "\u00a0",
    "#", "$", "`", "~", "^", "|", "[", "]", "!", "?", "=", "+", "_", ".", "1.0",
    "\u2581THE", "(u1)", "(all-000)", "x" * 400,
]  # fmt: skip
LINE = st.lists(st.sampled_from(NASTY), max_size=8)


def weighted_distance(ref: Sequence[str], hyp: Sequence[str]) -> int:
    """The plain dynamic programme with sclite's costs: 4 for a substitution, 3 for a deletion or an insertion."""
    row = [3 * j for j in range(len(hyp) + 1)]
    for i, r in enumerate(ref, start=1):
        diagonal, row[0] = row[0], 3 * i
        for j, h in enumerate(hyp, start=1):
            best = min(diagonal + (0 if r == h else 4), row[j] + 3, row[j - 1] + 3)
            diagonal, row[j] = row[j], best
    return row[-1]


@needs_sclite
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=st.lists(st.tuples(LINE, LINE), min_size=1, max_size=25))
def test_any_words_are_counted_as_an_independent_alignment_counts_them(
    tmp_path: Path, pairs: list[tuple[list[str], list[str]]]
) -> None:
    refs = {f"u{i}": ref for i, (ref, _) in enumerate(pairs)} | {"last": ["a"]}
    hyps = {f"u{i}": hyp for i, (_, hyp) in enumerate(pairs)} | {"last": ["a"]}
    result = score(refs=refs, hyps=hyps, out_dir=tmp_path / "score")
    for utt, counts in result.utterances.items():
        assert counts.reference == len(refs[utt])
        assert counts.correct + counts.substitutions + counts.insertions == len(hyps[utt])
        cost = 4 * counts.substitutions + 3 * (counts.deletions + counts.insertions)
        assert cost == weighted_distance(refs[utt], hyps[utt])
    assert result.total.errors == sum(c.errors for c in result.utterances.values())


@needs_sclite
def test_each_nasty_word_is_right_against_itself_and_wrong_against_another(tmp_path: Path) -> None:
    refs = {f"u{i:03d}": ["x", word, "y"] for i, word in enumerate(NASTY)}
    same = score(refs=refs, hyps=refs, out_dir=tmp_path / "same")
    assert all((c.correct, c.errors) == (3, 0) for c in same.utterances.values())
    hyps = {utt: ["x", word + "z", "y"] for utt, (_, word, _) in refs.items()}
    other = score(refs=refs, hyps=hyps, out_dir=tmp_path / "other")
    assert all((c.correct, c.substitutions, c.errors) == (2, 1, 1) for c in other.utterances.values())
    pra = (tmp_path / "other" / "result.pra").read_text(encoding="utf-8")
    dtl = (tmp_path / "other" / "result.dtl").read_text(encoding="utf-8")
    for word in NASTY:
        assert f" {word} " in pra
        assert f"{word} ==> {word}z" in dtl


@needs_sclite
def test_ids_and_speakers_may_hold_anything_printable(tmp_path: Path) -> None:
    ids = ["u", "U", "u-1", "u_1", "a(b)", "é", "a)b", "%75", "{x}", ";;", "u" * 500]
    refs = {utt: [f"w{i}", "b"] for i, utt in enumerate(ids)}
    speakers = {utt: ["s-1", "s_1", "(s)", "S-1"][i % 4] for i, utt in enumerate(ids)}
    result = score(refs=refs, hyps=refs, out_dir=tmp_path / "s", speakers=speakers)
    assert list(result.utterances) == sorted(ids)
    assert (result.total.correct, result.total.errors) == (22, 0)
    hyps = {**refs, "U": ["w1", "B"]}
    wrong = score(refs=refs, hyps=hyps, out_dir=tmp_path / "s", speakers=speakers)
    assert [utt for utt, c in wrong.utterances.items() if c.errors] == ["U"]


@needs_sclite
def test_empty_lines_on_either_side(tmp_path: Path) -> None:
    refs = {"a": ["x", "y"], "b": [], "c": [], "d": ["z"]}
    hyps = {"a": [], "b": ["q"], "c": [], "d": ["z"]}
    total = score(refs=refs, hyps=hyps, out_dir=tmp_path / "s").total
    assert (total.correct, total.substitutions, total.deletions, total.insertions) == (1, 0, 2, 1)


@needs_sclite
def test_a_very_long_utterance_and_a_very_long_word(tmp_path: Path) -> None:
    ref = [f"w{i % 97}" for i in range(1500)]
    hyp = [*ref[:1000], *ref[1010:]]
    total = score(refs={"u": [*ref, "你" * 5000]}, hyps={"u": [*hyp, "你" * 4999]}, out_dir=tmp_path / "s").total
    assert (total.deletions, total.substitutions, total.insertions) == (10, 1, 0)


@needs_sclite
def test_case_and_unicode_form_count(tmp_path: Path) -> None:
    total = score(refs={"u": ["Word", "é"]}, hyps={"u": ["word", "e\u0301"]}, out_dir=tmp_path / "s").total
    assert total.substitutions == 2


@needs_sclite
def test_ids_that_do_not_join_are_errors_that_name_them(tmp_path: Path) -> None:
    refs = {f"u{i:02d}": ["a"] for i in range(20)}
    with pytest.raises(ScoringError, match=r"1 of 20 utterances have no hypothesis: u07"):
        score(refs=refs, hyps={utt: ["a"] for utt in refs if utt != "u07"}, out_dir=tmp_path / "s")
    with pytest.raises(ScoringError, match=r"have no reference: x9"):
        score(refs=refs, hyps={**refs, "x9": ["a"]}, out_dir=tmp_path / "s", allow_missing=True)
    with pytest.raises(ScoringError, match=r"and 10 more"):
        score(refs=refs, hyps={}, out_dir=tmp_path / "s")
    assert not (tmp_path / "s").exists()
    result = score(refs=refs, hyps={utt: ["a"] for utt in refs if utt != "u07"}, out_dir=tmp_path / "s", allow_missing=True)
    assert (result.missing, result.total.deletions, result.rate) == (["u07"], 1, 5.0)


@needs_sclite
def test_references_without_words_have_no_error_rate(tmp_path: Path) -> None:
    for refs in ({"u": []}, {}):
        with pytest.raises(ScoringError, match="reference"):
            score(refs=refs, hyps=refs, out_dir=tmp_path / "s")


def fake(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_another_program_called_sclite_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPEECHTX_SCLITE", fake(tmp_path / "sclite", "echo single cell toolkit"))
    with pytest.raises(ScoringError, match="does not answer as NIST's sclite"):
        find_sclite()
    monkeypatch.setenv("SPEECHTX_SCLITE", str(tmp_path / "nowhere"))
    with pytest.raises(ScoringError, match="not there"):
        find_sclite()


@needs_sclite
@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("$REAL \"$@\"; exit 3", "failed with status 3"),
        ("$REAL \"$@\" | sed 's/Successful/Failed/'", "failed with status 0"),
        ("$REAL \"$@\" && sed -i 's/^S,/C,/' result.sgml", "contradicts itself on utterance"),
        ("$REAL \"$@\" && sed -i '/^Percent Subst/s/1)/7)/' result.dtl", "contradicts itself"),
        ("$REAL \"$@\" && sed -i '/PATH id/,$d' result.sgml", "left out 1 utterances"),
        ("sed -i s/b/a/ ref.trn; $REAL \"$@\"", "did not read utterance u as it was written"),
    ],
)  # fmt: skip
def test_an_sclite_that_fails_or_contradicts_itself_gives_no_score(
    script: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = find_sclite().path
    script = f"REAL={real}\n[ $# -gt 0 ] || exec $REAL\n{script}"
    monkeypatch.setenv("SPEECHTX_SCLITE", fake(tmp_path / "sclite", script))
    with pytest.raises(ScoringError, match=message):
        score(refs={"u": ["b", "a"]}, hyps={"u": ["c", "a"]}, out_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def write_text(path: Path, rows: dict[str, str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{utt} {text}".rstrip() + "\n" for utt, text in rows.items()), encoding="utf-8")
    return path


@needs_sclite
def test_the_verb_writes_score_json_with_counts_by_utterance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ref = write_text(tmp_path / "data" / "test" / "text", {"u1": "HELLO WORLD", "u2": "A (B) 你好"})
    hyp = write_text(tmp_path / "exp" / "text", {"u1": "HELLO WORD", "u2": ""})
    for unit, errors, reference in (("wer", 4, 5), ("cer", 9, 19)):
        out = tmp_path / "exp" / f"score_{unit}"
        assert main.main(["score", "--ref", str(ref), "--hyp", str(hyp), "--out", str(out), "--unit", unit]) == 0
        found = json.loads((out / "score.json").read_text(encoding="utf-8"))
        assert (found["unit"], found["errors"], found["reference_units"], found["utterances"]) == (unit, errors, reference, 2)
        assert found["rate"] == pytest.approx(100 * errors / reference)
        assert (found["set"], found["reference_words"], found["missing"]) == ("test", 5, [])
        assert [sum(c) for c in zip(*found["counts"].values(), strict=True)] == [
            found[k] for k in ("correct", "sub", "del", "ins")
        ]
        assert {f"result.{e}" for e in ("sys", "raw", "dtl", "pra", "sgml")} <= {p.name for p in out.iterdir()}
    assert "WER 80.00 %" in capsys.readouterr().out


def test_folded_text_is_not_split_by_a_tokenizer_that_knows_cased_pieces(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ref = write_text(tmp_path / "text", {"u1": "HELLO"})
    out = tmp_path / "score"
    arguments = ["--ref", str(ref), "--hyp", str(ref), "--out", str(out), "--unit", "ter", "--tokenizer", str(tmp_path)]
    assert main.main(["score", *arguments, "--ignore-case"]) == 1
    assert "--ignore-case" in capsys.readouterr().err and not out.exists()


@needs_sclite
def test_a_duplicate_id_in_the_hypotheses_is_an_error_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ref = write_text(tmp_path / "text", {"u1": "A"})
    hyp = tmp_path / "hyp"
    hyp.write_text("u1 A\nu1 B\n")
    assert main.main(["score", "--ref", str(ref), "--hyp", str(hyp), "--out", str(tmp_path / "s")]) == 1
    message = capsys.readouterr().err
    assert "hyp:2" in message
    assert "u1" in message


def test_the_space_between_words_is_one_character() -> None:
    assert split_characters("AB C") == ["A", "B", "<space>", "C"]
