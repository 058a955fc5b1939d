"""Noticing that files change while they are being worked with."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from bigq.errors import CheckpointError, ResourceError

_Stamp = tuple[int, int]


class Stamps:
    """Size and time of modification of some files, as they are now."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._stamps = {path: _stamp(path) for path in sorted(files)}

    def require_unchanged(self) -> None:
        """Raise CheckpointError, naming the file, where one is no longer what it was; ResourceError where that cannot be told."""
        for path, stamp in self._stamps.items():
            if _stamp(path) != stamp:
                raise CheckpointError(
                    f"{path}: was changed or replaced while the job was running; what is committed is sound, but the source is not one "
                    "model any more: put the files back as they were and run the same command again"
                )


def _stamp(path: Path) -> _Stamp | None:
    try:
        there = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ResourceError(f"{path}: cannot be looked at: {error.strerror}; check the disk and run the command again") from error
    return there.st_size, there.st_mtime_ns
