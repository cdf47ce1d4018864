"""What makes a finished stage run again, and what does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from speechtx.bin import main as front
from speechtx.bin import stamp as stamp_verb
from speechtx.bin.stamp import config_values, path_digest

YAML = """\
# how it was trained
seed: 1
model:
  encoder: {layers: 3, dim: 64}   # flow style
  "ctc_weight": 0.3
training:
  epochs: 20
  optimizer:
    betas:
      - 0.9
      - 0.98
    lr: 1e-3
  average:
    num: 5
tokenizer:
  user_symbols: ['<a#b>']
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(YAML)
    Path("text").write_text("a HELLO\n")
    return tmp_path


def begin(capsys: pytest.CaptureFixture[str], *arguments: str, file: str = "s/x.json") -> str:
    assert front.main(["stamp", "begin", "--stamp", file, *arguments]) == 0
    return capsys.readouterr().out.strip()


def end(file: str = "s/x.json") -> None:
    assert front.main(["stamp", "end", "--stamp", file]) == 0


def test_first_then_interrupted_then_skip(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert begin(capsys, "--in", "text") == "first"
    assert begin(capsys, "--in", "text") == "interrupted"
    end()
    assert begin(capsys, "--in", "text").startswith("skip 20")
    assert begin(capsys, "--in", "text").startswith("skip 20")


def test_changed_content_is_named_and_a_new_time_alone_is_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin(capsys, "--in", "text")
    end()
    os.utime("text", (1, 1))
    assert begin(capsys, "--in", "text").startswith("skip")
    Path("text").write_text("a BYE\n")
    assert begin(capsys, "--in", "text") == "changed text"
    assert begin(capsys, "--in", "text") == "interrupted", "a stage that began is not finished"


def test_a_file_that_appears_or_goes_is_a_change(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin(capsys, "--in", "text", "--in", "segments")
    end()
    Path("segments").write_text("")
    assert begin(capsys, "--in", "text", "--in", "segments") == "changed segments"
    end()
    Path("segments").unlink()
    assert begin(capsys, "--in", "text", "--in", "segments") == "changed segments"


def test_a_file_that_the_configuration_names_counts_by_its_content(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("d.yaml").write_text("model:\n  intermediate_ctc:\n    lexicon: text\n")
    read = ["--config", "d.yaml:model", "--names", "model.intermediate_ctc.lexicon"]
    begin(capsys, *read)
    end()
    assert begin(capsys, *read).startswith("skip")
    Path("text").write_text("a BYE\n")
    assert begin(capsys, *read) == "changed text"
    end()
    assert begin(capsys, "--config", "c.yaml:seed", "--names", "model.intermediate_ctc.lexicon").startswith("changed")
    end()
    assert begin(capsys, "--config", "c.yaml:seed", "--names", "model.intermediate_ctc.lexicon").startswith("skip")


def test_a_file_named_in_quotes_or_by_an_override_counts_and_flow_style_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def named(text: str, *overrides: str) -> tuple[int, str]:
        Path("d.yaml").write_text(text)
        sets = [word for override in overrides for word in ("--set", override)]
        status = front.main(["stamp", "named", "--config", "d.yaml", *sets, "--names", "training.join.words"])
        captured = capsys.readouterr()
        return status, (captured.out + captured.err).strip()

    block = "training:\n  join:\n    words: 'a/words'\n    ratio: 1\n"
    assert named(block) == (0, "a/words")
    assert named(block, "training.join.words=b") == (0, "b")
    assert named(block, "training.join=null") == (0, "")
    assert named("training:\n  epochs: 3\n") == (0, "")
    assert named("training:\n  join: null\n") == (0, "")
    status, message = named("training:\n  join: {words: a}\n")
    assert status == 1 and "training.join: write it as a block" in message


def test_an_input_that_is_new_to_the_stage_is_a_change(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin(capsys, "--in", "text", "--value", "seed=1")
    end()
    assert begin(capsys, "--in", "text", "--value", "seed=2") == "changed --seed"
    end()
    assert begin(capsys, "--in", "text") == "changed --seed"


def test_a_result_that_another_stage_wrote_over_is_made_again_and_one_written_alike_is_not(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--in", "text", "--result", "made", "--result", "other")
    assert begin(capsys, *arguments) == "first"
    Path("made").write_text("80 bins")
    Path("other").write_text("80 bins")
    end()
    Path("made").write_text("80 bins")
    assert begin(capsys, *arguments).startswith("skip")
    Path("made").write_text("40 bins")
    assert begin(capsys, *arguments) == "changed made"
    end()
    assert begin(capsys, *arguments).startswith("skip"), "as the stage left it this time"
    Path("made").unlink()
    assert begin(capsys, *arguments) == "changed made"


def test_a_stamp_from_before_results_were_recorded_still_counts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin(capsys, "--in", "text")
    end()
    assert begin(capsys, "--in", "text", "--result", "made").startswith("skip")


def test_large_files_count_by_size_and_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stamp_verb, "HASHED_BYTES", 4)
    before = path_digest(Path("text"))
    os.utime("text", (1, 1))
    assert path_digest(Path("text")) != before


def test_a_folder_counts_by_names_and_contents(folder: Path) -> None:
    Path("local").mkdir()
    Path("local/data.sh").write_text("1")
    first = path_digest(Path("local"))
    Path("local/__pycache__").mkdir()
    Path("local/__pycache__/x.pyc").write_text("1")
    assert path_digest(Path("local")) == first
    Path("local/data.sh").rename("local/prepare.sh")
    renamed = path_digest(Path("local"))
    assert renamed != first
    Path("local/prepare.sh").write_text("2")
    assert path_digest(Path("local")) not in (first, renamed)


def test_only_the_named_sections_count_and_comments_and_order_do_not(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin(capsys, "--config", "c.yaml:training")
    end()
    head, tail = YAML.split("training:")
    Path("c.yaml").write_text("training:" + tail.replace("epochs: 20", "epochs:   20  # enough") + head.replace("64", "128"))
    assert begin(capsys, "--config", "c.yaml:training").startswith("skip")
    Path("c.yaml").write_text(YAML.replace("0.98", "0.999"))
    assert begin(capsys, "--config", "c.yaml:training") == "changed training.optimizer.betas in c.yaml"


def test_soft_keys_extend_but_hard_ones_win(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--config", "c.yaml:model,training", "--soft", "training.epochs", "--soft", "training.average")
    begin(capsys, *options)
    end()
    Path("c.yaml").write_text(YAML.replace("epochs: 20", "epochs: 30").replace("num: 5", "num: 3"))
    assert begin(capsys, *options) == "extended training.average.num in c.yaml, training.epochs in c.yaml"
    end()
    Path("c.yaml").write_text(YAML.replace("epochs: 20", "epochs: 40").replace('ctc_weight": 0.3', 'ctc_weight": 0.5'))
    assert begin(capsys, *options) == "changed model.ctc_weight in c.yaml"


def test_overrides_count_as_if_they_stood_in_the_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin(capsys, "--config", "c.yaml:training", "--set", "training.epochs=30")
    end()
    Path("c.yaml").write_text(YAML.replace("epochs: 20", "epochs: 30"))
    assert begin(capsys, "--config", "c.yaml:training").startswith("skip")
    assert begin(capsys, "--config", "c.yaml:training", "--set", "model.ctc_weight=1").startswith("skip")
    assert begin(capsys, "--config", "c.yaml:training", "--set", "training.optimizer=null").startswith(
        "changed training.optimizer"
    )


def test_anchors_make_the_whole_file_count(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("base: &b\n  dim: 64\nmodel:\n  <<: *b\n")
    assert "base.dim" in config_values(path, "model")


def test_values_are_read_as_written() -> None:
    values = config_values_of(YAML)
    assert values["model.encoder"] == "{layers: 3, dim: 64}"
    assert values["model.ctc_weight"] == "0.3"
    assert values["tokenizer.user_symbols"] == "['<a#b>']"
    assert values["training.optimizer.lr"] == "1e-3"
    assert config_values_of("a:\n  b: 1\nc: 2\n") == {"a.b": "1", "c": "2"}


def config_values_of(text: str) -> dict[str, str]:
    import tempfile

    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(text)
        file.flush()
        return config_values(Path(file.name), "")


def test_every_key_of_the_recipes_configurations_is_seen(repo: Path) -> None:
    """The small reader agrees with YAML about the keys of every file it will meet."""
    import yaml

    def leaves(tree: object, prefix: str = "") -> set[str]:
        if isinstance(tree, dict) and tree:
            return {leaf for key, value in tree.items() for leaf in leaves(value, f"{prefix}.{key}" if prefix else str(key))}
        return {prefix}

    files = sorted(repo.glob("egs/*/asr1/conf/**/*.yaml"))
    assert len(files) >= 12
    for path in files:
        assert set(config_values(path, "")) == leaves(yaml.safe_load(path.read_text())), path


def test_a_stage_that_ran_again_makes_the_next_one_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin(capsys, file="s/data.json")
    end("s/data.json")
    begin(capsys, "--after", "s/data.json")
    end()
    assert begin(capsys, "--after", "s/data.json").startswith("skip")
    begin(capsys, "--force", file="s/data.json")
    end("s/data.json")
    assert begin(capsys, "--after", "s/data.json") == "changed stage data"


def test_missing_output_and_force_run_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin(capsys, "--out", "text")
    end()
    assert begin(capsys, "--out", "text", "--force") == "changed --force"
    end()
    Path("text").unlink()
    assert begin(capsys, "--out", "text") == "missing text"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"inputs": 3, "finished": ""}', "null"])
def test_a_damaged_stamp_runs_the_stage_again(folder: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    Path("s").mkdir()
    Path("s/x.json").write_text(content)
    assert begin(capsys, "--in", "text") == "first"
    end()
    assert json.loads(Path("s/x.json").read_text())["finished"]


def test_ending_what_never_began_is_an_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert front.main(["stamp", "end", "--stamp", "s/x.json"]) == 1
    assert "no such stamp" in capsys.readouterr().err


def test_it_starts_without_heavy_imports(folder: Path) -> None:
    code = (
        "import sys\nfrom speechtx.bin.main import main\nmain(['stamp', 'begin', '--stamp', 'x.json', '--config', 'c.yaml'])\n"
        "assert not {'torch', 'numpy', 'pydantic', 'yaml'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
