"""The folder with a job's records, and the rule that MODEL and OUT are separate."""

from __future__ import annotations

from pathlib import Path

from bigq.errors import CheckpointError, UsageError

#: The folder inside OUT with the records of the job.
STATE_FOLDER = ".bigq"


def refuse_nesting(source: Path, out: Path) -> None:
    """Raise UsageError if the two folders are the same, or one is inside the other."""
    a, b = source.resolve(), out.resolve()
    if a == b or a in b.parents or b in a.parents:
        raise UsageError(f"{out}: OUT and MODEL ({source}) must be separate folders, neither inside the other; choose another OUT")


def require_finished(folder: Path) -> None:
    """Raise CheckpointError if the folder holds an unfinished bigq job, which writes ``config.json`` last."""
    if (folder / STATE_FOLDER).is_dir() and not (folder / "config.json").exists():
        raise CheckpointError(
            f"{folder / 'config.json'}: is missing because the bigq job in this folder is not finished; run its command again to resume it"
        )
