"""Reading ranges of files on a server until all bytes are there: failed and short answers are asked for again, from where they ended."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from bigq.errors import ResourceError
from bigq.io.remote.transport import Status, Transient, Transport

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long to keep asking. Times in seconds.

    silence: give up after this time without a byte from the server, for any request of this reader. first, longest: pauses between two
    tries; each is twice the one before.
    """

    silence: float
    first: float = 0.5
    longest: float = 60.0


class Closed(Exception):
    """The reader was closed during a request."""


class RangeReader:
    """Reads ranges with patience. say: shows the user a sentence, such as that a server does not answer."""

    def __init__(self, transport: Transport, patience: Patience, say: Callable[[str], None] = lambda _: None) -> None:
        self.transport, self.patience, self.say = transport, patience, say
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._last_byte = time.monotonic()
        self._told = False
        #: Bytes received so far.
        self.received = 0

    def close(self) -> None:
        """Make running and later requests raise Closed, at their next byte or pause."""
        self._closed.set()

    def status(self, name: str) -> Status:
        """The status of a file. Raises CheckpointError, ResourceError."""
        return self.patiently(name, lambda: self.transport.status(name))

    def read(self, name: str, status: Status, start: int, stop: int, write: Callable[[bytes, int], None]) -> None:
        """Read bytes [start, stop) of a file. write: called with each piece and its position in the file, in order.

        Raises CheckpointError, ResourceError, Closed, or what ``write`` raises.
        """
        at = start

        def attempt() -> None:
            nonlocal at
            for piece in self.transport.stream(name, status, at, stop):
                if self._closed.is_set():
                    raise Closed
                if len(piece) > stop - at:
                    raise Transient(f"sent more than the {stop - start} bytes that were asked for")
                write(piece, at)
                at += len(piece)
                self._progress(len(piece))
            if at < stop:
                raise Transient(f"the connection ended {stop - at} bytes early")

        self.patiently(name, attempt)

    def _progress(self, count: int) -> None:
        with self._lock:
            self._last_byte = time.monotonic()
            self.received += count
            self._told = False

    def patiently(self, name: str, attempt: Callable[[], _T]) -> _T:
        """Make a request again while it raises Transient, until the patience ends. name: of its file. Raises ResourceError, Closed."""
        begun, pause = time.monotonic(), self.patience.first
        received = self.received
        while True:
            if self._closed.is_set():
                raise Closed
            try:
                found = attempt()
            except Transient as error:
                if self.received > received:  # bytes arrive, if not all
                    received, pause = self.received, self.patience.first
                silent = time.monotonic() - max(begun, self._last_byte)
                wait = pause if error.wait is None else error.wait
                if silent + wait > self.patience.silence:
                    raise ResourceError(
                        f"{self.transport.address(name)}: cannot be fetched: {error}, for {silent:.0f} s; check the network, then run the "
                        "same command again"
                    ) from error
                if silent > self.patience.first:
                    self._tell(name, error, silent)
                # Tries of several threads spread out.
                self._closed.wait(wait * random.uniform(1.0, 1.25))
                if error.wait is None:
                    pause = min(2 * pause, self.patience.longest)
            else:
                return found

    def _tell(self, name: str, error: Transient, silent: float) -> None:
        """Say, once in every silence of the server, that requests fail."""
        with self._lock:
            told, self._told = self._told, True
        if not told:
            left = self.patience.silence - silent
            self.say(f"warning: {self.transport.address(name)}: {error}; trying again for up to {left:.0f} s")
