"""What is kept of a shard once it is written, and how that is checked. Needs no torch: looking at a job's record takes no time."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from bigq.errors import ResourceError


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRecord:
    """A shard as written: what the journal keeps of it."""

    file: str
    size: int
    sha256: str
    tensors: tuple[str, ...]


def file_sha256(path: Path) -> str:
    """The hash of a file, read in pieces. Raises ResourceError."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb", buffering=0) as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
    except OSError as error:
        raise ResourceError(f"{path}: cannot be read: {error.strerror}; check the disk and run the command again") from error
    return digest.hexdigest()
