"""Output to a terminal, file or pipe: results go to stdout, everything else to stderr.

Names of files, tensors and options that are printed may hold any characters, and a stream may be closed or gone.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator

from bigq.errors import ResourceError, UsageError

#: Characters of a long line that are shown, at its beginning and at its end.
HEAD, TAIL = 500, 1500


def one_line(text: str) -> str:
    """Text as one printable line of bounded length: with escape sequences, and without the middle of a long text."""
    line = printable(text)
    return line if len(line) <= HEAD + TAIL else f"{line[:HEAD]} … {line[-TAIL:]}"


def printable(text: str) -> str:
    """Text with an escape sequence for each character that cannot be printed."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def print_result(text: str) -> None:
    """Write lines to stdout and flush. Raises ResourceError if that fails, BrokenPipeError if the reader has closed the pipe."""
    with _writing_results():
        sys.stdout.write("\n".join(map(printable, text.split("\n"))) + "\n")
        sys.stdout.flush()


def print_piece(text: str) -> None:
    """Write part of a result to stdout and flush; newlines and tabs stay. Raises as ``print_result``."""
    with _writing_results():
        sys.stdout.write("".join(c if c in "\n\t" else printable(c) for c in text))
        sys.stdout.flush()


def read_prompt() -> str:
    """Everything on stdin. Raises UsageError where it is not text."""
    try:
        return sys.stdin.read()
    except (UnicodeDecodeError, OSError, AttributeError) as error:  # a stream that is closed has no read
        raise UsageError("--prompt -: stdin cannot be read as text; give UTF-8, or the prompt itself") from error


def flush_results() -> None:
    """Flush what other code has printed. Raises as ``print_result``."""
    with _writing_results():
        sys.stdout.flush()


@contextlib.contextmanager
def _writing_results() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise ResourceError(f"stdout cannot be written: {error.strerror}; free some space or send the output elsewhere") from error


def tell(line: str) -> None:
    """Write a line to stderr, if it can be written."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def keep_quiet(_: str) -> None:
    """Replaces ``tell`` with --quiet."""


def prepare_streams() -> None:
    """Make printing safe: every character can be printed, and a closed stream cannot redirect output into a file of the job."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:  # closed: the next file to be opened would get its descriptor, and the output of libraries with it
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def abandon_broken_streams() -> None:
    """Discard the buffers of streams that cannot be written, so that the interpreter exits without an error message."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with contextlib.suppress(OSError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())
