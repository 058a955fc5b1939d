"""Stopping a job on a signal, from a scheduler or from the keyboard.

The first SIGTERM, SIGINT or SIGUSR1 asks the job to finish its step, save its activations and exit. When the grace period is over, the
process exits in any case and loses at most the current step. A second SIGINT ends it at once. Neither damages the output: a job may be
killed at any instant.

A separate thread reads signals from a pipe that the interpreter's C handler writes to. So a signal is noticed even while the main
thread is inside a factorization that takes minutes.
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

from bigq.errors import RESUME, ResourceError, Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
INTERRUPTED = 130
#: The reason of a stop that a person asked for at the keyboard.
BY_HAND = signal.SIGINT.name
#: Seconds that ``last_words`` may take.
LAST_WORDS = 2.0

#: The handlers that ``listen`` replaced.
_previous_handlers: dict[signal.Signals, Any] = {}


def _restore_handlers() -> None:
    for number, handler in _previous_handlers.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: the handler was not set from Python


def _detach_child() -> None:
    """Restore the handlers in a forked process, which shares the pipe: its signals would stop this job instead of itself."""
    if _previous_handlers:
        signal.set_wakeup_fd(-1)
        _restore_handlers()


os.register_at_fork(after_in_child=_detach_child)


class Stop:
    """Whether the job was asked to stop, and its deadline. grace: seconds from the request to the deadline.

    notify: called from the signal thread with a message, and with the exit code where the process is about to exit.
    exit_code: of a job that stops. advice: what to do then.
    """

    def __init__(
        self,
        grace: float = 60.0,
        notify: Callable[[str, int | None], None] | None = None,
        exit_code: int = Stopped.exit_code,
        advice: str = RESUME,
    ) -> None:
        self.grace, self.exit_code, self.advice = grace, exit_code, advice
        #: Asked when the grace period is over: an error that ends the job instead, or None. It may take ``LAST_WORDS`` seconds.
        self.last_words: Callable[[], str | None] | None = None
        self._notify = notify or _notify
        self._reason: str | None = None
        self._deadline = float("inf")

    @property
    def requested(self) -> bool:
        return self._reason is not None

    @property
    def asked_by(self) -> str | None:
        """The reason of the request, such as "SIGTERM"; None before one."""
        return self._reason

    @property
    def seconds_left(self) -> float:
        """Seconds until the deadline; infinite before a request."""
        return self._deadline - time.monotonic()

    def request(self, reason: str) -> None:
        """Ask the job to stop. Only the first request counts. reason: for the message, such as a signal's name."""
        if self._reason is None:
            self._deadline = time.monotonic() + self.grace
            self._reason = reason

    def check(self) -> None:
        """Raise Stopped where a stop was requested. For steps before the first block, which are cheap to repeat."""
        if self.requested:
            raise self.error("before the first block")

    def error(self, where: str) -> Stopped:
        """The error that ends the job. where: the place it stopped at, such as "at block 3 of 80"."""
        return Stopped(f"{self._reason}: stopped {where}; {self.advice}", self.exit_code)

    @contextlib.contextmanager
    def listen(self) -> Iterator[None]:
        """Handle the stop signals while the context is open. The process exits from here after the grace period.

        For programs that own their process. Outside the main thread, where Python cannot set handlers, it does nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        read, write = os.pipe()
        os.set_blocking(write, False)
        # The pipe is set first: a signal between the two steps would be lost.
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
                problem = self._said_at_last()
                if problem is not None:
                    self._leave(ResourceError.exit_code, problem)
                self._exit(self.exit_code, f"stopped {self.grace:g} s after {self._reason}")
                return
            numbers = os.read(pipe, 64)
            if not numbers:
                return
            for number in numbers:
                if number == signal.SIGINT and self.requested:
                    self._exit(INTERRUPTED, "interrupted")
                if number in SIGNALS and not self.requested:
                    self.request(signal.Signals(number).name)
                    message = f"{self._reason}: stopping after this step, within {self.grace:g} s; press Ctrl-C to stop at once"
                    self._notify(message, None)

    def _said_at_last(self) -> str | None:
        """What ``last_words`` returns in time. A disk that hangs must not keep the process."""
        if self.last_words is None:
            return None
        ask, said = self.last_words, list[str | None]()

        def answer() -> None:
            with contextlib.suppress(Exception):  # whatever fails here, the process exits as it would without
                said.append(ask())

        thread = threading.Thread(target=answer, name="last words", daemon=True)
        thread.start()
        thread.join(LAST_WORDS)
        return said[0] if said else None

    def _exit(self, code: int, text: str) -> None:
        lost = "only the current step is lost; " if self.advice == RESUME else ""
        self._leave(code, f"{text}; {lost}{self.advice}")

    def _leave(self, code: int, text: str) -> None:
        self._notify(text, code)
        os._exit(code)


def _notify(text: str, _: int | None) -> None:
    if sys.__stderr__ is not None:  # if it is None, file descriptor 2 may be any file
        with contextlib.suppress(OSError, ValueError):
            os.write(sys.__stderr__.fileno(), f"\nbigq: {text}\n".encode())


class GraceEstimate:
    """Estimates from earlier blocks whether the current block can be finished within the grace period.

    Each kind of block ("solve", "replay", "head") has its own time. A kind that was never finished has no estimate.
    """

    #: The block's estimated remaining time may be at most this part of the time left.
    SAFETY = 0.6

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._seconds: dict[str, float] = {}
        self._kind = ""
        self._began = 0.0
        self._decision: bool | None = None

    def begin(self, kind: str) -> None:
        """A block of this kind starts."""
        self._kind, self._began, self._decision = kind, self._now(), None

    def end(self) -> None:
        """The block is finished. Its time is the estimate for the next one of its kind."""
        self._seconds[self._kind] = self._now() - self._began

    def must_stop(self, left: float) -> bool:
        """Whether to stop now instead of finishing the block. left: seconds until the deadline.

        Ask only after a stop was requested. The first answer holds for the whole block.
        """
        if self._decision is None:
            spent = self._now() - self._began
            typical = self._seconds.get(self._kind)
            # A block that has hardly started is not worth finishing: stopping loses almost no work.
            finish = typical is not None and spent > 0.1 * typical and typical - spent < self.SAFETY * left
            self._decision = not finish
        return self._decision
