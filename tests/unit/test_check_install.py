"""tools/check_install.py must never call a broken installation good, nor NIST's sclite something else."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from speechtx.scoring.sclite import find_sclite

# A table as sclite prints it; the counts of the pair of lines that check_install.py has it score are {counts}.
SCLITE = """#!/bin/sh
if [ $# -eq 0 ]; then echo 'sclite Version: 2.10, SCTK Version: 1.3'; exit 1; fi
echo '| Sum  |    2      6 |  {counts} |'
"""


@pytest.fixture(scope="module")
def check(repo: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_install", repo / "tools/check_install.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_install"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def program(folder: Path, text: str) -> Path:
    path = folder / "sclite"
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return path


def test_the_real_sclite_is_recognised(check: ModuleType) -> None:
    candidates = check.sclite_candidates()
    if not candidates:
        pytest.skip("no sclite on this machine: tools/install_sctk.sh")
    assert "counts right" in check.verify_sclite(candidates[0])


@pytest.mark.parametrize("named", [False, True])
def test_it_looks_at_the_sclite_that_scoring_will_use(
    check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    on_path = program(tmp_path, SCLITE.format(counts="4 1 1 1 3 2"))
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("SPEECHTX_SCLITE", raising=False)
    if named:
        (tmp_path / "named").mkdir()
        monkeypatch.setenv("SPEECHTX_SCLITE", str(program(tmp_path / "named", on_path.read_text())))
    assert check.sclite_candidates()[0] == find_sclite().path


def test_a_program_with_the_right_banner_and_counts_is_accepted(check: ModuleType, tmp_path: Path) -> None:
    good = program(tmp_path, SCLITE.format(counts="4 1 1 1 3 2"))
    assert check.verify_sclite(good).startswith("2.10 (SCTK 1.3)")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("#!/bin/sh\necho 'scLite 0.9: single-cell toolkit'\n", "not NIST's"),
        ("#!/bin/sh\nexit 0\n", "not NIST's"),
        (SCLITE.format(counts="4 2 0 1 3 2"), "miscounts"),
        (SCLITE.format(counts=""), "miscounts"),
        ("not a program at all", "cannot be run"),
    ],
)
def test_another_program_called_sclite_is_refused(check: ModuleType, tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(check.BrokenError, match=reason):
        check.verify_sclite(program(tmp_path, text))


def test_a_broken_sclite_on_path_does_not_hide_a_good_one(
    check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "good").mkdir()
    bad = program(tmp_path / "bad", "#!/bin/sh\n")
    good = program(tmp_path / "good", SCLITE.format(counts="4 1 1 1 3 2"))
    monkeypatch.setattr(check, "sclite_candidates", lambda: [bad, good])
    assert str(good) in check.probe_sclite()


def test_without_sclite_the_exit_status_says_so(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "sclite_candidates", list)
    assert check.main(["--sclite"]) == 1
    captured = capsys.readouterr()
    assert "MISSING" in captured.out and "tools/install_sctk.sh" in captured.out
    assert "sclite" in captured.err


def test_the_biology_package_of_the_same_name_is_named_as_the_cause(check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "sclite_candidates", list)
    monkeypatch.setattr(check.importlib.metadata, "version", lambda name: "1.0")
    with pytest.raises(check.NotThereError, match="biology"):
        check.probe_sclite()


def test_a_library_that_does_not_load_is_a_row_and_not_a_crash(check: ModuleType) -> None:
    def probe() -> str:
        raise OSError("libcudart.so.13: cannot open shared object file\nmore lines")

    part = check.Part(name="torchaudio", why="fbank", fix="tools/install.sh", probe=probe)
    row = check.examine(part)
    assert row.failed and row.status == "BROKEN" and row.version == "libcudart.so.13: cannot open shared object file"
    assert "tools/install.sh" in check.render([row], colour=False)


def test_an_optional_part_that_is_missing_does_not_fail_the_check(check: ModuleType) -> None:
    probe = check.package("no-such-distribution", "no_such_module", quick=True)
    assert check.examine(check.Part(name="x", why="y", fix="z", probe=probe, required=False)).status == "optional"
    assert check.examine(check.Part(name="x", why="y", fix="z", probe=probe)).status == "MISSING"


def test_metadata_without_the_module_is_a_broken_package(check: ModuleType) -> None:
    row = check.examine(check.Part(name="x", why="y", fix="z", probe=check.package("numpy", "no_such_module", quick=True)))
    assert row.status == "BROKEN"


def test_an_old_python_is_refused(check: ModuleType) -> None:
    with pytest.raises(check.BrokenError, match=r"3\.10\.4"):
        check.probe_python((3, 10, 4))


def test_colours_only_when_asked_for(check: ModuleType) -> None:
    row = check.Row(name="torch", status="MISSING", version="-", why="model")
    assert "\033" not in check.render([row], colour=False)
    assert "\033[31m" in check.render([row], colour=True)


def test_on_a_python_without_any_package_it_still_prints_the_table(repo: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(repo / "tools/check_install.py")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    rows = {line.split()[0]: line.split()[1] for line in done.stdout.splitlines()[1:] if not line.startswith(" ")}
    assert rows["torch"] == rows["numpy"] == "MISSING"
    assert rows["python"] == "ok" and rows["torchaudio"] == "optional"


def test_every_dependency_of_setup_py_is_looked_at(check: ModuleType, repo: Path) -> None:
    tree = ast.parse((repo / "setup.py").read_text(encoding="utf-8"))
    assigned = {
        node.targets[0].id: node.value for node in tree.body if isinstance(node, ast.Assign) and hasattr(node.targets[0], "id")
    }
    wanted = {spec.split(">")[0] for spec in ast.literal_eval(assigned["REQUIRES"])}
    extras = ast.literal_eval(assigned["EXTRAS"])
    wanted |= {spec.split(">")[0] for extra in ("mini", "torchaudio") for spec in extras[extra]}
    assert {part.name for part in check.packages(quick=True)} - {"python", "speechtx"} == wanted
