"""The terminal, or what is in its place: results to stdout, the rest to stderr.

Names of files, tensors and flags that are printed may hold any characters, and a stream may be closed or gone.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator

from bigq.errors import ResourceError, UsageError

#: Characters of a long line that are shown: from its beginning and to its end.
HEAD, TAIL = 500, 1500


def one_line(text: str) -> str:
    """Text as one printable line of bounded length: other characters as escape sequences, the middle of a long one left out."""
    line = printable(text)
    return line if len(line) <= HEAD + TAIL else f"{line[:HEAD]} … {line[-TAIL:]}"


def printable(text: str) -> str:
    """Text whose characters that are not to be printed are escape sequences."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def print_result(text: str) -> None:
    """Lines to stdout, at once. Raises ResourceError where they cannot be written, BrokenPipeError where nobody reads them."""
    with _writing_results():
        sys.stdout.write("\n".join(map(printable, text.split("\n"))) + "\n")
        sys.stdout.flush()


def print_piece(text: str) -> None:
    """Part of a result, to stdout, at once; lines and tabs stay what they are. Raises as ``print_result``."""
    with _writing_results():
        sys.stdout.write("".join(c if c in "\n\t" else printable(c) for c in text))
        sys.stdout.flush()


def read_prompt() -> str:
    """All of stdin. Raises UsageError where it is not text."""
    try:
        return sys.stdin.read()
    except (UnicodeDecodeError, OSError, AttributeError) as error:  # a stream that is closed has no read
        raise UsageError("--prompt -: stdin cannot be read as text; give UTF-8, or the prompt itself") from error


def flush_results() -> None:
    """Write what others have printed. Raises as ``print_result``."""
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
    """A line to stderr, if anybody can be told."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def keep_quiet(_: str) -> None:
    """In place of ``tell``, where nothing is to be said."""


def prepare_streams() -> None:
    """See to it that nothing printed can fail for its characters, or end up in a file of the job's because a stream was closed."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:  # closed: the next file that is opened would take its number, and get what libraries print there
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def abandon_broken_streams() -> None:
    """Let what is left in the buffers of streams that cannot be written go nowhere, so that the interpreter ends quietly."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with contextlib.suppress(OSError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())
