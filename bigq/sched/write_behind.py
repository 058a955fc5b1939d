"""Writing a finished block while the next one is computed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class WriteBehind:
    """One step at a time in a thread of its own, in the order in which they were given.

    A step waits for the one before it, so no more than one finished block is held. An error comes out at the next call.
    threaded False: a step runs when it is given, in the caller's thread.
    """

    def __init__(self, *, threaded: bool) -> None:
        self._threaded = threaded
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="write-behind")
        self._pending: Future[None] | None = None

    def start(self, step: Callable[[], None]) -> None:
        """Run a step, after the pending one. Raises what that one raised; then ``step`` does not run."""
        self.wait()
        if self._threaded:
            self._pending = self._pool.submit(step)
        else:
            step()

    def wait(self) -> None:
        """Until nothing is pending. Raises what the pending step raised."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Let the pending step end; what it raises is not told."""
        with contextlib.suppress(Exception):
            self.wait()
        self._pool.shutdown()
