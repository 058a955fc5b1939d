"""The record of a written shard, and the hash that verifies it. Does not import torch, so that records can be read quickly."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from bigq.errors import ResourceError


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRecord:
    """The journal's record of a written shard. size: bytes. tensors: names, in the order of the file."""

    file: str
    size: int
    sha256: str
    tensors: tuple[str, ...]


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal. Raises ResourceError."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb", buffering=0) as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
    except OSError as error:
        raise ResourceError(f"{path}: cannot be read: {error.strerror}; check the disk, then run the same command again") from error
    return digest.hexdigest()
