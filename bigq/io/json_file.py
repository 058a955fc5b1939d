"""Reading untrusted JSON within limits, and showing its values in messages.

Bytes and values are limited before parsing, depth after it. So neither reading nor writing the JSON can exhaust memory or stack.
Knows nothing of what the JSON means.
"""

from __future__ import annotations

import codecs
import json
import os
import reprlib
import stat
from pathlib import Path
from typing import Any, BinaryIO

from bigq.errors import CheckpointError
from bigq.io.byte_file import RemoteFile

#: The maximum header size of the safetensors format, used for all JSON files.
MAX_JSON_BYTES = 100_000_000
#: Maximum number of values, names and brackets in a file. A tensor's header entry has about 12, and each takes up to 100 bytes of
#: memory when parsed. The largest published headers and indexes have less than a tenth of this.
MAX_JSON_VALUES = 4_000_000
#: Maximum nesting of objects and lists.
MAX_JSON_DEPTH = 64
#: Maximum characters of a name or value in a message.
SHOWN_CHARACTERS = 200

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = SHOWN_CHARACTERS
_REPR.maxlevel, _REPR.maxlist, _REPR.maxdict = 3, 8, 4


def show_value(value: Any) -> str:
    """A JSON value for a message: its ``repr``, truncated, in one printable line."""
    return _REPR.repr(value)


def show_name(text: str) -> str:
    """A name for a message: unchanged if it is short and printable, otherwise quoted, escaped and truncated."""
    return text if text.isprintable() and len(text) <= SHOWN_CHARACTERS else show_value(text)


def open_regular(path: Path) -> tuple[BinaryIO, int]:
    """Open a regular file for reading; returns it and its size. Never blocks on a pipe or device. Raises OSError, CheckpointError."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise CheckpointError(f"{path}: cannot be read: not a regular file")
    return os.fdopen(fd, "rb"), status.st_size


def read_json_object(path: Path, *, repeats: bool = False) -> dict[str, Any]:
    """Parse a JSON file that must contain an object. Raises CheckpointError.

    repeats: whether a name may occur twice in an object; the last one counts.
    """
    try:
        file, size = open_regular(path)
        with file:
            if size > MAX_JSON_BYTES:
                raise CheckpointError(f"{path}: has {size} bytes; bigq reads JSON files of at most {MAX_JSON_BYTES} bytes")
            data = file.read(size)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    value = parse_object(path, data, repeats=repeats)
    if _exceeds_depth(value, MAX_JSON_DEPTH):
        raise CheckpointError(f"{path}: invalid JSON (nested more than {MAX_JSON_DEPTH} levels); the file is damaged")
    return value


def parse_object(path: Path | RemoteFile, data: bytes, *, repeats: bool = False) -> dict[str, Any]:
    """Parse the bytes of a JSON file that must contain an object. Unless ``repeats``, names must be unique. Raises CheckpointError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise CheckpointError(f"{path}: invalid JSON (a name occurs twice in an object); the file is damaged")
        return result

    if data.startswith(codecs.BOM_UTF8):
        raise CheckpointError(f"{path}: begins with a byte order mark, which JSON files must not have; save it as UTF-8 without one")
    if sum(data.count(mark) for mark in (b",", b":", b"[", b"{")) > MAX_JSON_VALUES:
        raise CheckpointError(f"{path}: invalid JSON (more than {MAX_JSON_VALUES} values); the file is damaged")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=None if repeats else unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: invalid JSON ({error}); the file is damaged") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: invalid JSON (not an object); the file is damaged")
    return value


def _exceeds_depth(value: Any, limit: int) -> bool:
    """Whether lists and objects are nested more than ``limit`` levels."""
    level = [value]
    for _ in range(limit):
        level = [
            inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer) if isinstance(inner, (dict, list))
        ]
        if not level:
            return False
    return True
