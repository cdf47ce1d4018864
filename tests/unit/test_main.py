"""The command line's front door."""

from __future__ import annotations

import importlib
import subprocess
import sys
import types

import pytest

from speechtx import __version__
from speechtx.bin import main as front
from speechtx.config.errors import DataError


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A stand-in for the module of verb `cmvn`."""
    module = types.ModuleType("speechtx.bin.cmvn", "Does a thing.")
    module.add_arguments = lambda parser: parser.add_argument("--data", required=True)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "speechtx.bin.cmvn", module)
    return module


def test_help_lists_every_verb_once_with_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert front.main(["--help"]) == 0
    out = capsys.readouterr().out
    verbs = [verb for _, verbs in front.VERBS for verb in verbs]
    assert len(verbs) == len(set(verbs))
    for verb in verbs:
        assert sum(line.split()[:1] == [verb] for line in out.splitlines()) == 1


@pytest.mark.parametrize("name", [verb for _, verbs in front.VERBS for verb in verbs])
def test_every_verb_has_a_module_that_teaches_itself_without_heavy_imports(name: str) -> None:
    code = (
        "import sys\n"
        "from speechtx.bin.main import main\n"
        "try:\n"
        f"    main(['{name}', '--help'])\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'yaml', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: speechtx {name}")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert front.main(["--version"]) == 0
    assert capsys.readouterr().out == f"speechtx {__version__}\n"


def test_an_unknown_verb_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert front.main(["trian"]) == 2
    assert "unknown verb 'trian'; did you mean 'train'?" in capsys.readouterr().err
    assert front.main(["xyzzy"]) == 2
    assert "did you mean" not in capsys.readouterr().err


def test_no_verb_is_a_wrong_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert front.main([]) == 2
    assert "usage: speechtx VERB" in capsys.readouterr().err


def test_an_error_of_the_input_is_one_message_and_status_1(verb: types.ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    def run(args: object) -> int:
        raise DataError("data/train/text:3: no transcript")

    verb.run = run  # type: ignore[attr-defined]
    assert front.main(["cmvn", "--data", "x"]) == 1
    assert capsys.readouterr().err == "speechtx cmvn: error: data/train/text:3: no transcript\n"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(13, "Permission denied", "exp/a"), "exp/a: Permission denied"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_a_full_disk_or_a_forbidden_folder_is_a_message(
    verb: types.ModuleType, capsys: pytest.CaptureFixture[str], error: OSError, message: str
) -> None:
    def run(args: object) -> int:
        raise error

    verb.run = run  # type: ignore[attr-defined]
    assert front.main(["cmvn", "--data", "x"]) == 1
    assert capsys.readouterr().err == f"speechtx cmvn: error: {message}\n"


def test_a_bug_of_ours_keeps_its_traceback(verb: types.ModuleType) -> None:
    def run(args: object) -> int:
        raise KeyError("ours")

    verb.run = run  # type: ignore[attr-defined]
    with pytest.raises(KeyError):
        front.main(["cmvn", "--data", "x"])


def test_ctrl_c_is_no_traceback(verb: types.ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    def run(args: object) -> int:
        raise KeyboardInterrupt

    verb.run = run  # type: ignore[attr-defined]
    assert front.main(["cmvn", "--data", "x"]) == 130
    assert capsys.readouterr().err == "speechtx cmvn: interrupted\n"


def test_a_wrong_option_is_status_2_and_abbreviations_are_not_guessed(verb: types.ModuleType) -> None:
    verb.run = lambda args: 0  # type: ignore[attr-defined]
    assert front.main(["cmvn", "--data", "x"]) == 0
    for words in (["cmvn"], ["cmvn", "--dat", "x"], ["cmvn", "--data", "x", "--more"]):
        with pytest.raises(SystemExit) as end:
            front.main(words)
        assert end.value.code == 2


def test_a_reader_that_stops_early_is_no_error() -> None:
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; '{sys.executable}' -m speechtx --help | head -1"], capture_output=True, text=True
    )
    assert done.stderr == ""


def test_the_table_names_modules_that_exist() -> None:
    for _, verbs in front.VERBS:
        for verb in verbs:
            assert importlib.util.find_spec(f"speechtx.bin.{verb}") is not None, verb
