"""Reading files of text and of JSON records, optionally gzipped, with limits on memory. Knows nothing of tokens or fields.

What a file is follows from its contents; the suffix decides only where they leave it open (see ``contents_of``).
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from bigq.errors import CalibrationError
from bigq.io.json_file import MAX_JSON_BYTES, show_name

Contents = Literal["text", "lines", "array", "parquet", "safetensors"]

#: Text is read in pieces of about this many characters, which end at line ends.
PIECE_CHARS = 65536
#: Longer lines of text are split at this length. Ordinary lines are thousands of times shorter.
LONGEST_LINE = 2**22
#: Longer lines of JSONL and elements of arrays are refused. The longest books have some 2**22 characters.
LONGEST_DOCUMENT = 2**24
#: A gzipped file may expand to this multiple of its size plus this many bytes. Text expands 3 to 10 times; gzip's maximum is 1032.
MOST_EXPANSION, FREE_EXPANSION = 100, 2**25
#: Lines of JSON objects with no known field, at the beginning of a file, that make it a file of records.
TELLING_LINES = 8
#: Bytes at the beginning of a file that are searched for NULs.
HEAD_BYTES = 4096

GZIP = b"\x1f\x8b"
PARQUET = b"PAR1"
#: The first bytes of files that hold no text as they are: what they are, and what to do.
FOREIGN = (
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "decompress it first: zstd -d FILE"),
    (b"\xfd7zXZ\x00", "compressed with xz", "decompress it first: unxz FILE"),
    (b"BZh91AY&SY", "compressed with bzip2", "decompress it first: bunzip2 FILE"),
    (b"PK\x03\x04", "a zip archive", "unpack it first: unzip FILE"),
    (b"ARROW1\x00\x00", "an Arrow file", "save it as parquet or JSONL"),
    (b"%PDF-", "a PDF", "give its text"),
    (b"SQLite format 3\x00", "a database", "export its text"),
)
#: Byte order marks and what they say, longer ones first.
MARKS = (
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
_DECODER = json.JSONDecoder()


def contents_of(path: Path, known: Callable[[dict[str, Any]], bool]) -> Contents:
    """What a file holds. known: whether a record has a field that can be used. Raises CalibrationError for a file of no such kind.

    - parquet and safetensors: by their first bytes, or by their suffix;
    - lines: the first line that is not blank is a JSON object with a known field, or the first ``TELLING_LINES`` such lines are all JSON
      objects; or the file is named .jsonl, .ndjson or .json and is no array;
    - array: begins with ``[`` and a JSON object; or with ``[`` in a file that is named .json;
    - text: all else, such as prose that begins with a bracket.
    """
    with _reading(path):
        head = _raw_head(path)
        if head.startswith(PARQUET) or path.suffix == ".parquet":
            return "parquet"
        if path.suffix == ".safetensors" or _is_safetensors(head, path):
            return "safetensors"
        with _open_text(path) as file:
            return _contents_of_text(path, file, known)


def _contents_of_text(path: Path, file: Any, known: Callable[[dict[str, Any]], bool]) -> Contents:
    suffix = Path(path.name.removesuffix(".gz")).suffix
    first = _first_character(file)
    if first == "[":
        start = _first_character(file)
        if suffix == ".json":
            return "array"
        if start == "{":
            with contextlib.suppress(_Malformed):
                if isinstance(_Buffer(file, start).value(), dict):
                    return "array"
    if suffix in (".jsonl", ".ndjson", ".json"):
        return "lines"
    if first != "{":
        return "text"
    return "lines" if _begins_with_objects(first, file, known) else "text"


def _begins_with_objects(first: str, file: Any, known: Callable[[dict[str, Any]], bool]) -> bool:
    found = 0
    line = first + file.readline(LONGEST_DOCUMENT)
    while line and found < TELLING_LINES:
        if line.strip():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                return False
            if not isinstance(record, dict) or not record:
                return False
            if known(record):
                return True
            found += 1
        line = file.readline(LONGEST_DOCUMENT)
    return found > 0


def text_pieces(path: Path) -> Iterator[str]:
    """A text file in pieces of whole lines, each of about ``PIECE_CHARS`` characters or one longer line. Raises CalibrationError."""
    with _reading(path), _open_text(path) as file:
        while piece := _piece(file):
            yield piece


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """The value of every line that is not blank, after the place of the line for messages. Raises CalibrationError."""
    number = 0
    with _reading(path, lambda: f", line {number}"), _open_text(path) as file:
        while line := file.readline(LONGEST_DOCUMENT):
            number += 1
            where = f"{path}, line {number}"
            if len(line) == LONGEST_DOCUMENT and not line.endswith("\n"):
                raise CalibrationError(f"{where}: longer than {LONGEST_DOCUMENT} characters; split it into several documents")
            line = line.removeprefix("\ufeff")  # of files that were joined
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise CalibrationError(
                    f"{where}: is not JSON ({_json_reason(error)}); give one JSON object per line, or one array of them"
                ) from None
            yield where, value


def json_array(path: Path) -> Iterator[tuple[str, Any]]:
    """The elements of a file that is one JSON array, each after its place for messages. Holds one at a time. Raises CalibrationError."""
    number = 1
    with _reading(path, lambda: f", record {number}"), _open_text(path) as file:
        if _first_character(file) != "[":
            raise CalibrationError(f"{path}: is no JSON array; give one JSON object per line, or one array of them")
        start = _first_character(file)
        if start == "]":
            return
        buffer = _Buffer(file, start)
        while True:
            where = f"{path}, record {number}"
            try:
                value = buffer.value()
                mark = buffer.mark()
            except _Malformed as error:
                raise CalibrationError(f"{where}: {error}") from None
            yield where, value
            if mark == "]":
                if buffer.rest():
                    raise CalibrationError(f"{where}: text follows the end of the array; remove it, or give one JSON object per line")
                return
            if mark != ",":
                raise CalibrationError(f"{where}: no comma or bracket follows it; the file is damaged or incomplete")
            number += 1


class _Malformed(ValueError):
    """An element of an array that cannot be read; the message is the end of a sentence about it."""


class _Buffer:
    """Reads values from a file of JSON one after another, holding little more than one of them. Raises _Malformed."""

    def __init__(self, file: Any, start: str) -> None:
        self._file, self._text, self._place = file, start, 0

    def value(self) -> Any:
        self._skip()
        wanted = PIECE_CHARS
        while True:
            more = self._read(wanted)
            try:
                value, place = _DECODER.raw_decode(self._text, self._place)
            except (ValueError, RecursionError) as error:
                # What is cut off looks like a mistake: only with all of the value in the buffer is it one.
                if more and isinstance(error, json.JSONDecodeError) and len(self._text) - self._place < LONGEST_DOCUMENT:
                    wanted *= 2
                    continue
                if more and isinstance(error, json.JSONDecodeError):
                    reason = f"is no JSON, or longer than {LONGEST_DOCUMENT} characters; split it into several documents"
                else:
                    reason = f"is not JSON ({_json_reason(error)}); the file is damaged or incomplete"
                raise _Malformed(reason) from None
            if place == len(self._text) and more:
                wanted *= 2  # a number may go on
                continue
            if place - self._place > LONGEST_DOCUMENT:
                raise _Malformed(f"longer than {LONGEST_DOCUMENT} characters; split it into several documents")
            self._place = place
            return value

    def mark(self) -> str:
        """The next character that is not white space; "" at the end."""
        self._skip()
        found = self._text[self._place : self._place + 1]
        self._place += len(found)
        return found

    def rest(self) -> bool:
        """Whether anything but white space is left."""
        return bool(self.mark())

    def _skip(self) -> None:
        while True:
            while self._place < len(self._text) and self._text[self._place] in " \t\r\n":
                self._place += 1
            if self._place < len(self._text):
                return
            self._text, self._place = self._file.read(PIECE_CHARS), 0
            if not self._text:
                return

    def _read(self, wanted: int) -> bool:
        """Have ``wanted`` characters from here on in the buffer; returns whether there were as many."""
        have = len(self._text) - self._place
        if have < wanted:
            more = self._file.read(wanted - have)
            self._text, self._place = self._text[self._place :] + more, 0
            return bool(more) and len(self._text) >= wanted
        return True


def _first_character(file: Any) -> str:
    """The next character that is not white space; "" at the end. Reads up to it."""
    while (character := file.read(1)) and (character.isspace() or character == "\ufeff"):
        pass
    return str(character)


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


@contextlib.contextmanager
def _reading(path: Path, place: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Raise CalibrationError in place of the errors of reading and decoding. place: of the reader in the file, to follow its name."""
    try:
        yield
    except UnicodeDecodeError as error:
        if not error.encoding.startswith("utf-8"):
            promised = error.encoding.upper()
            raise CalibrationError(
                f"{path}{place()}: is not the {promised} text that its byte order mark promises; fetch it again"
            ) from None
        byte = error.object[error.start]
        raise CalibrationError(
            f"{path}{place()}: is not UTF-8 text (byte 0x{byte:02x}); if it is text, convert it: iconv -f ENCODING -t UTF-8 FILE"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        said = getattr(error, "strerror", None) or show_name(str(error))
        raise CalibrationError(f"{path}{place()}: cannot be read ({said}); fetch it again") from error


def _json_reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos + 1}"
    return "nested too deeply" if isinstance(error, RecursionError) else "a number of thousands of digits"


def _raw_head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(16)


def _is_safetensors(head: bytes, path: Path) -> bool:
    if len(head) < 10 or head[8:9] != b"{":
        return False
    (length,) = struct.unpack("<Q", head[:8])
    return bool(2 <= length <= MAX_JSON_BYTES and 8 + length <= path.stat().st_size)


def _open_text(path: Path) -> Any:
    """The text of a file, decompressed and decoded as its first bytes say. Raises CalibrationError if they say that it is no text."""
    with _open_bytes(path) as file:
        head = file.read(HEAD_BYTES)
    for magic, what, advice in FOREIGN:
        if head.startswith(magic):
            raise CalibrationError(f"{path}: is {what}, which bigq does not read; {advice}")
    encoding = next((name for mark, name in MARKS if head.startswith(mark)), None)
    if encoding is None:
        _refuse_wide(path, head)
    return io.TextIOWrapper(_open_bytes(path), encoding=encoding or "utf-8")


def _refuse_wide(path: Path, head: bytes) -> None:
    """Raise CalibrationError for UTF-16 without a mark: every other byte of text in Latin letters is 0."""
    for parity, name in ((1, "UTF-16LE"), (0, "UTF-16BE")):
        half = head[parity::2]
        if half and half.count(0) * 2 > len(half):
            raise CalibrationError(f"{path}: looks like {name} without a byte order mark; convert it: iconv -f {name} -t UTF-8 FILE")


def _open_bytes(path: Path) -> io.BufferedReader:
    file = open(path, "rb")
    if not file.peek(2).startswith(GZIP):
        return file
    file.close()
    allowed = FREE_EXPANSION + MOST_EXPANSION * path.stat().st_size
    return io.BufferedReader(_GzipReader(path, allowed), 2**17)


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
