"""Language models of a recipe: trained, killed and continued, measured, opened again, and refused where they do not fit."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from speechtx.bin import main as front
from speechtx.config.errors import ConfigError, DataError, ExperimentError, TrainingError
from speechtx.config.lm import LmConfig, NgramConfig, TransformerLmConfig
from speechtx.config.load import parse_config
from speechtx.config.schema import TokenizerConfig
from speechtx.experiment.language_model import load_language_model
from speechtx.model.language_model import TransformerLM
from speechtx.text.tokenizer import Tokenizer, train_tokenizer
from speechtx.training import lm_train
from speechtx.training.checkpoint import load_checkpoint
from speechtx.training.lm_text import read_text
from speechtx.training.lm_train import train_language_model
from speechtx.training.ngram import make_ngram
from speechtx.training.perplexity import perplexity

WORDS = ["ABC", "BAD", "CAB", "DAD", "ACE"]


def transformer(*overrides: str) -> TransformerLmConfig:
    tiny = "transformer: {layers: 2, dim: 16, heads: 2, ff_dim: 32, epochs: 3, tokens_per_batch: 130, max_tokens: 100}"
    config = parse_config(tiny, LmConfig, [f"transformer.{pair}" for pair in ("optimizer.lr=1e-2", *overrides)]).transformer
    assert config is not None
    return config


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Data directories whose sentences go round the words in order, and a character tokenizer."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name, count in (("train", 60), ("dev", 12)):
        (root / name).mkdir()
        rows = []
        for number in range(count):
            first = int(rng.integers(5))
            words = [WORDS[(first + i) % 5] for i in range(rng.integers(1, 6))]
            rows.append(f"s-{number:03d} {' '.join(words)}\n")
        (root / name / "text").write_text("".join(rows))
    train_tokenizer([" ".join(WORDS)], config=TokenizerConfig(type="char"), out_dir=root / "tokenizer")
    return {"train": root / "train", "dev": root / "dev", "tokenizer": root / "tokenizer"}


def tokens(data: dict[str, Path]) -> list[str]:
    return Tokenizer.load(data["tokenizer"]).pieces


def weights(out: Path) -> dict[str, torch.Tensor]:
    state = load_checkpoint(out / "checkpoints")
    assert state is not None
    return state["model"]


# ------------------------------------------------------------------------------------------------ the model


def test_a_token_a_step_gives_what_teacher_forcing_gives_also_after_reordering() -> None:
    torch.manual_seed(0)
    lm = TransformerLM(config=transformer(), vocab_size=12).eval()
    fed = torch.randint(1, 11, (4, 7))
    fed[:, 0] = 11
    with torch.inference_mode():
        whole = lm(fed)
        state, order = lm.start(4), torch.arange(4)
        for position in range(7):
            row, state = lm.step(fed[order, position], state)
            assert torch.allclose(row[:, 1:], whole[order, position, 1:], atol=1e-5)
            if position == 3:
                rows = torch.tensor([3, 1, 1])
                state, order = state.select(rows), order[rows]
    assert (row[:, 0] == -torch.inf).all(), "<blank> is never predicted"
    assert torch.allclose(row.exp().sum(dim=1), torch.ones(3), atol=1e-6)


def test_hypotheses_of_different_lengths_step_together_as_each_alone() -> None:
    torch.manual_seed(2)
    lm = TransformerLM(config=transformer(), vocab_size=12).eval()
    texts = [[11], [11], [11], [11]]
    with torch.inference_mode():
        scores, state = lm.step(torch.tensor([11] * 4), lm.start(4))
        for rows, parents, tokens in (
            ([2], [2], [3]),  # grown, in place of its parent
            ([1, 3], [2, 0], [4, 5]),
            ([0], [1], [6]),  # now of 4, 3, 2 and 2 tokens
            ([3, 2, 1], [0, 0, 3], [7, 8, 9]),
            ([0, 1, 2, 3], [0, 1, 2, 3], [2, 3, 4, 5]),
        ):
            grown, own = lm.step(torch.tensor(tokens), state.select(torch.tensor(parents)))
            state = state.put(torch.tensor(rows), own)
            longer = [[*texts[parent], token] for parent, token in zip(parents, tokens, strict=True)]
            for row, text, found in zip(rows, longer, grown, strict=True):
                texts[row] = text
                assert torch.allclose(found[1:], lm(torch.tensor([text]))[0, -1, 1:], atol=1e-5)
    assert len({len(text) for text in texts}) > 1
    order = torch.tensor([3, 0, 0])
    scores, _ = lm.step(torch.tensor([2, 2, 3]), state.select(order))
    for row, index, token in zip(scores, order.tolist(), [2, 2, 3], strict=True):
        assert torch.allclose(row[1:], lm(torch.tensor([[*texts[index], token]]))[0, -1, 1:], atol=1e-5)


def test_a_state_of_other_hypotheses_is_refused() -> None:
    lm = TransformerLM(config=transformer(), vocab_size=12).eval()
    with pytest.raises(ValueError, match="2 tokens for the state of 3 hypotheses"):
        lm.step(torch.tensor([1, 2]), lm.start(3))


# ------------------------------------------------------------------------------------------------ training


def test_a_transformer_learns_the_text_and_can_be_opened_again(data: dict[str, Path], tmp_path: Path) -> None:
    result = train_language_model(transformer("epochs=12"), **data, out=tmp_path / "lm")
    history = [json.loads(line) for line in (tmp_path / "lm/metrics.jsonl").read_text().splitlines()]
    assert history[-1]["dev"]["ppl"] < 0.5 * history[0]["dev"]["ppl"]
    best = min(history, key=lambda entry: entry["dev"]["loss"])
    assert result.per_token == pytest.approx(best["dev"]["ppl"], rel=1e-4), "model.pt is the epoch that predicts dev best"
    written = json.loads((tmp_path / "lm/perplexity.json").read_text())
    assert written["per_word"] == pytest.approx(result.per_word)
    lm = load_language_model(tmp_path / "lm", tokens=tokens(data))
    assert isinstance(lm, TransformerLM) and not lm.training
    assert "perplexity" in (tmp_path / "lm/train.log").read_text()


@pytest.mark.parametrize("steps", [1, 9, 16])
def test_killed_and_continued_training_ends_with_the_same_bits(
    data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    class Killed(BaseException):
        pass

    original = lm_train.LmTrainer.train_step

    def dying(self: lm_train.LmTrainer, *args: object) -> None:
        if self.step >= steps:
            raise Killed
        original(self, *args)  # type: ignore[arg-type]

    config = transformer("checkpoint_minutes=1e-9")
    train_language_model(config, **data, out=tmp_path / "straight")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(lm_train.LmTrainer, "train_step", dying)
        train_language_model(config, **data, out=tmp_path / "killed")
    train_language_model(config, **data, out=tmp_path / "killed")
    straight, killed = weights(tmp_path / "straight"), weights(tmp_path / "killed")
    assert straight.keys() == killed.keys() and all(torch.equal(straight[name], killed[name]) for name in straight)
    best = [torch.load(tmp_path / name / "model.pt", weights_only=True) for name in ("straight", "killed")]
    assert all(torch.equal(best[0][name], best[1][name]) for name in best[0])
    assert "continuing from the checkpoint" in (tmp_path / "killed/train.log").read_text()


def test_training_stops_when_dev_no_longer_improves_and_stays_stopped(data: dict[str, Path], tmp_path: Path) -> None:
    config = transformer("epochs=40", "patience=2", "optimizer.lr=0.1", "schedule.warmup_steps=0")
    for _ in range(2):
        train_language_model(config, **data, out=tmp_path / "lm")
        epochs = (tmp_path / "lm/metrics.jsonl").read_text().count("\n")
        assert epochs < 40
    log = (tmp_path / "lm/train.log").read_text()
    assert log.count("dev has not improved for 2 epochs") == 1


def test_a_directory_of_another_model_or_text_is_not_trained_on(data: dict[str, Path], tmp_path: Path) -> None:
    train_language_model(transformer("epochs=1"), **data, out=tmp_path / "lm")
    with pytest.raises(TrainingError, match=r"another configuration \(dim, seed\)"):
        train_language_model(transformer("epochs=1", "dim=32", "seed=2"), **data, out=tmp_path / "lm")
    with pytest.raises(TrainingError, match="trained on another text"):
        train_language_model(transformer("epochs=2"), **{**data, "train": data["dev"]}, out=tmp_path / "lm")
    with pytest.raises(TrainingError, match="measured on another text"):
        train_language_model(transformer("epochs=2"), **{**data, "dev": data["train"]}, out=tmp_path / "lm")
    train_language_model(transformer("epochs=2"), **data, out=tmp_path / "lm")
    assert (tmp_path / "lm/metrics.jsonl").read_text().count("\n") == 2


def test_weights_that_explode_stop_the_training_with_advice(data: dict[str, Path], tmp_path: Path) -> None:
    config = transformer("optimizer.lr=1e30", "schedule.warmup_steps=0", "max_nonfinite_steps=2")
    with pytest.raises(TrainingError, match=r"lower transformer\.optimizer\.lr"):
        train_language_model(config, **data, out=tmp_path / "lm")


def test_sentences_too_long_to_train_on_are_counted(data: dict[str, Path], tmp_path: Path) -> None:
    train_language_model(transformer("epochs=1", "max_tokens=10"), **data, out=tmp_path / "lm")
    assert "sentences of more than 10 tokens)" in (tmp_path / "lm/train.log").read_text()
    with pytest.raises(TrainingError, match=r"every sentence is longer than transformer\.max_tokens 1"):
        train_language_model(transformer("epochs=1", "max_tokens=1"), **data, out=tmp_path / "short")


# ------------------------------------------------------------------------------------------------ n-gram and perplexity


def test_an_ngram_is_measured_as_the_definition_says(data: dict[str, Path], tmp_path: Path) -> None:
    lines: list[str] = []
    result = make_ngram(NgramConfig(order=3), **data, out=tmp_path / "lm", say=lines.append)
    lm = load_language_model(tmp_path / "lm", tokens=tokens(data))
    tokenizer = Tokenizer.load(data["tokenizer"])
    log_prob, words, count = 0.0, 0, 0
    for line in (data["dev"] / "text").read_text().splitlines():
        sentence = line.split(" ", 1)[1]
        ids = tokenizer.encode(sentence)
        state = lm.start(1)
        for fed, scored in zip([lm.vocab_size - 1, *ids], [*ids, lm.vocab_size - 1], strict=True):
            row, state = lm.step(torch.tensor([fed]), state)  # type: ignore[arg-type]
            log_prob += float(row[0, scored])
        words, count = words + len(sentence.split()) + 1, count + len(ids) + 1
    assert result.per_token == pytest.approx(math.exp(-log_prob / count), rel=1e-5)
    assert result.per_word == pytest.approx(math.exp(-log_prob / words), rel=1e-5)
    assert any(line.startswith(f"{data['dev']}: perplexity {result.per_token:.2f} a token") for line in lines)


def test_both_kinds_agree_that_a_batch_is_only_a_batch(data: dict[str, Path], tmp_path: Path) -> None:
    """Sentences that end leave the batch; the others must not notice."""
    train_language_model(transformer("epochs=1"), **data, out=tmp_path / "transformer")
    make_ngram(NgramConfig(order=3), **data, out=tmp_path / "ngram", say=lambda line: None)
    tokenizer = Tokenizer.load(data["tokenizer"])
    together = read_text((data["dev"],), tokenizer)
    (tmp_path / "one.txt").write_text("ABC BAD\n")
    for kind in ("transformer", "ngram"):
        lm = load_language_model(tmp_path / kind, tokens=tokenizer.pieces)
        alone = 0.0
        for line in (data["dev"] / "text").read_text().splitlines():
            (tmp_path / "one.txt").write_text(line.split(" ", 1)[1] + "\n")
            alone += perplexity(lm, read_text((tmp_path / "one.txt",), tokenizer)).log_prob
        assert perplexity(lm, together).log_prob == pytest.approx(alone, rel=1e-5)


# ------------------------------------------------------------------------------------------------ texts


def test_texts_are_data_directories_and_plain_files(data: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(data["tokenizer"])
    (tmp_path / "more.txt").write_text("ABC  BAD\n\nCAB Z\n")
    text = read_text((data["dev"], tmp_path / "more.txt"), tokenizer)
    assert len(text.sentences) == 12 + 2 and text.unknown == 1
    assert text.sentences[-2] == tokenizer.encode("ABC BAD")


def test_a_text_that_cannot_be_meant_is_refused(data: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(data["tokenizer"])
    with pytest.raises(ConfigError, match="no such file or data directory"):
        read_text((tmp_path / "none.txt",), tokenizer)
    (tmp_path / "utt2spk").write_text("a s\n")
    (tmp_path / "text").write_text("a ABC\n")
    with pytest.raises(ConfigError, match="a data directory's table, whose utterance ids are no words; name the directory"):
        read_text((tmp_path / "text",), tokenizer)
    (tmp_path / "utt2spk").unlink()
    (tmp_path / "latin.txt").write_bytes(b"ABC\nB\xc4D\n")
    with pytest.raises(DataError, match=r"latin\.txt:2: not UTF-8"):
        read_text((tmp_path / "latin.txt",), tokenizer)
    (tmp_path / "reserved.txt").write_text("ABC\nA\u2581B\n")
    with pytest.raises(DataError, match=r"reserved\.txt:2: character U\+2581"):
        read_text((tmp_path / "reserved.txt",), tokenizer)
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(DataError, match=r"empty\.txt: no sentence in it"):
        read_text((tmp_path / "empty.txt",), tokenizer)


# ------------------------------------------------------------------------------------------------ opening


@pytest.fixture(scope="module")
def made(data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lm")
    make_ngram(NgramConfig(order=2), **data, out=out / "ngram", say=lambda line: None)
    return out


def test_a_model_over_other_tokens_is_refused(data: dict[str, Path], made: Path) -> None:
    pieces = tokens(data)
    other = [*pieces[:4], "X", *pieces[5:]]
    with pytest.raises(ExperimentError, match=rf"they differ from token 4 on \('{pieces[4]}' and 'X'\)"):
        load_language_model(made / "ngram", tokens=other)
    with pytest.raises(ExperimentError, match=rf"over {len(pieces)} tokens, but it is to score a model's {len(pieces) + 1}"):
        load_language_model(made / "ngram", tokens=[*pieces[:-1], "X", pieces[-1]])
    with pytest.raises(DataError, match=rf"ngram\.arpa:\d+: '{pieces[4]}' is no token of the tokenizer"):
        load_language_model(made / "ngram/ngram.arpa", tokens=other)


def test_what_is_no_model_is_told_apart(data: dict[str, Path], made: Path, tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match=r"no language model's directory; did you mean .*/ngram\?"):
        load_language_model(made, tokens=tokens(data))
    with pytest.raises(ExperimentError, match="no language model"):
        load_language_model(tmp_path / "none", tokens=tokens(data))
    Tokenizer.load(data["tokenizer"]).save(tmp_path / "half/tokenizer")
    with pytest.raises(ExperimentError, match="neither an ARPA file, nor a KenLM binary, nor a directory with"):
        load_language_model(tmp_path / "half", tokens=tokens(data))


# ------------------------------------------------------------------------------------------------ command line


def test_the_verb_makes_and_measures_models(data: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "lm.yaml").write_text("ngram: {order: 2}\n")
    options = ["--config", str(tmp_path / "lm.yaml"), *(w for name, path in data.items() for w in (f"--{name}", str(path)))]
    assert front.main(["lm", "ngram", *options, "--set", "ngram.order=3", str(tmp_path / "ngram")]) == 0
    assert "n-grams of order 1 to 3" in capsys.readouterr().out
    assert front.main(["lm", "perplexity", str(tmp_path / "ngram"), str(data["dev"])]) == 0
    assert f"{data['dev']}: perplexity" in capsys.readouterr().out
    assert front.main(["lm", "perplexity", str(tmp_path / "ngram/ngram.arpa"), str(data["dev"])]) == 1
    assert "holds no tokenizer; give --tokenizer" in capsys.readouterr().err
    assert front.main(["lm", "train", *options, str(tmp_path / "transformer")]) == 1
    assert "no section transformer" in capsys.readouterr().err


def test_the_texts_of_a_section_are_listed_for_the_recipe(
    data: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lm.yaml").write_text(f"ngram: {{text: [{data['train']}, more.txt]}}\ntransformer: {{}}\n")
    for section, listed in (("ngram", f"{data['train']}/text\nmore.txt\n"), ("transformer", "")):
        assert front.main(["lm", "texts", "--config", str(tmp_path / "lm.yaml"), section]) == 0
        assert capsys.readouterr().out == listed


def test_a_section_that_is_null_is_not_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "lm.yaml").write_text('"ngram": {order: 3}\nlexicon:\ntransformer: {layers: 1}\n')
    assert front.main(["lm", "sections", "--config", str(tmp_path / "lm.yaml")]) == 0
    assert capsys.readouterr().out == "ngram\ntransformer\n"
    (tmp_path / "lm.yaml").write_text("transformer: null\n")
    assert front.main(["lm", "sections", "--config", str(tmp_path / "lm.yaml")]) == 0
    assert capsys.readouterr().out == ""
