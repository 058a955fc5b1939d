"""One owner of a folder at a time: between processes, after kills, across machines, and where the file system has no locks."""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from bigq import faults
from bigq.errors import BigqError, BusyError, ResourceError, Stopped
from bigq.job import owner as owner_module
from bigq.job.owner import Holder, Owner, ownership, process_start, refuse_if_held, this_machine
from bigq.progress.progress import Progress

BEAT = 0.05


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(owner_module, "BEAT_SECONDS", BEAT)
    yield
    faults.disarm()


@pytest.fixture
def state(tmp_path: Path) -> Path:
    folder = tmp_path / "out" / ".bigq"
    folder.mkdir(parents=True)
    return folder


@contextlib.contextmanager
def owning(
    state: Path, *, steal: bool = False, said: list[str] | None = None, facts: Callable[[], Mapping[str, Any]] = dict
) -> Iterator[Owner]:
    owner = Owner(state, facts, steal=steal, say=([] if said is None else said).append)
    try:
        yield owner
    finally:
        owner.release("stopped")


def take(state: Path, *, steal: bool = False) -> list[str]:
    """Own the folder, release it, and return the owner's notes."""
    with owning(state, steal=steal) as owner:
        owner.check()
        return owner.notes


def known(state: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((state / "owner.json").read_text())
    return value


def write_owner(state: Path, **changes: Any) -> dict[str, Any]:
    """Write the owner.json of a process on another machine."""
    value = {
        "token": "theirs",
        "host": "node7",
        "machine": "node7 other-boot pid:[1]",
        "pid": 4242,
        "started": 100.0,
        "beat": 5,
        "at": "2001-02-03T04:05:06+00:00",
        "outcome": None,
        "facts": {},
        **changes,
    }
    temp = state / "theirs"
    temp.write_text(json.dumps(value))
    temp.replace(state / "owner.json")
    return value


@contextlib.contextmanager
def beating(state: Path, seconds: float = BEAT, **last: Any) -> Iterator[None]:
    """A process on another machine that keeps its heartbeat; ``last``: changes in its third heartbeat."""
    ended = threading.Event()

    def beat() -> None:
        number = 5
        while not ended.wait(seconds):
            number += 1
            write_owner(state, beat=number, **(last if number >= 8 else {}))
            if last and number >= 8:
                return

    write_owner(state)
    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class Process:
    """A forked process that owns the folder until it is asked to end or killed."""

    def __init__(self, state: Path) -> None:
        self._orders, orders = os.pipe()[::-1]
        answers, mine = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._orders)
            try:
                owner = Owner(state, dict, steal=False, say=lambda _: None)
                os.write(mine, b"own")
                os.read(orders, 1)
                owner.release("finished")
            except BigqError as error:
                os.write(mine, f"{error.exit_code} {error}".encode())
            finally:
                os._exit(0)
        os.close(orders)
        os.close(mine)
        assert select.select([answers], [], [], 20)[0]
        self.said = os.read(answers, 4096).decode()
        os.close(answers)
        self.gone = False

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.wait()

    def finish(self) -> None:
        os.write(self._orders, b"x")
        self.wait()

    def wait(self) -> None:
        os.waitpid(self.pid, 0)
        os.close(self._orders)
        self.gone = True


@pytest.fixture
def process(state: Path) -> Iterator[Callable[[], Process]]:
    begun: list[Process] = []

    def begin() -> Process:
        begun.append(Process(state))
        return begun[-1]

    yield begin
    for one in begun:
        if not one.gone:
            one.kill()


# One machine.


