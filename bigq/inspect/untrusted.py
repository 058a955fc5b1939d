"""Values from records that anybody can make: of the right type and within bounds, or unknown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Characters of a text that are taken, and how many things of a kind.
MAX_TEXT, MAX_ITEMS = 2000, 1000
#: No error, perplexity or number of seconds is larger and means anything; sums and ratios of what is not stay finite.
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
    """Seconds by name, those that are known."""
    return {text(name): known for name, said in list(mapping(value).items())[:50] if (known := number(said)) is not None}


def mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def items(value: Any) -> list[Any]:
    return value[:MAX_ITEMS] if isinstance(value, list) else []
