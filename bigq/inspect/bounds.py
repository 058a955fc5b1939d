"""Bounds on values from records, which anybody can write: a value has the right type and is within bounds, or it is unknown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Characters of a text, and things of a kind, that are read.
MAX_TEXT, MAX_ITEMS = 2000, 1000
#: No meaningful error, perplexity or number of seconds is larger. Sums and ratios of smaller ones stay finite.
MAX_NUMBER = 1e12


def text(value: Any) -> str:
    """Anything as one printable line of bounded length."""
    line = str(value)[: MAX_TEXT + 1]
    printable = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in line)
    return printable if len(printable) <= MAX_TEXT else printable[: MAX_TEXT - 1] + "…"


def count(value: Any) -> int | None:
    """A whole number that fits 62 bits."""
    return value if type(value) is int and 0 <= value < 2**62 else None


def number(value: Any) -> float | None:
    """A number from 0 to ``MAX_NUMBER``."""
    return float(value) if type(value) in (int, float) and 0 <= value <= MAX_NUMBER else None


def durations(value: Any) -> dict[str, float]:
    """Seconds by name; those that are unknown are dropped."""
    return {text(name): known for name, said in list(mapping(value).items())[:50] if (known := number(said)) is not None}


def mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def items(value: Any) -> list[Any]:
    return value[:MAX_ITEMS] if isinstance(value, list) else []
