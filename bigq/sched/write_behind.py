"""Write-behind: a finished block is written while the next one is computed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class WriteBehind:
    """Runs steps in order, one at a time, in a separate thread.

    ``start`` waits for the previous step, so at most one finished block is held in memory. A step's error is raised by the next call.
    threaded: False runs each step in the caller's thread.
    """

    def __init__(self, *, threaded: bool) -> None:
        self._threaded = threaded
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="write-behind")
        self._pending: Future[None] | None = None

    def start(self, step: Callable[[], None]) -> None:
        """Start a step once the pending one has ended. Raises the error of the pending step; then ``step`` does not run."""
        self.wait()
        if self._threaded:
            self._pending = self._pool.submit(step)
        else:
            step()

    def wait(self) -> None:
        """Wait for the pending step. Raises its error."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait for the pending step and ignore its error."""
        with contextlib.suppress(Exception):
            self.wait()
        self._pool.shutdown()
