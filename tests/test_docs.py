"""What the documentation promises is tested where it says so."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from conftest import ROOT

PAGE = ROOT / "docs" / "what-happens-when.md"
TEST = re.compile(r"`([\w/]+\.py)::(\w+)`")


def rows(text: str) -> list[list[str]]:
    """The cells of every line of the page's tables, headings and rules left out."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if row[0] != "when" and set(row[0]) != {"-"}]


def defined(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", rows(PAGE.read_text(encoding="utf-8")), ids=lambda row: row[0][:60])
def test_each_line_names_tests_that_are_there(row: list[str]) -> None:
    assert len(row) == 3
    named = TEST.findall(row[2])
    assert named, row[0]
    for file, function in named:
        assert function in defined(ROOT / "tests" / file), f"{file}::{function}"


def test_the_page_has_lines_and_is_linked() -> None:
    assert len(rows(PAGE.read_text(encoding="utf-8"))) > 30
    assert "docs/what-happens-when.md" in (ROOT / "README.md").read_text(encoding="utf-8")
