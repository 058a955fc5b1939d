"""Numbers and times of a report as text."""

from __future__ import annotations

import math

from bigq.progress.sizes import show_duration, show_size


def block_number(block: int | None) -> object:
    """A Linear's block in a table; the output head is in none."""
    return "–" if block is None else block


def place(block: int | None) -> str:
    """Where a Linear is."""
    return "output head" if block is None else f"block {block}"


def count_of(count: int, noun: str) -> str:
    """A number of things: "1 run", "2 runs"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def when(at: str) -> str:
    """A time from a record, to the minute; unchanged where it is not a time in UTC."""
    return f"{at[:10]} {at[11:16]} UTC" if at.endswith("+00:00") and len(at) == 25 else at


def size(count: int | None) -> str:
    """Bytes."""
    return "–" if count is None else show_size(count)


def duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else show_duration(seconds)


def percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole > 0 else "–"


def perplexity(value: float) -> str:
    return f"{value:.3f}" if value < 1000 else f"{value:.3g}" if value < math.inf else "over 1e12"


def error_text(error: float | None) -> str:
    """A relative error in a table."""
    return "–" if error is None else f"{error:.2e}"
