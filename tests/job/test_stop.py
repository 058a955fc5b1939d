"""Stopping on signals: they are noticed while the main thread computes, the grace period ends, and handlers are restored."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import bigq
from bigq.errors import Stopped
from bigq.job import stop as stop_module
from bigq.job.stop import SIGNALS, GraceEstimate, Stop

ROOT = Path(bigq.__file__).resolve().parent.parent

#: A long C call that lets other threads run and checks for no signals, like a factorization.
BUSY = "hashlib.pbkdf2_hmac('sha256', b'x', b'y', 2**30)"
IDLE = "time.sleep(60)"
#: A shell that runs tests in the background may have them ignore SIGHUP, which children inherit.
PROGRAM = """
import hashlib, signal, sys, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from bigq.errors import BigqError
from bigq.job.stop import Stop
stop = Stop({grace})
try:
    with stop.listen():
        print("ready", flush=True)
        {body}
except BigqError as error:
    print(error, flush=True)
    sys.exit(error.exit_code)
"""


class Program:
    """A child process that handles signals, and its output."""

    def __init__(self, body: str, grace: float) -> None:
        code = PROGRAM.format(body=body.replace("\n", "\n        "), grace=grace)
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
        )
        assert self.process.stdout is not None and self.process.stderr is not None
        self.out, self.err = self.process.stdout, self.process.stderr
        assert self.out.readline() == "ready\n", self.err.read()

    def send(self, number: int) -> float:
        self.process.send_signal(number)
        return time.monotonic()

    def ended(self) -> tuple[int, str, str]:
        # Not ``communicate``: it does not see what was read together with the first line.
        out, err = self.out.read(), self.err.read()
        return self.process.wait(30), out, err


@pytest.fixture
def start() -> Iterator[Callable[..., Program]]:
    programs: list[Program] = []

    def begin(body: str, grace: float = 60.0) -> Program:
        programs.append(Program(body, grace))
        return programs[-1]

    yield begin
    for program in programs:
        with contextlib.suppress(ProcessLookupError):
            program.process.kill()
        program.process.communicate()


@pytest.mark.parametrize("body", [BUSY, IDLE], ids=["busy", "idle"])
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_is_noticed_and_the_grace_ends(number: signal.Signals, body: str, start: Callable[..., Program]) -> None:
    program = start(body, grace=0.5)
    sent = program.send(number)
    code, out, err = program.ended()
    assert code == 75 == Stopped.exit_code
    assert 0.45 < time.monotonic() - sent < 15
    first, second = [line for line in err.splitlines() if line]
    assert first == f"bigq: {number.name}: stopping after this step, within 0.5 s; press Ctrl-C to stop at once"
    assert second.startswith(f"bigq: stopped 0.5 s after {number.name}; ") and second.endswith("run the same command again to resume")
    assert out == ""


@pytest.mark.parametrize("first", SIGNALS, ids=lambda number: number.name)
def test_an_interrupt_on_top_of_anything_ends_it_at_once(first: signal.Signals, start: Callable[..., Program]) -> None:
    program = start(BUSY)
    program.send(first)
    assert "stopping after this step" in "".join([program.err.readline(), program.err.readline()])
    sent = program.send(signal.SIGINT)
    code, _, err = program.ended()
    assert code == 130 and time.monotonic() - sent < 10
    assert "interrupted; only the current step is lost" in err


@pytest.mark.parametrize("again", [signal.SIGTERM, signal.SIGUSR1])
def test_a_repeated_signal_changes_nothing(again: signal.Signals, start: Callable[..., Program]) -> None:
    """Schedulers may send a signal twice; the grace period starts with the first."""
    program = start(BUSY, grace=1.5)
    sent = program.send(signal.SIGTERM)
    for _ in range(3):
        time.sleep(0.3)
        program.send(again)
    code, _, err = program.ended()
    assert code == 75 and 1.4 < time.monotonic() - sent < 15
    assert err.count("stopping after this step") == 1


def test_a_step_that_ends_in_time_ends_the_job(start: Callable[..., Program]) -> None:
    program = start("while not stop.requested:\n    time.sleep(0.02)\nassert 50 < stop.seconds_left <= 60\nraise stop.error('at block 3')")
    program.send(signal.SIGUSR1)
    code, out, err = program.ended()
    assert (code, out) == (75, "SIGUSR1: stopped at block 3; run the same command again to resume\n")
    assert "Traceback" not in err


def test_a_signal_sent_right_away_is_not_lost(start: Callable[..., Program]) -> None:
    program = start("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\nwhile True: stop.check()")
    assert program.ended()[0] == 75


def test_other_signals_keep_their_handlers(start: Callable[..., Program]) -> None:
    program = start(IDLE)
    program.send(signal.SIGHUP)
    assert program.ended()[0] == -signal.SIGHUP


def test_without_stderr_it_ends_too(start: Callable[..., Program]) -> None:
    program = start("import os\nos.close(2)\n" + IDLE, grace=0.3)
    time.sleep(0.3)
    program.send(signal.SIGTERM)
    assert program.ended()[0] == 75


def test_messages_are_not_written_to_files(tmp_path: Path) -> None:
    """Without stderr, the next file that is opened gets file descriptor 2."""
    path = tmp_path / "shard"
    code = PROGRAM.format(body="import os, signal; os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)", grace=0.3)
    opened = f"file = open({str(path)!r}, 'wb', buffering=0)\nassert file.fileno() == 2\n"
    command = ["sh", "-c", 'exec "$0" -c "$1" 2>&-', sys.executable, opened + code]
    assert subprocess.run(command, stdout=subprocess.PIPE, cwd=ROOT, timeout=30, check=False).returncode == 75
    assert path.read_bytes() == b""


def test_child_programs_do_not_inherit_the_handlers(start: Callable[..., Program]) -> None:
    """A signal to one of them ends it and does not reach the job."""
    body = """import subprocess
