"""JSON that carries a checksum of itself, for a job's own records: what was changed by so much as one byte is not taken for sound.

The text is canonical, so white space counts too: a sealed object is sound where writing down what was read gives the same bytes.
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

#: A record of a job is never larger; a line per Linear of the largest models is some MB.
MAX_BYTES = 2**28


def seal(value: Mapping[str, Any], *, line: bool = False) -> bytes:
    """A JSON object with its checksum, ending in a newline; on one line, or indented for a person to read."""
    body = _canonical(value, line)
    return _canonical({**value, "check": _checksum(body)}, line)


def unseal(data: bytes, *, line: bool = False) -> dict[str, Any] | None:
    """What was sealed; None where it is not exactly as it was written."""
    try:
        value = json.loads(data.decode())
        if not isinstance(value, dict):
            return None
        check = value.pop("check", None)
        body = _canonical(value, line)
    except (ValueError, RecursionError):
        return None
    return value if check == _checksum(body) and data == _canonical({**value, "check": check}, line) else None


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Atomically. Raises ResourceError."""
    write_bytes(path, seal(value))


def read_sealed(path: Path, remedy: str) -> dict[str, Any] | None:
    """What a file holds; None where there is none.

    Raises CheckpointError where it is damaged, telling the ``remedy``; ResourceError where it cannot be read.
    """
    data = read_record(path)
    if data is None:
        return None
    value = unseal(data)
    if value is None:
        raise CheckpointError(f"{path}: is damaged or was changed by hand; {remedy}")
    return value


def sound_lines(path: Path) -> list[bytes]:
    """The lines of a record that are as they were written, newlines and all. Raises as ``read_record``."""
    lines = (read_record(path) or b"").splitlines(keepends=True)
    return [line for line in lines if unseal(line, line=True) is not None]


def read_record(path: Path, attempts: int = 3) -> bytes | None:
    """The bytes of one of a job's own files; None where there is none. Raises ResourceError, CheckpointError where it is absurdly large."""
    try:
        with open(path, "rb") as file:
            # Not more than there is: memory is taken for as much as is asked for.
            size = os.fstat(file.fileno()).st_size
            data = file.read() if size <= MAX_BYTES else None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno == errno.ESTALE and attempts > 1:  # over NFS, one that another machine replaced meanwhile
            return read_record(path, attempts - 1)
        raise ResourceError(f"{path}: cannot be read: {error.strerror}; check the disk and run the command again") from error
    if data is None:
        raise CheckpointError(f"{path}: is larger than {MAX_BYTES} bytes, which no record of a job is; choose another folder")
    return data


def _canonical(value: Mapping[str, Any], line: bool) -> bytes:
    text = json.dumps(value, separators=(",", ":")) if line else json.dumps(value, indent=2)
    return (text + "\n").encode()


def _checksum(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()[:32]