def test_a_new_folder_is_owned_at_once_and_says_so(state: Path) -> None:
    with owning(state, facts=lambda: {"blocks": 3}) as owner:
        assert owner.notes == []
        value = known(state)
        assert value["pid"] == os.getpid() and value["host"] == os.uname().nodename and value["machine"] == this_machine()
        assert value["started"] == process_start(os.getpid()) and value["outcome"] is None and value["facts"] == {"blocks": 3}
        holder = Holder.read(state)
        assert holder is not None and holder.same_machine and holder.alive
        assert str(holder) == f"process {os.getpid()} on {os.uname().nodename}, last heartbeat {value['at']}"
    holder = Holder.read(state)
    assert holder is not None and holder.outcome == "stopped" and holder.alive is False
    assert sorted(path.name for path in state.iterdir()) == ["lock", "owner.json"]


def test_a_second_process_is_refused_and_told_by_whom(state: Path, process: Callable[[], Process]) -> None:
    first = process()
    assert first.said == "own"
    with pytest.raises(BusyError) as caught:
        take(state)
    message = str(caught.value)
    assert message.startswith(f"{state.parent}: another bigq job is writing to this folder (process {first.pid} on {os.uname().nodename}, ")
    assert message.endswith("; wait for it or stop it") and "\n" not in message
    with pytest.raises(BusyError, match=f"process {first.pid} on"):
        refuse_if_held(state)
    second = process()
    assert second.said.startswith("5 ") and f"process {first.pid} on" in second.said
    assert known(state)["pid"] == first.pid, "who was refused leaves nothing"
    first.finish()
    refuse_if_held(state)
    assert take(state) == []


def test_within_one_process_too(state: Path) -> None:
    with owning(state) as owner:
        with pytest.raises(BusyError, match=f"process {os.getpid()} on"):
            take(state)
        owner.check()


