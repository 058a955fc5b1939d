"""JSON that others wrote: read within bounds, and told of in one printable line.

What a file may hold is bounded before it is parsed (bytes, values) and after (depth), so that neither reading it nor writing
it again can run out of memory or stack. Knows nothing of what the JSON means.
"""

from __future__ import annotations

import json
import os
import reprlib
import stat
from pathlib import Path
from typing import Any, BinaryIO

from bigq.errors import CheckpointError

#: The longest header that the safetensors format allows; other JSON files get no more.
MAX_JSON_BYTES = 100_000_000
#: Values, names and brackets in one file. A tensor's header entry has about 12 of them, and one takes up to some 100 bytes
#: of memory once parsed; the largest published headers and indexes stay below a tenth.
MAX_JSON_VALUES = 4_000_000
#: Objects and lists inside one another.
MAX_JSON_DEPTH = 64
#: Characters of a name that are shown in a message.
SHOWN_CHARACTERS = 200

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = SHOWN_CHARACTERS
_REPR.maxlevel, _REPR.maxlist, _REPR.maxdict = 3, 8, 4


def shown(value: Any) -> str:
    """A JSON value for a message: its ``repr``, cut where it is long. One printable line that any encoding of text takes."""
    return _REPR.repr(value)


def plain(text: str) -> str:
    """A name for a message: itself, or where it is long or not printable, quoted, escaped and cut."""
    return text if text.isprintable() and len(text) <= SHOWN_CHARACTERS else shown(text)


def open_regular(path: Path) -> tuple[BinaryIO, int]:
    """A regular file to read from, and its size. Never waits for what is not one. Raises OSError, CheckpointError."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise CheckpointError(f"{path}: cannot be read: it is not a regular file")
    return os.fdopen(fd, "rb"), status.st_size


def read_json_object(path: Path, *, repeats: bool = False) -> dict[str, Any]:
    """Parse a JSON file that must hold an object. Raises CheckpointError.

    repeats: whether a name may occur twice in an object (the last one counts).
    """
    try:
        file, size = open_regular(path)
        with file:
            if size > MAX_JSON_BYTES:
                raise CheckpointError(f"{path}: has {size} bytes, more than the {MAX_JSON_BYTES} that bigq reads of a JSON file")
            data = file.read(size)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    value = parse_object(path, data, repeats=repeats)
    if _deeper_than(value, MAX_JSON_DEPTH):
        raise CheckpointError(f"{path}: its JSON cannot be read (nested more than {MAX_JSON_DEPTH} deep); the file is damaged")
    return value


def parse_object(path: Path, data: bytes, *, repeats: bool = False) -> dict[str, Any]:
    """The object that a file's bytes stand for; unless ``repeats``, no name occurs twice in any object. Raises CheckpointError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise CheckpointError(f"{path}: a name occurs twice in its JSON")
        return result

    if sum(data.count(mark) for mark in (b",", b":", b"[", b"{")) > MAX_JSON_VALUES:
        raise CheckpointError(f"{path}: its JSON cannot be read (more than {MAX_JSON_VALUES} values); the file is damaged")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=None if repeats else unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its JSON cannot be read ({error}); the file is damaged") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: its JSON is not an object")
    return value


def _deeper_than(value: Any, limit: int) -> bool:
    """Whether lists and objects lie deeper in one another than ``limit``."""
    level = [value]
    for _ in range(limit):
        level = [
            inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer) if isinstance(inner, (dict, list))
        ]
        if not level:
            return False
    return True
