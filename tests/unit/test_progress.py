"""Progress bars are for people who look: in a log, a bar is a thousand lines of noise."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
SOURCES = [path for folder in ("speechtx", "utils", "egs", "tools") for path in sorted((REPO / folder).rglob("*.py"))]
BARS = [
    pytest.param(call, id=f"{path.relative_to(REPO)}:{call.lineno}")
    for path in SOURCES
    if "tqdm" in (source := path.read_text(encoding="utf-8"))
    for call in ast.walk(ast.parse(source))
    if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "tqdm"
]


@pytest.mark.parametrize("call", BARS)
def test_no_bar_is_drawn_where_nobody_looks(call: ast.Call) -> None:
    disable = [keyword.value for keyword in call.keywords if keyword.arg == "disable"]
    assert [getattr(value, "value", ...) for value in disable] == [None], "tqdm needs disable=None: silent outside a terminal"


def test_the_bars_are_found() -> None:
    assert len(BARS) >= 5
