"""Markdown from texts that may hold anything."""

from __future__ import annotations

import re
from collections.abc import Sequence


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are Markdown; a bar in one does not end it."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(headings), line(["---"] * len(headings)), *map(line, rows)]) + "\n"


def block(text: str, language: str) -> str:
    """Lines as they are."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}\n"


def code(text: str) -> str:
    """A text as it is, in a line of Markdown."""
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def plain(text: str) -> str:
    """A text in which no character means anything to Markdown or HTML."""
    return re.sub(r"([\\`*_{}\[\]<>#|&!~$])", r"\\\1", text)
