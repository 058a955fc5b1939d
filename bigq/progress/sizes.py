"""Parses and formats sizes in bytes, and formats durations."""

from __future__ import annotations

import re

from bigq.errors import UsageError

_UNITS = {"b": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kmgt]i?)b?|(b))?", re.IGNORECASE)


def parse_size(text: str, label: str) -> int:
    """Bytes of "80GB", "72GiB", "3g" or "500 B". Raises UsageError, which begins with the label; a number needs a unit."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{label}: is not a size; write for instance 72GiB or 80GB")
    unit = match[2] or match[3]
    if unit is None:
        raise UsageError(f"{label}: give a unit, such as {text.strip()}GiB")
    return int(float(match[1]) * _UNITS[unit.lower()])


def show_size(count: float) -> str:
    """Bytes as text in MiB, GiB or TiB."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count / 2**20:.1f} MiB"


def show_duration(seconds: float) -> str:
    """Seconds as m:ss, or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def show_seconds(seconds: float) -> str:
    """Seconds as text in the largest unit of which they are two or more."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
