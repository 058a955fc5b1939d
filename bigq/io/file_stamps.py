"""Detection of files that change during a job."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from bigq.errors import CheckpointError, ResourceError

_Stamp = tuple[int, int]


class Stamps:
    """Size and modification time of some files, recorded when this is created."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._stamps = {path: _stamp(path) for path in sorted(files)}

    def require_unchanged(self) -> None:
        """Raise CheckpointError, naming the file, if one has changed; ResourceError if a file's status cannot be read."""
        for path, stamp in self._stamps.items():
            if _stamp(path) != stamp:
                raise CheckpointError(
                    f"{path}: changed or replaced while the job was running; committed shards are valid, but the source is no longer "
                    "the same model: restore the original files and run the same command again"
                )


def _stamp(path: Path) -> _Stamp | None:
    try:
        there = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ResourceError(f"{path}: stat failed: {error.strerror}; check the disk, then run the same command again") from error
    return there.st_size, there.st_mtime_ns
