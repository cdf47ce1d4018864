"""What docs/errors.md quotes is what a user will see."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

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
