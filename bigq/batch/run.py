"""Running the jobs of a file, one after another, each in a process of its own.

A job that crashes, runs out of memory or is killed ends only its own process. Signals are passed on to the job that runs, which finishes
its step; no other one is started then.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigq.batch.attempts import MAX_MESSAGE, Attempt
from bigq.batch.table import BatchJob
from bigq.errors import BigqError, BusyError, Stopped
from bigq.inspect.status import status
from bigq.job.stop import INTERRUPTED, SIGNALS

_PR_SET_PDEATHSIG = 1
#: What became of a job, and what it means.
OUTCOMES: Mapping[str, str] = {
    "done": "everything is written",
    "done before": "it was finished already",
    "stopped": "it was asked to stop; the same command resumes it",
    "in use": "another process is writing to its folder",
    "failed": "it ended with an error",
    "waiting": "it was not started; the same command starts it",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a job. state: one of ``OUTCOMES``. message: its error, or None."""

    job: BatchJob
    state: str
    exit_code: int | None = None
    message: str | None = None
    seconds: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "index": self.job.index,
            "model": self.job.model,
            "out": self.job.out,
            "state": self.state,
            "exit_code": self.exit_code,
            "message": self.message,
            "seconds": self.seconds,
        }


def exit_code_of(outcomes: Sequence[Outcome], on_stop: int) -> int:
    """0 if all is done; ``on_stop`` if the same command would continue; otherwise the code of the first job that failed."""
    if any(each.exit_code == INTERRUPTED and each.state == "stopped" for each in outcomes):
        return INTERRUPTED
    if any(each.state in ("stopped", "waiting") for each in outcomes):
        return on_stop
    return next((each.exit_code for each in outcomes if each.exit_code), 0)


class Signals:
    """Receives the signals that ask to stop, and passes them on to the process of the job that runs.

    reason: the first one's name, or None. While ``interrupting`` is set, a signal raises Stopped.
    """

    def __init__(self, on_stop: int = Stopped.exit_code) -> None:
        self.reason: str | None = None
        self.interrupting = False
        self._on_stop = on_stop
        self._process: subprocess.Popen[bytes] | None = None

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def watch(self, process: subprocess.Popen[bytes] | None) -> None:
        """Pass signals on to this process from now on."""
        self._process = process
        if self.reason is not None and process is not None:
            process.send_signal(signal.SIGTERM)

    def _receive(self, number: int, _: object) -> None:
        first = self.reason is None
        self.reason = self.reason or signal.Signals(number).name
        if self.interrupting:
            raise Stopped(f"{self.reason}: stopped before the first job; run the same command again", self._on_stop)
        if self._process is not None:
            # The job takes a second SIGINT for impatience. If the first one reached it too, this must not be the second.
            self._process.send_signal(signal.SIGTERM if first and number == signal.SIGINT else number)


@dataclass(frozen=True, slots=True, kw_only=True)
class Runner:
    """command: what runs ``bigq`` with the arguments that follow, the first of which is a file descriptor to write an error to.

    say: receives a line before each job and warnings.
    """

    file: Path
    command: Sequence[str]
    signals: Signals
    say: Callable[[str], None]

    def run(self, jobs: Sequence[BatchJob], done: Mapping[int, bool], more: Sequence[str] = ()) -> list[Outcome]:
        """Run the jobs that are not done. more: options for all of them."""
        outcomes = []
        for job in jobs:
            if done.get(job.index):
                outcomes.append(Outcome(job=job, state="done before", exit_code=0))
            elif self.signals.reason is not None:
                outcomes.append(Outcome(job=job, state="waiting"))
            else:
                self.say(f"job {job.index} ({len(outcomes) + 1} of {len(jobs)}): {job.model} → {job.out}")
                outcomes.append(self._one(job, more))
        return outcomes

    def _one(self, job: BatchJob, more: Sequence[str]) -> Outcome:
        started = time.monotonic()
        read, write = os.pipe()
        os.set_blocking(read, False)
        words = job.words()
        line = [*self.command, str(write), words[0], *more, *words[1:]]
        try:
            # A session of its own: Ctrl-C reaches this process only, which passes it on.
            process = subprocess.Popen(
                line, stdin=subprocess.DEVNULL, stdout=2, pass_fds=[write], start_new_session=True, preexec_fn=_ending_with(os.getpid())
            )
        finally:
            os.close(write)
        self.signals.watch(process)
        attempt = Attempt.begin(job, process.pid)
        self._record(attempt)
        code = process.wait()
        self.signals.watch(None)
        message = _told(read)
        outcome = self._judged(job, code, message, round(time.monotonic() - started, 3))
        if outcome.exit_code is not None:
            self._record(attempt.end(outcome.exit_code, outcome.message))
        return outcome

    def _judged(self, job: BatchJob, code: int, message: str | None, seconds: float) -> Outcome:
        if code < 0:
            message = f"its process was ended by {_signal_name(-code)}"
            code = 128 - code
        state = "done" if code == 0 else "failed"
        unhandled = self.signals.reason is not None and code in [128 + number for number in SIGNALS]  # while the program was starting
        if code in (Stopped.exit_code, INTERRUPTED) or unhandled:
            state = "stopped"
            code = code if code == INTERRUPTED else Stopped.exit_code
        elif code == BusyError.exit_code:
            state = "in use"
        if message is None and code != 0:
            with contextlib.suppress(BigqError):
                message = status(Path(os.path.expanduser(job.out))).said
        return Outcome(job=job, state=state, exit_code=code, message=message, seconds=seconds)

    def _record(self, attempt: Attempt) -> None:
        try:
            attempt.save(self.file)
        except BigqError as error:
            self.say(f"warning: {error}; bigq status {self.file} will not show how this job ended")


def _ending_with(parent: int) -> Callable[[], None]:
    """What the process of a job does first: it asks to be stopped when this process ends, however that happens."""
    libc = ctypes.CDLL(None)

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
        if os.getppid() != parent:
            os._exit(Stopped.exit_code)

    return prepare


def report_to(fd: int) -> Callable[[str], None]:
    """In the process of a job: a function that sends its error to the process that runs the jobs."""

    def told(message: str) -> None:
        with contextlib.suppress(OSError):
            os.write(fd, json.dumps(message[:MAX_MESSAGE]).encode())

    return told


def _told(fd: int) -> str | None:
    """What a job has sent, which has ended."""
    try:
        value = json.loads(os.read(fd, 12 * MAX_MESSAGE) or b"null")
    except (OSError, ValueError):
        return None
    finally:
        os.close(fd)
    return value if isinstance(value, str) else None


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def python_command(module: str, function: str) -> list[str]:
    """A Python that imports from the same places as this one and calls a function with the arguments that follow."""
    # Given one by one: with -c and -m, the current folder would come first, and whatever modules it holds.
    return [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; from {module} import {function}; {function}()"]
