"""The folder with a job's records, and the rule that MODEL and OUT are separate."""

from __future__ import annotations

from pathlib import Path

from bigq.errors import UsageError

#: The folder inside OUT with the records of the job.
STATE_FOLDER = ".bigq"


def refuse_nesting(source: Path, out: Path) -> None:
    """Raise UsageError if the two folders are the same, or one is inside the other."""
    a, b = source.resolve(), out.resolve()
    if a == b or a in b.parents or b in a.parents:
        raise UsageError(f"{out}: OUT and MODEL ({source}) must be separate folders, neither inside the other; choose another OUT")
