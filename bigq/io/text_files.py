"""Reading text and JSONL files, optionally gzipped, with limits on memory. Knows nothing of tokens."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bigq.errors import CalibrationError

#: Text is read in pieces of about this many characters, which end at line ends.
PIECE_CHARS = 65536
#: Longer lines of text are split at this length. Ordinary lines are thousands of times shorter.
LONGEST_LINE = 2**22
#: Longer lines of JSONL are refused. The longest books have some 2**22 characters.
LONGEST_DOCUMENT = 2**24
#: A gzipped file may expand to this multiple of its size plus this many bytes. Text expands 3 to 10 times; gzip's maximum is 1032.
MOST_EXPANSION, FREE_EXPANSION = 100, 2**25


def text_pieces(path: Path) -> Iterator[str]:
    """A text file in pieces of whole lines, each of about ``PIECE_CHARS`` characters or one longer line. Raises CalibrationError."""
    try:
        with _open_text(path) as file:
            while piece := _piece(file):
                yield piece
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise CalibrationError(f"{path}: cannot be read as UTF-8 text ({error})") from error


def documents(path: Path) -> Iterator[str]:
    """The ``text`` field of every line of a JSONL file. Raises CalibrationError."""
    number = 0
    try:
        with _open_text(path) as file:
            while line := file.readline(LONGEST_DOCUMENT):
                number += 1
                if len(line) == LONGEST_DOCUMENT and not line.endswith("\n"):
                    raise CalibrationError(
                        f"{path}, line {number}: longer than {LONGEST_DOCUMENT} characters; split it into several documents"
                    )
                if not line.strip():
                    continue
                record = json.loads(line)
                if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                    raise CalibrationError(f"{path}, line {number}: must be an object with a string field 'text'")
                record["text"].encode()
                yield record["text"]
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        raise CalibrationError(f"{path}, line {number}: cannot be read as JSONL ({error})") from error


def _piece(file: Any) -> str:
    """The next lines of a file, like ``file.readlines(PIECE_CHARS)``, but lines are split at ``LONGEST_LINE``."""
    lines: list[str] = []
    length = 0
    while line := file.readline(LONGEST_LINE):
        lines.append(line)
        length += len(line)
        if length > PIECE_CHARS:
            break
    return "".join(lines)


def _open_text(path: Path) -> Any:
    if path.suffix == ".gz":
        allowed = FREE_EXPANSION + MOST_EXPANSION * path.stat().st_size
        return io.TextIOWrapper(io.BufferedReader(_GzipReader(path, allowed), 2**17), encoding="utf-8")
    return open(path, encoding="utf-8")


class _GzipReader(io.RawIOBase):
    """The decompressed contents of a gzip file. Raises CalibrationError after ``allowed`` bytes."""

    def __init__(self, path: Path, allowed: int) -> None:
        self._path, self._left = path, allowed
        self._file = gzip.open(path, "rb")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read1(len(buffer))
        self._left -= len(data)
        if self._left < 0:
            raise CalibrationError(
                f"{self._path}: expands to more than {MOST_EXPANSION} times its size, which text does not; give the decompressed file"
            )
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()
