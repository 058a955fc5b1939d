"""One owner of an output folder at a time, also after crashes, in containers and on network file systems.

Two files record who owns a folder. ``lock`` is held with flock, which the system releases no matter how the process ends. It works on local
disks, on NFS from version 4 and on Lustre mounted with ``-o flock``. ``owner.json`` names the holder (host, process, start time) and is
rewritten every few seconds with a growing number, the heartbeat. It protects the folder where flock does not work, and shows users who
the holder is.

Wall clocks never decide whether a holder is alive. On the same machine its process is looked up. On another machine its heartbeat is
watched for a minute. A holder that was wrongly taken for dead (suspended, cut off from the disk) finds another owner in the file at its
next heartbeat or commit, and stops.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import psutil

from bigq import faults
from bigq.errors import BigqError, BusyError, CheckpointError, ResourceError, Stopped
from bigq.io.atomic import TEMP_SUFFIX, remedy, sync_folder
from bigq.io.checksum import read_record_bytes

if TYPE_CHECKING:
    from bigq.progress.progress import Progress

OWNER_NAME = "owner.json"
LOCK_NAME = "lock"

#: Seconds between heartbeats.
BEAT_SECONDS = 10.0
#: Heartbeats that a holder on another machine may miss before it is taken for dead.
MISSED_BEATS = 6
#: Attempts at a lock whose file other jobs keep replacing.
LOCK_ATTEMPTS = 20


#: Tokens of the folders that this process owns now. An owner.json of this process without an outcome is not alive unless listed here.
_owned_here: set[str] = set()


@dataclass(frozen=True, slots=True)
class Holder:
    """Who owns, or last owned, a folder. beat: the number of heartbeats. at: the wall time of the last one, for display only.

    outcome: how its job ended ("finished", "stopped", "failed"); None while it runs, or if it was killed.
    facts: its progress at the last heartbeat.
    """

    token: str
    host: str
    machine: str
    pid: int
    started: float
    beat: int
    at: str
    outcome: str | None
    facts: Mapping[str, Any]

    @classmethod
    def read(cls, state: Path) -> Holder | None:
        """The holder in owner.json; None where the file is missing or invalid."""
        try:
            value = json.loads(read_record_bytes(state / OWNER_NAME) or b"")
            return cls(
                token=str(value["token"]),
                host=str(value["host"]),
                machine=str(value["machine"]),
                pid=int(value["pid"]),
                started=float(value["started"]),
                beat=int(value["beat"]),
                at=str(value["at"]),
                outcome=None if value["outcome"] is None else str(value["outcome"]),
                facts=dict(value["facts"]),
            )
        except (ValueError, KeyError, TypeError, RecursionError, OverflowError, CheckpointError):
            return None

    @property
    def same_machine(self) -> bool:
        """Whether it ran on this machine, in the same boot and the same PID namespace."""
        return self.machine == this_machine()

    @property
    def alive(self) -> bool | None:
        """Whether its process runs; None where that is unknown because it is on another machine."""
        if self.outcome is not None:
            return False
        if not self.same_machine:
            return None
        if self.pid == os.getpid():
            return self.token in _owned_here
        return process_start(self.pid) == self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, last heartbeat {self.at}"


def process_start(pid: int) -> float | None:
    """When a process started, in clock ticks since boot; None where no such process runs."""
    try:
        # Split after the name, which is in parentheses and may hold anything. Next is the state; the start time is field 22 of all.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        # Z and X: ended, but not reaped yet, as in a container without an init.
        return None if fields[0] in "ZX" else float(fields[19])
    except FileNotFoundError:
        return None if Path("/proc/self/stat").exists() else _creation_time(pid)
    except (OSError, ValueError, IndexError):
        return None


def _creation_time(pid: int) -> float | None:
    try:
        return float(psutil.Process(pid).create_time())
    except (psutil.Error, ValueError, OverflowError):
        return None


#: Used where the system gives no boot id: unique to this process, so that no other boot is taken for this one.
_NO_BOOT = uuid.uuid4().hex


def this_machine() -> str:
    """An id that differs between machines, boots and PID namespaces (containers)."""
    parts = [socket.gethostname()]
    try:
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip() or _NO_BOOT)
    except OSError:
        parts.append(_NO_BOOT)
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


class Owner:
    """This process as the owner of a folder, with a heartbeat thread, until ``release``."""

    def __init__(self, state: Path, facts: Callable[[], Mapping[str, Any]], *, steal: bool, say: Callable[[str], None]) -> None:
        """Become the owner of the existing state folder ``state`` of a job.

        facts: returns the job's progress, called at each heartbeat. steal: take the folder from a holder on another machine without
        watching its heartbeat, also if its lock is still held. say: receives a message before a wait.
        Raises BusyError, naming the holder, where it may be alive; ResourceError where the folder cannot be written to.
        """
        self._state, self._facts = state, facts
        self._token = uuid.uuid4().hex
        self._beat = 0
        self._new_owner: str | None = None
        self._ended = threading.Event()
        self._guard = threading.Lock()
        #: Warnings about taking the folder, for the job's record.
        self.notes: list[str] = []
        self._lock = self._take_lock(steal)
        try:
            faults.point("lock.taken")
            self._wait_for_holder(Holder.read(state), steal, say)
            _owned_here.add(self._token)
            self._write(None)
            faults.point("owner.written")
        except BaseException as error:
            _owned_here.discard(self._token)
            self._lock.close()
            if isinstance(error, OSError):
                raise unusable_folder(state.parent, error) from error
            raise
        self._thread = threading.Thread(target=self._keep_beating, name="heartbeat", daemon=True)
        self._thread.start()

    def _take_lock(self, steal: bool) -> IO[str]:
        path = self._state / LOCK_NAME
        for _ in range(LOCK_ATTEMPTS):
            try:
                lock = open(path, "a")
            except OSError as error:
                raise unusable_folder(self._state.parent, error) from error
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
                holder = Holder.read(self._state)
                if not steal or holder is None or holder.alive is not None:
                    raise BusyError(_held_message(self._state, holder)) from None
                self.notes.append(f"the folder's lock was stolen from {holder}")
                try:
                    path.unlink(missing_ok=True)
                except OSError as error:
                    raise ResourceError(f"{path}: cannot be removed: {error.strerror}; remove it, or choose another folder") from error
                continue
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
                    lock.close()
                    raise ResourceError(f"{path}: cannot be locked: {error.strerror}") from error
                self.notes.append("the file system has no locks; the heartbeat alone keeps others out")
            # A job that steals the lock makes a new file, so a lock on the old file does not count.
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(lock.fileno()), os.stat(path)):
                    return lock
            lock.close()
            time.sleep(0.05)
        raise ResourceError(f"{path}: keeps being replaced, probably by another job; stop that job, or choose another folder")

    def _wait_for_holder(self, holder: Holder | None, steal: bool, say: Callable[[str], None]) -> None:
        """Raise BusyError where the previous holder may be alive: locks may not reach other machines."""
        if holder is None or holder.alive is False:
            if holder is not None and holder.outcome is None:
                self.notes.append(f"the previous run ended abruptly ({holder})")
            return
        if holder.alive:
            raise BusyError(_held_message(self._state, holder))
        if steal:
            self.notes.append(f"the folder was taken from {holder} because of --steal-lock")
            return
        patience = MISSED_BEATS * BEAT_SECONDS
        say(f"{self._state.parent}: is held by {holder}; waiting {patience:.0f} s to see whether it is still alive")
        until = time.monotonic() + patience
        while time.monotonic() < until:
            time.sleep(min(1.0, BEAT_SECONDS / 4))
            now = Holder.read(self._state)
            if now is not None and (now.token, now.beat) != (holder.token, holder.beat):
                if now.outcome is not None:
                    return
                raise BusyError(_held_message(self._state, now))
        self.notes.append(f"the folder was taken from {holder}, whose heartbeat had stopped")

    def _write(self, outcome: str | None, facts: Mapping[str, Any] | None = None) -> None:
        """Write owner.json. Not flushed to disk: after a power failure no holder is alive."""
        with self._guard:
            self._beat += 1
            value = {
                "token": self._token,
                "host": socket.gethostname(),
                "machine": this_machine(),
                "pid": os.getpid(),
                "started": process_start(os.getpid()),
                "beat": self._beat,
                "at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                "outcome": outcome,
                "facts": dict(self._facts() if facts is None else facts),
            }
            path = self._state / OWNER_NAME
            # The name is unique: without working locks two jobs may write at once.
            temp = path.with_name(f"{OWNER_NAME}-{self._token}{TEMP_SUFFIX}")
            try:
                temp.write_text(json.dumps(value, indent=2) + "\n")
                os.replace(temp, path)
            except OSError:
                with contextlib.suppress(OSError):
                    temp.unlink()
                raise

    def _keep_beating(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            # A full disk may have room at the next beat; if not, the job itself reports it. No error may end this thread:
            # without a heartbeat, another job could take the folder from this one.
            with contextlib.suppress(Exception):
                self._detect_takeover()
                if self._new_owner is None:
                    self._write(None)

    def _detect_takeover(self) -> None:
        holder = Holder.read(self._state)
        if holder is not None and holder.token != self._token:
            self._new_owner = str(holder)

    def check(self) -> None:
        """Raise BusyError where another job has taken over the folder."""
        if self._new_owner is None:
            self._detect_takeover()
        if self._new_owner is not None:
            raise BusyError(f"{self._state.parent}: was taken over by another job ({self._new_owner}); this one stops")

    def leave(self, outcome: str, facts: Mapping[str, Any]) -> None:
        """Record how the job ended while its lock is still held, for a process that exits at once."""
        self._ended.set()
        with contextlib.suppress(OSError, BigqError):
            self._detect_takeover()
            if self._new_owner is None:
                self._write(outcome, facts)

    def release(self, outcome: str, facts: Mapping[str, Any] | None = None) -> None:
        """Record how the job ended and release the lock. Never raises."""
        self._ended.set()
        self._thread.join()
        _owned_here.discard(self._token)
        with contextlib.suppress(OSError, BigqError):
            self._detect_takeover()
            if self._new_owner is None:
                try:
                    self._write(outcome, facts)
                except OSError:  # no room to write the outcome: a holder without one would keep others out
                    (self._state / OWNER_NAME).unlink()
        with contextlib.suppress(OSError):
            self._lock.close()


def refuse_if_held(state: Path) -> None:
    """Raise BusyError where the folder's holder is certainly alive. For an early check, before expensive preparation."""
    holder = Holder.read(state)
    if holder is not None and holder.alive:
        raise BusyError(_held_message(state, holder))


