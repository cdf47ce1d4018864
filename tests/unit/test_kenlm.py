"""KenLM binaries score as the ARPA file they were built from; damaged and foreign ones are refused, and crash nothing."""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from speechtx.bin import main as front
from speechtx.config.errors import ConfigError, DataError
from speechtx.config.schema import TokenizerConfig
from speechtx.experiment.language_model import load_language_model
from speechtx.model.kenlm_lm import KenlmLM
from speechtx.text import kenlm_process
from speechtx.text.kenlm_binary import is_kenlm_binary, read_kenlm_binary
from speechtx.text.tokenizer import train_tokenizer

FILES = Path(__file__).with_name("reference") / "kenlm"  # build_binary probing|trie ngram.arpa ...; without_unk: less its <unk>
TOKENS = ["<blank>", "<unk>", *"abcdefgh", "<sos/eos>"]
END = len(TOKENS) - 1
needs_kenlm = pytest.mark.skipif(importlib.util.find_spec("kenlm") is None, reason="kenlm is not installed")


def opened(name: str | Path, tokens: list[str] = TOKENS) -> KenlmLM:
    lm = load_language_model(FILES / name, tokens=tokens)
    assert isinstance(lm, KenlmLM)
    return lm


def same_scores(a: torch.nn.Module, b: torch.nn.Module, *, vocab: int) -> None:
    """Feeds both the same 20 steps of 30 hypotheses, with blanks, unknowns and ends among them, reordered on the way."""
    generator = torch.Generator().manual_seed(0)
    states, tokens = [a.start(30), b.start(30)], torch.full((30,), vocab - 1)
    for step in range(20):
        (x, states[0]), (y, states[1]) = a.step(tokens, states[0]), b.step(tokens, states[1])
        assert y.dtype == torch.float32 and (y[:, 0] == -torch.inf).all()
        assert torch.allclose(x[:, 1:], y[:, 1:], atol=1e-5)
        rows = torch.randint(0, 30, (30,), generator=generator)
        tokens = torch.randint(0, vocab, (30,), generator=generator)
        states = [state.select(rows) for state in states]
        if step == 10:
            places = torch.tensor([3, 0])
            states = [state.put(places, state.select(torch.tensor([7, 5]))) for state in states]


@needs_kenlm
@pytest.mark.parametrize("name", ["probing.bin", "trie.bin"])
def test_a_binary_scores_as_its_arpa_file(name: str) -> None:
    same_scores(load_language_model(FILES / "ngram.arpa", tokens=TOKENS), opened(name), vocab=len(TOKENS))


@needs_kenlm
def test_tokens_that_a_binary_lacks_are_unknown_to_it_as_to_its_arpa_file() -> None:
    more = [*TOKENS[:-1], "zz", TOKENS[-1]]
    same_scores(load_language_model(FILES / "ngram.arpa", tokens=more), opened("trie.bin", more), vocab=len(more))


@needs_kenlm
def test_a_binary_of_this_machine_scores_as_its_arpa_file(tmp_path: Path) -> None:
    build = shutil.which("build_binary")
    if build is None:
        pytest.skip("KenLM's build_binary is not on PATH")
    command = [build, "trie", str(FILES / "ngram.arpa"), str(tmp_path / "new.bin")]
    subprocess.run(command, check=True, capture_output=True)
    same_scores(load_language_model(FILES / "ngram.arpa", tokens=TOKENS), opened(tmp_path / "new.bin"), vocab=len(TOKENS))


@needs_kenlm
def test_contexts_that_come_again_are_not_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = opened("trie.bin")
    _, state = lm.step(torch.full((5,), END), lm.start(5))
    first, _ = lm.step(torch.tensor([2, 2, 3, 3, 2]), state)
    monkeypatch.setattr(lm._process, "log10_probs", lambda contexts: pytest.fail("asked again"))
    again, _ = lm.step(torch.tensor([3, 2]), state.select(torch.tensor([0, 1])))
    assert torch.equal(again, first[[2, 0]])


@needs_kenlm
def test_little_memory_changes_nothing() -> None:
    lm = opened("trie.bin")
    lm._max_rows = 1
    same_scores(load_language_model(FILES / "ngram.arpa", tokens=TOKENS), lm, vocab=len(TOKENS))


@pytest.mark.parametrize("name", ["probing.bin", "trie.bin"])
def test_a_binary_over_other_tokens_or_words_is_refused_with_examples(name: str) -> None:
    with pytest.raises(DataError, match=r"8 of its 11 words are no tokens of the tokenizer, for example '[a-h]', '[a-h]'"):
        load_language_model(FILES / name, tokens=["<blank>", "<unk>", "AB", "C", "<sos/eos>"])