child = subprocess.Popen([sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"], stdout=subprocess.PIPE)
child.stdout.readline()
child.terminate()
print(child.wait(), stop.requested, flush=True)"""
    code, out, _ = start(body).ended()
    assert (code, out) == (0, "-15 False\n")


def test_signals_of_forked_processes_do_not_reach_the_job(start: Callable[..., Program]) -> None:
    """They inherit its pipe and handlers; both must be removed."""
    body = """import os, signal
parent = os.getpid()
read, write = os.pipe()
pid = os.fork()
if pid == 0:
    os.write(write, b"up")
    time.sleep(60)
    os._exit(7)
os.read(read, 2)
os.kill(pid, signal.SIGTERM)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
time.sleep(0.3)
print(stop.requested, flush=True)
os.kill(parent, signal.SIGTERM)
while not stop.requested: time.sleep(0.02)
print("heard", flush=True)"""
    code, out, _ = start(body).ended()
    assert (code, out) == (0, "-15\nFalse\nheard\n")


def test_handlers_are_restored_and_nothing_stays() -> None:
    def mine(*_: object) -> None:
        pass

    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        signal.signal(signal.SIGUSR1, mine)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        expected = {number: signal.getsignal(number) for number in SIGNALS}
        files, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
        for _ in range(3):
            stop = Stop(0.2)
            with stop.listen():
                assert all(signal.getsignal(number) is not expected[number] for number in SIGNALS)
                os.kill(os.getpid(), signal.SIGUSR1)
                while not stop.requested:
                    time.sleep(0.01)
            assert {number: signal.getsignal(number) for number in SIGNALS} == expected
            assert signal.set_wakeup_fd(-1) == -1
        time.sleep(0.5)  # past the grace period, without effect
        assert len(os.listdir("/proc/self/fd")) == files and threading.active_count() == threads
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_handlers_are_restored_after_an_error() -> None:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    with pytest.raises(ValueError, match="x"), Stop().listen():
        raise ValueError("x")
    assert {number: signal.getsignal(number) for number in SIGNALS} == before


def test_a_handler_that_is_not_python_s_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """``signal.signal`` returns None for it and does not accept None."""
    real, before = signal.signal, signal.getsignal(signal.SIGUSR1)
    monkeypatch.setattr(stop_module.signal, "signal", lambda n, h: (real(n, h), None)[1] if n == signal.SIGUSR1 else real(n, h))
    try:
        with Stop().listen():
            pass
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    finally:
        real(signal.SIGUSR1, before)


def test_a_previous_wakeup_pipe_is_restored() -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write)
    try:
        with Stop().listen():
            pass
    finally:
        assert signal.set_wakeup_fd(-1) == write
        os.close(read)
        os.close(write)


def test_there_is_no_stop_without_a_request() -> None:
    stop = Stop(5)
    stop.check()
    assert not stop.requested and stop.seconds_left == float("inf")
    stop.request("a test")
    first = stop.seconds_left
    stop.request("another test")
    assert stop.requested and stop.seconds_left <= first <= 5
    with pytest.raises(Stopped, match=r"^a test: stopped .*; run the same command again to resume$"):
        stop.check()


# Whether a block can be finished in time.


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def taken(clock: Clock, **seconds: float) -> GraceEstimate:
    """An estimate after blocks that took these seconds."""
    estimate = GraceEstimate(clock)
    for kind, took in seconds.items():
        estimate.begin(kind)
        clock.now += took
        estimate.end()
    return estimate


@pytest.mark.parametrize(
    ("spent", "left", "leaves"),
    [
        (0.0, 1000.0, True),  # hardly started: little is lost
        (10.0, 1000.0, True),
        (10.1, 1000.0, False),
        (50.0, 84.0, False),  # 50 s remain, and 0.6 × 84 = 50.4 s may be used
        (50.0, 83.0, True),
        (99.0, 2.0, False),
        (99.0, 1.5, True),
        (120.0, 1.0, False),  # it takes longer than usual, so it is about to end
        (120.0, -1.0, False),
        (10.1, 0.0, True),
    ],
)
def test_a_block_is_finished_only_if_its_rest_fits_well(spent: float, left: float, leaves: bool, clock: Clock) -> None:
    estimate = taken(clock, solve=100.0)
    estimate.begin("solve")
    clock.now += spent
    assert estimate.must_stop(left) is leaves


def test_a_kind_without_a_finished_block_has_no_estimate(clock: Clock) -> None:
    estimate = taken(clock, replay=1.0)
    estimate.begin("solve")
    clock.now += 0.5
    assert estimate.must_stop(1e9)
    estimate.end()
    estimate.begin("replay")
    clock.now += 0.5
    assert not estimate.must_stop(60.0)


def test_the_latest_of_a_kind_counts(clock: Clock) -> None:
    estimate = taken(clock, solve=100.0)
    for took, leaves in ((100.0, True), (10.0, False)):
        estimate.begin("solve")
        clock.now += took
        estimate.end()
        estimate.begin("solve")
        clock.now += 11.0
        assert estimate.must_stop(30.0) is leaves
        estimate.end()


def test_the_answer_holds_for_the_current_block(clock: Clock) -> None:
    """Otherwise a job that chose to finish the block could stop halfway, and a stopping job could start another step."""
    estimate = taken(clock, solve=100.0)
    estimate.begin("solve")
    clock.now += 50.0
    assert not estimate.must_stop(90.0)
    clock.now += 1.0
    assert not estimate.must_stop(0.1)
    estimate.begin("solve")
    assert estimate.must_stop(1e9)
    clock.now += 95.0
    assert estimate.must_stop(1e9)


def test_a_block_that_took_no_time(clock: Clock) -> None:
    estimate = taken(clock, solve=0.0)
    estimate.begin("solve")
    assert estimate.must_stop(60.0)
    clock.now += 0.1
    estimate.begin("solve")
    clock.now += 0.1
    assert not estimate.must_stop(60.0)
