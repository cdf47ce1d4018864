"""What the pages say is what a user will see: messages, modules, links, and the program of the README."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
from test_decode import make_exp, recording

from speechtx.config.decode import DecodeConfig
from speechtx.config.load import load_config
from speechtx.search.transcribe import load_recognizer

ROOMS = ["attention", "config", "data", "experiment", "frontend", "model", "report", "scoring", "search", "text", "training"]
QUOTED = re.compile(r"^\| `([^`]+)` \|", re.MULTILINE)


def test_every_message_in_the_table_of_errors_is_one_of_ours(repo: Path) -> None:
    messages = QUOTED.findall((repo / "docs/errors.md").read_text(encoding="utf-8"))
    assert len(messages) > 20
    files = [*repo.glob("speechtx/**/*.py"), *repo.glob("utils/**/*.sh"), *repo.glob("egs/TEMPLATE/asr1/local/*.sh")]
    source = "\n".join(path.read_text(encoding="utf-8") for path in files)
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # a message that is written over two lines
    assert not [message for message in messages if message not in source]


@pytest.mark.parametrize("room", ROOMS)
def test_every_module_stands_in_the_picture_of_its_room(repo: Path, room: str) -> None:
    page = (repo / "docs/architecture.md").read_text(encoding="utf-8")
    drawn, reading = "", ""
    for line in page[page.index("┌──") : page.index("└──")].splitlines():
        if begins := re.match(r" │ (?:floor +\S+ +|ground +| +)(\w+)/ ", line):
            reading = begins[1]
        drawn += line if reading == room else ""
    modules = {path.stem.removeprefix("kaldi_dir_") for path in repo.glob(f"speechtx/{room}/[a-z]*.py")}
    words = {word.lstrip("_") for word in re.findall(r"\w+", drawn)}
    assert not sorted(modules - words)


def test_links_between_the_pages_lead_somewhere(repo: Path) -> None:
    for page in repo.glob("docs/*.md"):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_python_of_the_readme_runs_as_it_stands(repo: Path, tmp_path: Path) -> None:
    (program,) = re.findall(r"^```python\n(.*?)^```$", (repo / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    recipe = tmp_path / "egs/mini/asr1"
    make_exp(recipe / "exp/train")
    (recipe / "conf").mkdir()
    shutil.copy(repo / "egs/mini/asr1/conf/decode.yaml", recipe / "conf")
    soundfile.write(tmp_path / "a.wav", recording(1, 0.5), 16000, subtype="PCM_16")
    environment = {**os.environ, "PYTHONPATH": str(repo)}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    decode = load_config(recipe / "conf/decode.yaml", DecodeConfig)
    recognizer = load_recognizer(recipe / "exp/train", decode=decode)
    assert done.stdout == f"{recognizer.transcribe(tmp_path / 'a.wav')}\n" and done.stdout.strip()