@needs_kenlm
def test_a_binary_without_unk_is_refused_if_it_lacks_tokens_and_only_then() -> None:
    assert opened("without_unk.bin").step(torch.tensor([END]), opened("without_unk.bin").start(1))[0].shape == (1, len(TOKENS))
    with pytest.raises(DataError, match=r"lacks 1 tokens, for example 'zz', and nothing tells that it knows <unk>"):
        opened("without_unk.bin", [*TOKENS[:-1], "zz", TOKENS[-1]])


def test_what_the_files_say_of_themselves() -> None:
    trie, probing, without = (read_kenlm_binary(FILES / f"{name}.bin") for name in ("trie", "probing", "without_unk"))
    assert (trie.order, trie.kind, trie.knows_unk) == (3, "trie", True) and probing.kind == "probing"
    assert trie.words is not None and set(trie.words) == {"<unk>", "<s>", "</s>", *"abcdefgh"} and trie.words[0] == "<unk>"
    assert without.words is not None and set(without.words) == set(trie.words) and not without.knows_unk
    assert is_kenlm_binary(FILES / "trie.bin") and not is_kenlm_binary(FILES / "ngram.arpa")


@pytest.mark.parametrize("name", ["probing.bin", "trie.bin"])
def test_a_file_that_was_cut_off_is_refused_at_any_length(tmp_path: Path, name: str) -> None:
    whole = (FILES / name).read_bytes()
    for length in range(34, len(whole), 41):
        (tmp_path / "cut.bin").write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"cut.bin: (a binary of KenLM of another version|damaged)"):
            load_language_model(tmp_path / "cut.bin", tokens=TOKENS)


def test_headers_that_cannot_be_are_refused(tmp_path: Path) -> None:
    whole = (FILES / "trie.bin").read_bytes()
    for at, value, message in ((88, 0, "order 0"), (88, 255, "order 255"), (96, 77, "kind 77"), (60, 1, "another version"),
                               (115, 200, "do not fit into"), (108, 12, "its list of 12 words is not complete")):  # fmt: skip
        damaged = bytearray(whole)
        damaged[at] = value
        (tmp_path / "x.bin").write_bytes(damaged)
        with pytest.raises(DataError, match=message):
            load_language_model(tmp_path / "x.bin", tokens=TOKENS)


@needs_kenlm
def test_damage_inside_ends_in_an_error_and_crashes_nothing(tmp_path: Path) -> None:
    whole = (FILES / "trie.bin").read_bytes()
    words = len(whole) - whole.index(b"<unk>\0")
    found = set()
    for at in range(132, len(whole) - words - 256, 160):
        damaged = bytearray(whole)
        damaged[at : at + 256] = b"\xff" * 256
        path = tmp_path / f"{at}.bin"
        path.write_bytes(damaged)
        try:
            lm = opened(path)
            state, tokens = lm.start(len(TOKENS)), torch.full((len(TOKENS),), END)
            for _ in range(3):
                scores, state = lm.step(tokens, state)
                assert not scores.isnan().any()
                tokens = torch.arange(len(TOKENS))
        except DataError as err:
            assert str(path) in str(err)
            found.add("crash" if "crashes KenLM (SIG" in str(err) else "other")
    assert "crash" in found, "some of these do crash KenLM"


@needs_kenlm
def test_a_model_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = opened("trie.bin")
    process = lm._process._process
    monkeypatch.setattr(kenlm_process, "_SECONDS", -0.7)  # and a second more for the one context
    os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(DataError, match=r"trie.bin: damaged: KenLM did not answer within 0 s"):
        lm.step(torch.tensor([END]), lm.start(1))
    process.wait()


@needs_kenlm
def test_its_process_ends_with_the_model() -> None:
    lm = opened("trie.bin")
    process = lm._process._process
    assert process.poll() is None
    del lm
    gc.collect()
    assert process.poll() is not None


def test_without_the_module_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "kenlm" else real(name, *rest))
    with pytest.raises(
        ConfigError, match=r"trie.bin: .* needs its Python module: .* -m pip install 'kenlm.*or give the ARPA file"
    ):
        load_language_model(FILES / "trie.bin", tokens=TOKENS)


@needs_kenlm
def test_perplexity_of_a_binary_is_that_of_its_arpa_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_tokenizer(["ab cd efgh"], config=TokenizerConfig(type="char"), out_dir=tmp_path / "tokenizer")
    (tmp_path / "text.txt").write_text("abba\n")
    shown = []
    for name in ("ngram.arpa", "trie.bin"):
        arguments = [
            "lm",
            "perplexity",
            "--tokenizer",
            str(tmp_path / "tokenizer"),
            str(FILES / name),
            str(tmp_path / "text.txt"),
        ]
        assert front.main(arguments) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] and "perplexity" in shown[0]
