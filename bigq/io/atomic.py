"""Atomic and durable writing of files: after a crash, a file is either complete or absent."""

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
    """A binary file to write. When the block ends without an error, it is synced to disk and renamed to ``path``.

    Raises ResourceError if the operating system reports an error (disk full, no permission).
    """
    # The temporary name is random: two jobs must not share it, even if one is wrongly taken for dead.
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
        raise ResourceError(f"{path}: cannot be written: {error.strerror or error}; {remedy(error)}") from error
    finally:
        with contextlib.suppress(OSError):
            temp.unlink(missing_ok=True)


def remedy(error: OSError) -> str:
    """Advice for a file that could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "free some space or choose another folder"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR):
        return "choose a folder with write permission"
    return "check the disk, then run the same command again"


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically. Raises ResourceError."""
    with atomic_file(path) as file:
        file.write(data)


def json_bytes(value: Any) -> bytes:
    """JSON as written to files: indented, with a final newline."""
    return (json.dumps(value, indent=2) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically. Raises ResourceError."""
    write_bytes(path, json_bytes(value))


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's contents atomically, in pieces of ``COPY_BYTES``. Raises ResourceError."""
    with atomic_file(target) as file:
        for piece in _pieces(source):
            file.write(piece)


def _pieces(source: Path) -> Iterator[bytes]:
    try:
        with open(source, "rb") as file:
            while piece := file.read(COPY_BYTES):
                yield piece
    except OSError as error:
        raise ResourceError(f"{source}: cannot be read: {error.strerror}; check the disk, then run the same command again") from error


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable, if the file system supports it."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # raised by some network file systems
            raise
    finally:
        os.close(fd)
