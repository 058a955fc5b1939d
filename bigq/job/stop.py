"""Being asked to stop: by a scheduler that wants its machine back, or a person at the keyboard.

The first SIGTERM, SIGINT or SIGUSR1 asks the job to finish its step, save its activations and leave; after the grace it is over however
far the job got, which loses no more than the step. A second SIGINT ends it at once. Neither can damage anything: a job may be
killed at any instant.

Signals are read by a thread of their own from a pipe that the interpreter's C handler writes to, so they are heard even
while the main thread is inside a factorization of minutes.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from bigq.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
INTERRUPTED = 130

#: The handlers that ``listen`` has replaced.
_previous_handlers: dict[signal.Signals, Any] = {}


def _restore_handlers() -> None:
    for number, handler in _previous_handlers.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: one that is not Python's


def _detach_child() -> None:
    """A forked process shares the pipe: what it is sent would be heard by this job, and not by itself."""
    if _previous_handlers:
        signal.set_wakeup_fd(-1)
        _restore_handlers()


os.register_at_fork(after_in_child=_detach_child)


class Stop:
    """Whether to stop, and until when. Without ``listen`` nobody ever asks.

    notify: is given what to notify of a signal, and the exit code if that is the end; from the thread that hears it.
    """

    def __init__(self, grace: float = 60.0, notify: Callable[[str, int | None], None] | None = None) -> None:
        self.grace = grace
        self._notify = notify or _notify
        self._reason: str | None = None
        self._deadline = float("inf")

    @property
    def requested(self) -> bool:
        return self._reason is not None

    @property
    def seconds_left(self) -> float:
        """Seconds until the grace is over."""
        return self._deadline - time.monotonic()

    def request(self, reason: str) -> None:
        """Ask to stop, unless somebody did before."""
        if self._reason is None:
            self._deadline = time.monotonic() + self.grace
            self._reason = reason

    def check(self) -> None:
        """Raise Stopped where asked to; for steps that cost nothing to repeat."""
        if self.requested:
            raise self.error("before the first block was begun")

    def error(self, where: str) -> Stopped:
        """The error that ends the job."""
        return Stopped(f"{self._reason}: stopped {where}; run the same command again to go on")

    @contextlib.contextmanager
    def listen(self) -> Iterator[None]:
        """Heed signals, in a program of our own. After the grace the process ends here. In other threads than the main one, nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        read, write = os.pipe()
        os.set_blocking(write, False)
        # The pipe first: a signal that came in between would be heard by nobody.
        before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in SIGNALS:
            _previous_handlers[number] = signal.signal(number, lambda *_: None)
        thread = threading.Thread(target=self._listen, args=(read,), name="signals", daemon=True)
        thread.start()
        try:
            yield
        finally:
            _restore_handlers()
            _previous_handlers.clear()
            signal.set_wakeup_fd(before)
            os.close(write)
            thread.join()
            os.close(read)

    def _listen(self, pipe: int) -> None:
        while True:
            wait = None if self._deadline == float("inf") else max(0.0, self.seconds_left)
            ready, _, _ = select.select([pipe], [], [], wait)
            if not ready:
                self._exit(Stopped.exit_code, f"stopped {self.grace:g} s after {self._reason}; the step under way is lost, nothing else")
                return
            numbers = os.read(pipe, 64)
            if not numbers:
                return
            for number in numbers:
                if number == signal.SIGINT and self.requested:
                    self._exit(INTERRUPTED, "interrupted at once; the step under way is lost, nothing else")
                if number in SIGNALS and not self.requested:
                    self.request(signal.Signals(number).name)
                    said = f"{self._reason}: finishing this step and stopping, within {self.grace:g} s; Ctrl-C ends it at once"
                    self._notify(said, None)

    def _exit(self, code: int, text: str) -> None:
        self._notify(f"{text}; run the same command again to go on", code)
        os._exit(code)


def _notify(text: str, _: int | None) -> None:
    if sys.__stderr__ is not None:  # else number 2 may be any file
        with contextlib.suppress(OSError, ValueError):
            os.write(sys.__stderr__.fileno(), f"\nbigq: {text}\n".encode())


class GraceEstimate:
    """Whether a block that is under way can be finished in the time that is left, by what others took.

    Kinds of blocks (those to solve, those to replay) take different times; of a kind that was never finished nothing is known.
    """

    #: Part of the time left that a block may be expected to take.
    SAFETY = 0.6

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._seconds: dict[str, float] = {}
        self._kind = ""
        self._began = 0.0
        self._staying: bool | None = None

    def begin(self, kind: str) -> None:
        """A block of a kind is begun."""
        self._kind, self._began, self._staying = kind, self._now(), None

    def end(self) -> None:
        """The block is finished: how long it took says how long the next one will take."""
        self._seconds[self._kind] = self._now() - self._began

    def must_stop(self, left: float) -> bool:
        """To be asked once it is known that the job is to stop in ``left`` seconds; the answer stays for the block under way."""
        if self._staying is None:
            spent = self._now() - self._began
            typical = self._seconds.get(self._kind)
            # One that has hardly begun is not worth finishing: what it would bring is lost to nobody.
            self._staying = typical is not None and spent > 0.1 * typical and typical - spent < self.SAFETY * left
        return not self._staying