def test_of_many_that_start_at_once_one_owns_the_folder(state: Path, process: Callable[[], Process]) -> None:
    said: list[str] = []
    threads = [threading.Thread(target=lambda: said.append(process().said)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(line[:4] for line in said) == ["5 /t"] * 5 + ["own"] or sorted(line[0] for line in said) == ["5"] * 5 + ["o"]


def test_the_command_exits_with_5(state: Path, child: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    with owning(state) as owner:
        model = tmp_path / "model"
        model.mkdir()
        done = child("-m", "bigq", "quantize", model, state.parent, "--device", "cpu")
        owner.check()
    assert done.returncode == 5, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"bigq: error: {state.parent}: another bigq job is writing to this folder (process {os.getpid()} on ")


def test_after_a_kill_the_next_takes_over_and_notes_it(state: Path, process: Callable[[], Process]) -> None:
    first = process()
    first.kill()
    assert known(state)["outcome"] is None
    refuse_if_held(state)
    (note,) = take(state)
    assert note.startswith(f"the previous run ended abruptly (process {first.pid} on ")
    assert take(state) == [], "it is reported once"


def test_a_zombie_process_is_dead(state: Path, process: Callable[[], Process]) -> None:
    """In a container whose first process does not reap orphans, zombies stay."""
    first = process()
    os.kill(first.pid, signal.SIGKILL)
    until = time.monotonic() + 10
    note = ""
    while not note:  # its files are closed shortly after it ends
        with contextlib.suppress(BusyError):
            (note,) = take(state)
        assert time.monotonic() < until, "it is taken to be alive"
    assert ") Z " in Path(f"/proc/{first.pid}/stat").read_text()
    assert "ended abruptly" in note
    first.wait()


def test_a_stopped_process_is_alive(state: Path, process: Callable[[], Process]) -> None:
    first = process()
    os.kill(first.pid, signal.SIGSTOP)
    time.sleep(4 * BEAT)
    with pytest.raises(BusyError, match=f"process {first.pid} on"):
        take(state)
    os.kill(first.pid, signal.SIGCONT)


def test_another_process_with_its_number_is_not_it(state: Path) -> None:
    """The pid of a live process, with another start time and with its own."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as other:
        started = process_start(other.pid)
        assert started is not None
        write_owner(state, machine=this_machine(), pid=other.pid, started=started - 1)
        assert "ended abruptly" in take(state)[0]
        write_owner(state, machine=this_machine(), pid=other.pid, started=started)
        with pytest.raises(BusyError, match=f"process {other.pid} on node7"):
            take(state)
        other.kill()


def test_a_job_of_this_process_without_an_outcome_is_over(state: Path) -> None:
    write_owner(state, machine=this_machine(), pid=os.getpid(), started=process_start(os.getpid()))
    assert "ended abruptly" in take(state)[0]


@pytest.mark.parametrize("pid", [0, -1, 2**31, 2**80, os.getppid()])
def test_numbers_of_no_such_process(pid: int, state: Path) -> None:
    write_owner(state, machine=this_machine(), pid=pid, started=1.5)
    assert len(take(state)) == 1


def test_process_starts() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as other:
        mine, its = process_start(os.getpid()), process_start(other.pid)
        assert mine is not None and its is not None and its > mine
        assert process_start(other.pid) == its
        other.kill()
        other.wait()
        assert process_start(other.pid) is None


@pytest.mark.parametrize("name", ["a) R 1 2 (b", ") Z 0 0", "((("])
def test_names_of_processes_may_hold_anything(name: str, tmp_path: Path) -> None:
    script = tmp_path / name
    script.symlink_to("/bin/sleep")
    with subprocess.Popen([script, "60"]) as other:
        until = time.monotonic() + 10
        while name[:15] not in Path(f"/proc/{other.pid}/stat").read_text() and time.monotonic() < until:
            time.sleep(0.01)
        started, mine = process_start(other.pid), process_start(os.getpid())
        other.kill()
    assert started is not None and mine is not None and mine <= started < mine + 1e7


def test_machines_whose_boot_has_no_name_are_not_taken_for_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    assert this_machine() == this_machine()
    monkeypatch.setattr(Path, "read_text", lambda self, *_, **__: (_ for _ in ()).throw(FileNotFoundError))
    here = this_machine()
    assert here == this_machine()
    monkeypatch.setattr(owner_module, "_NO_BOOT", "another process")
    assert this_machine() != here


# Other machines.


def test_a_holder_elsewhere_whose_heartbeat_goes_on_is_let_be(state: Path) -> None:
    said: list[str] = []
    with beating(state), pytest.raises(BusyError) as caught, owning(state, said=said):
        pass
    assert "another bigq job is writing to this folder (process 4242 on node7, last heartbeat 2001" in str(caught.value)
    assert str(caught.value).endswith("or use --steal-lock if you know that it is dead")
    assert len(said) == 1 and "is held by process 4242 on node7" in said[0] and "waiting 0 s" in said[0]
    assert known(state)["token"] == "theirs"


def test_a_slow_heartbeat_within_the_limit_counts(state: Path) -> None:
    with beating(state, seconds=2.5 * BEAT), pytest.raises(BusyError, match="node7"):
        take(state)


def test_a_holder_elsewhere_that_is_silent_is_outlived(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner_module, "BEAT_SECONDS", 0.1)
    write_owner(state)
    began = time.monotonic()
    with owning(state) as owner:
        assert 0.29 <= time.monotonic() - began < 5
        assert owner.notes == [
            "the folder was taken from process 4242 on node7, last heartbeat 2001-02-03T04:05:06+00:00, whose heartbeat had stopped"
        ]
        assert known(state)["pid"] == os.getpid()


@pytest.mark.parametrize("outcome", ["finished", "stopped", "failed"])
def test_a_holder_elsewhere_with_an_outcome_is_not_waited_for(outcome: str, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner_module, "BEAT_SECONDS", 100.0)
    write_owner(state, outcome=outcome)
    began, said = time.monotonic(), list[str]()
    with owning(state, said=said) as owner:
        assert owner.notes == [] and said == [] and time.monotonic() - began < 5


def test_a_holder_that_ends_while_it_is_watched(state: Path) -> None:
    with beating(state, seconds=BEAT / 5, outcome="finished"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner_module, "BEAT_SECONDS", 10.0)
        patch.setattr(time, "sleep", lambda _, sleep=time.sleep: sleep(BEAT))
        assert take(state) == []


def test_stealing_from_elsewhere_does_not_wait(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner_module, "BEAT_SECONDS", 100.0)
    write_owner(state)
    began = time.monotonic()
    (note,) = take(state, steal=True)
    assert "taken from process 4242 on node7" in note and "--steal-lock" in note and time.monotonic() - began < 5


def test_one_here_that_lives_cannot_be_stolen_from(state: Path, process: Callable[[], Process]) -> None:
    first = process()
    with pytest.raises(BusyError) as caught:
        take(state, steal=True)
    assert f"process {first.pid} on" in str(caught.value) and "--steal-lock" not in str(caught.value)
    assert known(state)["pid"] == first.pid and process().said.startswith("5 ")


@contextlib.contextmanager
def on_another_machine() -> Iterator[None]:
    """Owners made in this context belong to another machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner_module, "this_machine", lambda: "node7 other-boot pid:[1]")
        yield


def test_a_lock_that_outlived_its_holder_is_stolen_and_the_holder_notices(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If it was alive after all, it stops at its next commit and writes no owner.json any more."""
    monkeypatch.setattr(owner_module, "BEAT_SECONDS", 100.0)
    with on_another_machine():
        old = Owner(state, dict, steal=False, say=lambda _: None)
    with pytest.raises(BusyError, match=r"another bigq job .* or use --steal-lock if you know that it is dead$"):
        take(state)
    with owning(state, steal=True) as new:
        assert [note.split(" (")[0].split(" from ")[0] for note in new.notes] == ["the folder's lock was stolen", "the folder was taken"]
        for _ in range(2):
            with pytest.raises(BusyError, match=f"was taken over by another job .process {os.getpid()} on .*; this one stops"):
                old.check()
        old.release("finished")
        new.check()
        assert known(state)["outcome"] is None, "the old one must not say that the job is over"
        with pytest.raises(BusyError, match="another bigq job"):
            take(state)
    assert take(state) == []


def test_a_holder_notices_at_its_next_heartbeat_and_stops_beating(state: Path) -> None:
    with owning(state) as old:
        write_owner(state, beat=1)
        time.sleep(4 * BEAT)
        assert known(state)["token"] == "theirs" and known(state)["beat"] == 1
        # Even if the new owner has ended by now.
        (state / "owner.json").unlink()
        with pytest.raises(BusyError, match=r"taken over by another job .process 4242 on node7"):
            old.check()


def test_a_lock_without_a_holder_s_name_is_not_stolen(state: Path) -> None:
    """Its holder may be just starting."""
    with open(state / "lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for steal in (False, True):
            with pytest.raises(BusyError, match=r"another bigq job is writing to this folder; wait for it or stop it$"):
                take(state, steal=steal)


def test_a_lock_that_cannot_be_removed_is_reported(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a folder that other users write to."""

    def refused(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    with open(state / "lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        write_owner(state)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", refused)
            with pytest.raises(ResourceError, match="lock: cannot be removed: Operation not permitted"):
                take(state, steal=True)
        (state / "lock").unlink()
        take(state, steal=True)


def test_a_lock_that_keeps_being_replaced_is_reported(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or on a file system whose inode numbers change."""
    monkeypatch.setattr(os.path, "samestat", lambda *_: False)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    files = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ResourceError, match=r"lock: keeps being replaced"):
        take(state)
    assert len(os.listdir("/proc/self/fd")) == files
    monkeypatch.undo()
    assert take(state) == []


# The heartbeat.


def wait_for_beat(state: Path, beyond: int, seconds: float = 10.0) -> dict[str, Any]:
    until = time.monotonic() + seconds
    while known(state)["beat"] <= beyond:
        assert time.monotonic() < until, "the heartbeat stopped"
        time.sleep(BEAT / 5)
    return known(state)


def test_the_heartbeat_grows_and_reports_progress(state: Path) -> None:
    progress = Progress(9, torch.device("cpu"), quiet=True)
    with owning(state, facts=progress.facts), progress:
        assert known(state)["facts"] == {"blocks": 9}
        progress.phase("block 2 solve")
        value = wait_for_beat(state, known(state)["beat"] + 1)
        assert value["facts"] == {"blocks": 9, "phase": "block 2 solve"}
        wait_for_beat(state, value["beat"] + 2)
    ended = known(state)
    time.sleep(3 * BEAT)
    assert known(state) == ended, "after the end there is none"


def test_it_is_read_whole_at_any_time(state: Path) -> None:
    with owning(state, facts=lambda: {"phase": "x" * 5000}):
        until = time.monotonic() + 20 * BEAT
        while time.monotonic() < until:
            holder = Holder.read(state)
            assert holder is not None and holder.alive


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_a_disk_that_takes_no_heartbeat_does_not_end_the_job(number: int, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text, failures = Path.write_text, list[Path]()

    def failing(self: Path, text: str, *args: Any, **options: Any) -> int:
        if "owner.json" in self.name:
            write_text(self, text[:20])
            failures.append(self)
            raise OSError(number, os.strerror(number))
        return write_text(self, text, *args, **options)

    with owning(state) as owner:
        before = known(state)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_text", failing)
            until = time.monotonic() + 10
            while len(failures) < 3:
                assert time.monotonic() < until
                time.sleep(BEAT)
            owner.check()
        assert before["beat"] <= known(state)["beat"] and known(state)["token"] == before["token"]
        wait_for_beat(state, known(state)["beat"] + 1)
        owner.check()
        assert not list(state.glob("owner.json-*")) or wait_for_beat(state, known(state)["beat"])


def test_a_folder_that_vanishes_does_not_end_the_job(state: Path) -> None:
    """The next commit will report it."""
    with owning(state) as owner:
        away = state.with_name("away")
        state.rename(away)
        time.sleep(3 * BEAT)
        owner.check()
        away.rename(state)
        wait_for_beat(state, known(state)["beat"] + 1)


def test_no_error_ends_the_heartbeat(state: Path) -> None:
    calls = []

    def facts() -> dict[str, Any]:
        calls.append(1)
        if 2 <= len(calls) <= 4:
            raise RuntimeError("dictionary changed size during iteration")
        return {}

    with owning(state, facts=facts):
        wait_for_beat(state, 5)


def test_the_job_s_cleaning_up_does_not_disturb_it(state: Path) -> None:
    """Leftover temporary files are removed when a job starts, while its heartbeat runs already."""
    with owning(state) as owner:
        until = time.monotonic() + 10 * BEAT
        while time.monotonic() < until:
            for path in state.glob("*.bigq-tmp"):
                path.unlink(missing_ok=True)
        wait_for_beat(state, known(state)["beat"] + 1)
        owner.check()


def test_no_clock_that_people_set_is_asked(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clocks of both processes jump by years."""

    class Jumping(datetime.datetime):
        jumps = iter(range(10**9))

        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Jumping:
            return cls(1970 + 37 * next(cls.jumps) % 8000, 1, 1, tzinfo=tz)

    class Module:
        datetime, timezone = Jumping, datetime.timezone

    hours = iter(range(10**9))
    monkeypatch.setattr(owner_module, "datetime", Module)
    monkeypatch.setattr(time, "time", lambda: 1e9 * (-1) ** next(hours))
    with owning(state) as owner:
        with pytest.raises(BusyError, match="another bigq job"):
            take(state)
        wait_for_beat(state, known(state)["beat"] + 3)
        owner.check()
    assert take(state) == []
    for at in ("9999-12-31T23:59:59+00:00", "0001-01-01T00:00:00+00:00", "yesterday"):
        write_owner(state, at=at)
        began = time.monotonic()
        assert "heartbeat had stopped" in take(state)[0] and time.monotonic() - began >= 2.9 * BEAT


# File systems without locks, and folders that cannot be owned.


def failing_flock(patch: pytest.MonkeyPatch, number: int) -> None:
    def flock(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    patch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_the_heartbeat_keeps_others_out(number: int, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing_flock(monkeypatch, number)
    with owning(state) as owner:
        assert owner.notes == ["the file system has no locks; the heartbeat alone keeps others out"]
        with pytest.raises(BusyError, match=f"process {os.getpid()} on"):
            take(state)
        with pytest.raises(BusyError, match=f"process {os.getpid()} on"):
            take(state, steal=True)
        owner.check()
    assert len(take(state)) == 1
    with beating(state), pytest.raises(BusyError, match="node7"):
        take(state)
    assert "heartbeat had stopped" in take(state)[1]
    write_owner(state)
    assert "--steal-lock" in take(state, steal=True)[1]


def test_without_locks_of_two_that_start_at_once_the_later_owns_the_folder(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both find an empty folder; the first notices the other before it commits anything."""
    failing_flock(monkeypatch, errno.ENOLCK)
    outlive, owners = Owner._wait_for_holder, list[Owner]()

    def meanwhile(self: Owner, *args: Any) -> None:
        outlive(self, *args)
        if not owners:
            owners.append(self)
            owners.append(Owner(state, dict, steal=False, say=lambda _: None))

    monkeypatch.setattr(Owner, "_wait_for_holder", meanwhile)
    later = Owner(state, dict, steal=False, say=lambda _: None)
    first, second = owners[1], later
    second.check()
    with pytest.raises(BusyError, match="was taken over by another job"):
        first.check()
    first.release("failed")
    second.check()
    second.release("finished")
    assert known(state)["outcome"] == "finished"


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_lock_that_fails_is_an_error(number: int, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing_flock(monkeypatch, number)
    with pytest.raises(ResourceError, match=f"lock: cannot be locked: {os.strerror(number)}"):
        take(state)


def test_a_folder_that_cannot_be_written_to_is_reported(tmp_path: Path) -> None:
    progress = Progress(1, torch.device("cpu"), quiet=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ResourceError, match=f"^{tmp_path / 'file' / 'out'}: cannot be used as output folder: "):
        ownership(tmp_path / "file" / "out" / ".bigq", progress, steal=False).__enter__()
    state = tmp_path / "out" / ".bigq"
    (state / "lock").mkdir(parents=True)
    with pytest.raises(ResourceError, match=f"^{tmp_path / 'out'}: cannot be used as output folder: Is a directory"):
        ownership(state, progress, steal=False).__enter__()


@pytest.mark.parametrize("place", ["lock.taken", "owner.written"])
def test_an_owner_that_failed_to_begin_owns_nothing(place: str, state: Path) -> None:
    faults.arm(f"{place}:1:ENOSPC")
    threads = threading.active_count()
    with pytest.raises(ResourceError, match="cannot be used as output folder: No space left on device") as caught:
        take(state)
    assert threading.active_count() == threads
    if place == "owner.written":  # by this very process
        write_owner(state, outcome="failed")
    assert take(state) == [] and "No space" in str(caught.value)


GARBAGE = {
    "empty": b"",
    "zeros": b"\x00" * 512,
    "half": b'{"token": "x", "host": "no',
    "null": b"null",
    "list": b"[1, 2]",
    "text": b'"owner"',
    "deep": b"[" * 100_000,
    "not UTF-8": b"\xff\xfe\x00\xd8",
    "digits": b'{"pid": ' + b"9" * 10_000 + b"}",
}
WRONG: dict[str, dict[str, Any]] = {
    "pid text": {"pid": "me"},
    "pid None": {"pid": None},
    "pid list": {"pid": [1]},
    "pid infinite": {"pid": float("inf")},
    "started None": {"started": None},
    "started text": {"started": "then"},
    "started huge": {"started": 10**400},
    "beat text": {"beat": "x"},
    "facts number": {"facts": 5},
    "facts text": {"facts": "xyz"},
}


@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_is_no_holder(data: bytes, state: Path) -> None:
    (state / "owner.json").write_bytes(data)
    assert Holder.read(state) is None
    refuse_if_held(state)
    assert take(state) == [] and known(state)["pid"] == os.getpid()


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG.keys())
def test_values_of_the_wrong_type_are_no_holder(change: dict[str, Any], state: Path) -> None:
    write_owner(state, **change)
    assert Holder.read(state) is None and take(state) == []


@pytest.mark.parametrize("missing", ["token", "host", "machine", "pid", "started", "beat", "at", "outcome", "facts"])
def test_missing_values_are_no_holder(missing: str, state: Path) -> None:
    value = write_owner(state)
    del value[missing]
    (state / "owner.json").write_text(json.dumps(value))
    assert Holder.read(state) is None and take(state) == []


def test_unusual_valid_values_are_a_holder(state: Path) -> None:
    for change in ({"started": float("nan")}, {"pid": 4242.0}, {"host": "\ud800"}, {"facts": {"x": [None]}}, {"more": 1}):
        write_owner(state, **change)
        holder = Holder.read(state)
        assert holder is not None and holder.alive is None
        assert "heartbeat had stopped" in take(state)[0]


def test_an_absurdly_large_file_is_nobody(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigq.io.checksum.MAX_BYTES", 2**16)
    with open(state / "owner.json", "wb") as file:
        file.truncate(2**40)
    assert take(state) == []


def test_garbage_does_not_take_a_folder_from_its_owner(state: Path) -> None:
    with owning(state) as owner:
        (state / "owner.json").write_bytes(b"\x00")
        owner.check()
        with pytest.raises(BusyError, match="another bigq job is writing to this folder"):
            take(state)


# A whole job.


def begin(out: Path, **facts: Any) -> contextlib.AbstractContextManager[Owner]:
    progress = Progress(2, torch.device("cpu"), quiet=True)
    progress._facts = facts
    return ownership(out / ".bigq", progress, steal=False)


def test_the_outcome_of_a_job_is_recorded_in_its_folder(tmp_path: Path) -> None:
    state = tmp_path / "deep" / "out" / ".bigq"
    with begin(state.parent, block=2):
        assert known(state)["outcome"] is None
    assert (known(state)["outcome"], known(state)["facts"]) == ("finished", {"blocks": 2, "block": 2})
    errors: list[tuple[BaseException, str, str | None]] = [
        (ResourceError("disk full"), "failed", "disk full"),
        (Stopped("asked to"), "stopped", "asked to"),
        (KeyboardInterrupt(), "stopped", ""),
        (ZeroDivisionError("oops"), "failed", None),
        (SystemExit(3), "failed", None),
    ]
    for error, outcome, said in errors:
        with pytest.raises(type(error)), begin(state.parent, block=1):
            raise error
        assert (known(state)["outcome"], known(state)["facts"].get("said")) == (outcome, said)
        assert known(state)["facts"]["block"] == 1
        assert take(state) == [], "and lets others in"


def test_a_job_that_lost_its_folder_does_not_overwrite_the_new_owner(tmp_path: Path) -> None:
    state = tmp_path / "out" / ".bigq"
    with begin(state.parent) as owner:
        write_owner(state)
        with pytest.raises(BusyError, match="taken over"):
            owner.check()
    assert known(state)["token"] == "theirs" and known(state)["outcome"] is None


def test_release_never_raises(tmp_path: Path) -> None:
    """The job's own error must be the one raised."""
    state = tmp_path / "out" / ".bigq"
    with begin(state.parent):
        for path in state.iterdir():
            path.unlink(missing_ok=True)
        state.rename(tmp_path / "away")
    assert not state.exists()
