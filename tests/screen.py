"""A terminal small enough to read: what a person would see of bytes written to it."""

from __future__ import annotations

import fcntl
import os
import re
import select
import struct
import termios
from typing import TextIO

ESCAPE = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])")


class Screen:
    """Rows that grow downwards. Lines longer than ``columns`` wrap, as terminals do. columns may be changed at any time."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.rows = [""]
        self.at = 0
        self.escapes: set[str] = set()

    def feed(self, text: str) -> None:
        place = 0
        while place < len(text):
            match = ESCAPE.match(text, place)
            if match:
                self.escapes.add(match[2])
                if match[2] == "K":
                    self.rows[-1] = self.rows[-1][: self.at]
                place = match.end()
                continue
            self._put(text[place])
            place += 1

    def _put(self, character: str) -> None:
        if character == "\n":
            self.rows.append("")
            self.at = 0
        elif character == "\r":
            self.at = 0
        else:
            if self.at >= self.columns:
                self._put("\n")
            row = self.rows[-1].ljust(self.at)
            self.rows[-1] = row[: self.at] + character + row[self.at + 1 :]
            self.at += 1

    @property
    def seen(self) -> list[str]:
        """The rows, those at the bottom that are empty left out."""
        rows = [row.rstrip() for row in self.rows]
        while rows and not rows[-1]:
            rows.pop()
        return rows


class Terminal:
    """A pseudo-terminal. stream: what is written to it arrives on ``screen``, when that is looked at."""

    def __init__(self, columns: int, encoding: str = "utf-8") -> None:
        self._master, self.slave = os.openpty()
        self.stream: TextIO = open(self.slave, "w", encoding=encoding, errors="backslashreplace", closefd=False)
        self._screen = Screen(columns)
        self.raw = b""
        self.resize(columns)

    def resize(self, columns: int) -> None:
        self.look()
        self._screen.columns = columns
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def look(self, seconds: float = 0.0) -> Screen:
        """What is there to see now, or as soon as something arrives within so many seconds."""
        data = b""
        while select.select([self._master], [], [], seconds)[0]:
            try:
                chunk = os.read(self._master, 65536)
            except OSError:  # EIO: nobody has the other end open any more
                break
            data, seconds = data + chunk, 0.0
        self.raw += data
        self._screen.feed(data.decode(errors="replace"))
        return self._screen

    def close(self) -> None:
        self.stream.close()
        os.close(self.slave)
        os.close(self._master)
