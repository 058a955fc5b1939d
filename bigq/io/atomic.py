"""Writing files so that after a crash each is there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from bigq import faults
from bigq.errors import ResourceError

TEMP_SUFFIX = ".bigq-tmp"
COPY_BYTES = 2**20


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears under ``path``, flushed to disk, when the block ends without an error.

    Raises ResourceError where the operating system refuses (disk full, no permission).
    """
    # A name of its own each time: a job that was taken for dead, and is not, must not meet the next one's file.
    temp = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{TEMP_SUFFIX}")
    try:
        with open(temp, "wb") as file:
            faults.point("file.opened")
            yield file
            file.flush()
            faults.point("file.written")
            os.fsync(file.fileno())
        faults.point("file.synced")
        os.replace(temp, path)
        faults.point("file.renamed")
        sync_folder(path.parent)
    except OSError as error:
        raise ResourceError(f"cannot write {path}: {error.strerror or error}; {remedy(error)}") from error
    finally:
        with contextlib.suppress(OSError):
            temp.unlink(missing_ok=True)


def remedy(error: OSError) -> str:
    """What a person can do about a file that could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "free some space or choose another folder"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR):
        return "choose a folder that can be written to"
    return "check the disk, then run the same command again"


def write_bytes(path: Path, data: bytes) -> None:
    with atomic_file(path) as file:
        file.write(data)


def json_bytes(value: Any) -> bytes:
    """JSON as it is written to files."""
    return (json.dumps(value, indent=2) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, json_bytes(value))


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's contents, in bounded pieces. Raises ResourceError."""
    with atomic_file(target) as file:
        for piece in _pieces(source):
            file.write(piece)


def _pieces(source: Path) -> Iterator[bytes]:
    try:
        with open(source, "rb") as file:
            while piece := file.read(COPY_BYTES):
                yield piece
    except OSError as error:
        raise ResourceError(f"cannot read {source}: {error.strerror}; check the disk, then run the same command again") from error


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable, where the file system knows such a thing."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of some network and shared folders
            raise
    finally:
        os.close(fd)