@contextlib.contextmanager
def ownership(state: Path, progress: Progress, *, steal: bool) -> Iterator[Owner]:
    """Own a job's state folder, which is created if needed, and record how the job ended. Raises like ``Owner``."""
    try:
        state.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unusable_folder(state.parent, error) from error
    for folder in (state.parent, state.parent.parent):
        with contextlib.suppress(OSError):  # a parent folder may not be readable
            sync_folder(folder)
    owner = Owner(state, progress.facts, steal=steal, say=progress.say)
    outcome, facts = "failed", {}
    try:
        yield owner
        outcome = "finished"
    except (Stopped, KeyboardInterrupt) as stopped:
        outcome, facts = "stopped", {"said": str(stopped)}
        raise
    except BigqError as error:
        facts = {"said": str(error)}
        raise
    finally:
        owner.release(outcome, {**progress.facts(), **facts})


def unusable_folder(out: Path, error: OSError) -> ResourceError:
    """The error for an output folder that cannot be written to."""
    return ResourceError(f"{out}: cannot be used as output folder: {error.strerror}; {remedy(error)}")


def _held_message(state: Path, holder: Holder | None) -> str:
    who = "" if holder is None else f" ({holder})"
    advice = "wait for it or stop it"
    if holder is not None and holder.alive is None:
        advice += ", or use --steal-lock if you know that it is dead"
    return f"{state.parent}: another bigq job is writing to this folder{who}; {advice}"
