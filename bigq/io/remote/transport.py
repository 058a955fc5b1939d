"""The interface to a server of files, and the errors of one request."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from bigq.errors import CheckpointError, ResourceError


class Transient(Exception):
    """A request that failed, and may succeed if it is made again. wait: seconds that the server asks for, or None."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """A file on a server. size: in bytes. version: changes with the content, as far as the server tells; else empty."""

    size: int
    version: str


class Transport(Protocol):
    """A folder of files on a server. Its methods make one request each, and may be called from any thread.

    They raise Transient, CheckpointError where a file is missing or has changed, and ResourceError where another request is of no use.
    """

    def address(self, name: str) -> str:
        """A file as messages name it."""

    def status(self, name: str) -> Status:
        """The size and version of a file."""

    def stream(self, name: str, status: Status, start: int, stop: int) -> Iterator[bytes]:
        """Bytes [start, stop) of a file in pieces, or the first of them where the connection ends early without an error.

        status: of the file as it was when the job began; a file with another one has changed.
        """


def changed(address: str) -> CheckpointError:
    """The error for a file that is not the one that the job began with."""
    return CheckpointError(f"{address}: changed while it was read; the source is no longer the same model: begin the job again with it")


def too_large(address: str, limit: int) -> ResourceError:
    """The error for a small file of a model that has more than ``limit`` bytes."""
    return ResourceError(f"{address}: has more than {limit} bytes; remove it, or give a folder without it")
