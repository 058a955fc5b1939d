"""Where a job keeps its records, and which folders may be source and output together."""

from __future__ import annotations

from pathlib import Path

from bigq.errors import UsageError

#: The folder inside OUT that holds a job's records.
STATE_FOLDER = ".bigq"


def refuse_nesting(source: Path, out: Path) -> None:
    """Raise UsageError where one of the two folders is the other, or lies inside it."""
    a, b = source.resolve(), out.resolve()
    if a == b or a in b.parents or b in a.parents:
        raise UsageError(f"{out}: OUT and MODEL ({source}) must be separate folders, neither inside the other")
