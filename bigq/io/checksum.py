"""JSON objects with a checksum of themselves, for the records of a job. A change of a single byte is detected.

The JSON text is canonical, so changes of white space are detected too: serializing the parsed object must give the same bytes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bigq.errors import CheckpointError, ResourceError
from bigq.io.atomic import write_bytes

#: The maximum size of a record. The journal of the largest models, with an entry for each Linear, has some MB.
MAX_BYTES = 2**28


def seal(value: Mapping[str, Any], *, line: bool = False) -> bytes:
    """Serialize a JSON object with its checksum and a final newline: on one line if ``line``, else indented."""
    body = _canonical(value, line)
    return _canonical({**value, "check": _checksum(body)}, line)


def unseal(data: bytes, *, line: bool = False) -> dict[str, Any] | None:
    """The object that ``seal`` serialized, or None if the bytes were changed."""
    try:
        value = json.loads(data.decode())
        if not isinstance(value, dict):
            return None
        check = value.pop("check", None)
        body = _canonical(value, line)
    except (ValueError, RecursionError):
        return None
    return value if check == _checksum(body) and data == _canonical({**value, "check": check}, line) else None


def save_record(path: Path, value: Mapping[str, Any]) -> None:
    """Write a sealed object atomically. Raises ResourceError."""
    write_bytes(path, seal(value))


def load_record(path: Path, remedy: str) -> dict[str, Any] | None:
    """The sealed object in a file, or None if there is no such file.

    Raises CheckpointError with ``remedy`` as advice if the file is damaged, ResourceError if it cannot be read.
    """
    data = read_record_bytes(path)
    if data is None:
        return None
    value = unseal(data)
    if value is None:
        raise CheckpointError(f"{path}: damaged or edited by hand; {remedy}")
    return value


def valid_lines(path: Path) -> list[bytes]:
    """The lines of a file of sealed lines whose checksums are right, with newlines. Raises as ``read_record_bytes`` does."""
    lines = (read_record_bytes(path) or b"").splitlines(keepends=True)
    return [line for line in lines if unseal(line, line=True) is not None]


def read_record_bytes(path: Path, attempts: int = 3) -> bytes | None:
    """The bytes of a record, or None if there is no such file. Raises ResourceError; CheckpointError if larger than ``MAX_BYTES``."""
    try:
        with open(path, "rb") as file:
            # read(MAX_BYTES) would allocate MAX_BYTES, so check the size first.
            size = os.fstat(file.fileno()).st_size
            data = file.read() if size <= MAX_BYTES else None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno == errno.ESTALE and attempts > 1:  # NFS: another machine replaced the file
            return read_record_bytes(path, attempts - 1)
        raise ResourceError(f"{path}: cannot be read: {error.strerror}; check the disk, then run the same command again") from error
    if data is None:
        raise CheckpointError(f"{path}: larger than {MAX_BYTES} bytes, so bigq did not write it; choose another folder")
    return data


def _canonical(value: Mapping[str, Any], line: bool) -> bytes:
    text = json.dumps(value, separators=(",", ":")) if line else json.dumps(value, indent=2)
    return (text + "\n").encode()


def _checksum(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()[:32]
