"""The live line at the bottom of a terminal, which shows what a job does now, below the permanent lines.

tqdm keeps the line there and writes above it. This module makes its text and fits it to the terminal.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from typing import Any, TextIO

from tqdm import tqdm

from bigq.progress.display import Display, Finished, Lines, Moment, head_of, parts_of, printable_lines, while_writable

#: Columns of the live line's bar.
LEAST_BAR, MOST_BAR = 5, 24
#: Parts of the live line after its head, the most important first. A narrow terminal shows only the first ones.
IMPORTANCE = ("percent", "eta", "host", "gpu", "rate", "steps", "bar")
FULL, PARTS = "█", " ▏▎▍▌▋▊▉"


def display_for(stream: TextIO, *, quiet: bool = False, dumb: bool = False) -> Display:
    """The display that suits a stream. dumb: the terminal cannot redraw a line."""
    if quiet:
        return Display()
    return Live(stream) if stream.isatty() and not dumb else Lines(stream)


class Live(Lines):
    """On a terminal: the same lines, and below them the live line."""

    period = 0.25

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._line: _LiveLine | None = None

    def open(self, moment: Moment) -> None:
        with while_writable():
            self._line = _LiveLine(file=self._stream, leave=False, delay=1)
        self.tick(moment)

    def close(self) -> None:
        with while_writable():
            if self._line is not None:
                self._line.clear(nolock=True)
                self._line.close()
        self._line = None

    def tick(self, moment: Moment) -> None:
        self._write(moment)
        with while_writable():
            if self._line is not None:
                self._line.refresh(nolock=True)

    def phase(self, moment: Moment) -> None:
        self.tick(moment)

    def block(self, done: Finished, moment: Moment) -> None:
        self._write(moment)
        super().block(done, moment)

    def _write(self, moment: Moment) -> None:
        """Set the text that the line shows when it is drawn next."""
        if self._line is not None:
            self._line.text = live_line(moment, _columns(self._stream) - 1, _writes(self._stream, f"{FULL}{PARTS}▕▏–"))

    def columns(self) -> int:
        return _columns(self._stream)

    def say(self, text: str) -> None:
        with while_writable():
            tqdm.write(printable_lines(text), file=self._stream, nolock=True)
            self._stream.flush()


def live_line(moment: Moment, width: int, unicode: bool = True) -> str:
    """The parts of a moment that fit into ``width`` columns."""
    head = head_of(moment)
    room = width - len(head)
    chosen = set()
    for name in IMPORTANCE:
        needed = sum(2 + len(part) for part in parts_of(moment, (name,))) if name != "bar" else 2 + LEAST_BAR
        if needed > room:
            break
        chosen.add(name)
        room -= needed
    parts = [head, *parts_of(moment, [n for n in ("steps", "percent") if n in chosen])]
    if "bar" in chosen:
        parts.append(bar(moment.fraction, min(MOST_BAR, LEAST_BAR + room), unicode))
    parts += parts_of(moment, [n for n in ("eta", "rate", "host", "gpu") if n in chosen])
    line = "  ".join(parts)[: max(0, width)]
    return line if unicode else line.replace("–", "-")


def bar(fraction: float, width: int, unicode: bool = True) -> str:
    """A bar of ``width`` columns, its frame included."""
    inner = width - 2
    if not unicode:
        return f"[{'#' * int(fraction * inner):{inner}}]"
    full, part = divmod(int(fraction * inner * 8), 8)
    return f"▕{FULL * full + PARTS[part : part + 1] * (full < inner):{inner}}▏"


class _LiveLine(tqdm):  # type: ignore[type-arg]
    """tqdm's line at the bottom of the terminal, and its way of writing above it, with a text of our own.

    The terminal erases the rest of a longer line. tqdm would overwrite it with spaces, which wrap where the terminal has become narrower.
    tqdm's lock is not used: it stays locked forever where a stream fails in the middle of a line, and calls of a display come one at a
    time anyway. delay: tqdm draws nothing by itself.
    """

    monitor_interval = 0
    text = ""

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        def show(text: str) -> None:
            file.write(f"\r{text}\x1b[K")
            file.flush()

        return show

    def __str__(self) -> str:
        return self.text


def _columns(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError, io.UnsupportedOperation):
        return 80


def _writes(stream: TextIO, text: str) -> bool:
    try:
        text.encode(getattr(stream, "encoding", None) or "ascii")
    except (UnicodeError, LookupError):
        return False
    return True
