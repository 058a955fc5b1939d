"""Which messages of bigq hold advice: found in the source, so that none can be forgotten."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent / "bigq"
#: Rooms whose strings are not messages.
NOT_MESSAGES = ("reports", "progress")
#: A verb that tells the reader what to do.
VERB = (
    r"(?:use|give|leave|choose|fetch|free|add|pass|run|convert|correct|remove|restore|resume|begin|make|name|"
    r"download|check|skip|quantize|set|cut|replace|take|merge|rename|move|save|install|decompress|unpack|export|wait|"
    r"stop|put|copy|drop|shorten|raise|lower|split|keep|start|load|try|write|need|must be|are called|did you mean)"
)
#: Where advice is: after a semicolon, at the start of a part that is put there, or as an option with a value.
ADVICE = re.compile(rf";[^;]*\b{VERB}\b|^{VERB} |\b(?:use|give) (?:--|\{{}})")


def templates() -> dict[str, str]:
    """Every message with advice, or part of one, with ``{}`` for what is filled in → where it is."""
    return {text: place for text, place in _strings() if ADVICE.search(text)}


def _strings() -> Iterator[tuple[str, str]]:
    for path in sorted(ROOT.rglob("*.py")):
        if path.relative_to(ROOT).parts[0] in NOT_MESSAGES:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in _spoken(tree):
            text = _text(node)
            if text is not None and "\n" not in text:
                yield text, f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"


def _spoken(tree: ast.Module) -> Iterator[ast.AST]:
    """The strings of a module that are neither docstrings nor help of options nor parts of others."""
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):
            skipped.add(id(node.value))
        if isinstance(node, ast.JoinedStr):
            skipped.update(id(value) for value in node.values)
        if isinstance(node, ast.keyword) and node.arg in ("help", "epilog", "description"):
            skipped.update(map(id, ast.walk(node.value)))
    return (node for node in ast.walk(tree) if id(node) not in skipped)


def _text(node: ast.AST) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(value.value) if isinstance(value, ast.Constant) else "{}" for value in node.values)
    return None


def matcher(template: str) -> re.Pattern[str]:
    """A pattern for messages that a template makes, or holds a part of."""
    return re.compile(".*?".join(map(re.escape, template.split("{}"))), re.DOTALL)
