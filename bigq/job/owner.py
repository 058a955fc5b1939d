"""One owner of an output folder at a time, also after crashes, in containers and on network file systems.

Two things say who owns a folder. ``lock`` is held with flock, which the system lets go however a process ends; it works on local disks,
on NFS from version 4 and on Lustre mounted with it. ``owner.json`` names the holder (host, process, start) and is rewritten every few
seconds with a growing number, the heartbeat; it serves where flock does not reach, and to tell a person who the holder is.

Whether a holder is alive is never told from clocks: on the same machine its process is looked for, and of another machine the
heartbeat is watched for a while. A holder that was taken for dead and is not (suspended, cut off from the disk) notices at its next
heartbeat or commit that the folder has another owner, and stops.
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
from bigq.errors import BigqError, CheckpointError, ResourceError, Stopped, UsageError
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
#: How often a lock is tried that others replace meanwhile.
LOCK_ATTEMPTS = 20


#: Tokens of the folders that this process owns: one that could not write down how its job ended does not own it for ever.
_owned_here: set[str] = set()


@dataclass(frozen=True, slots=True)
class Holder:
    """Who owns, or last owned, a folder. beat: how many heartbeats there were. at: the last one's time, for people.

    outcome: how it ended ("finished", "stopped", "failed"); None for one that runs, or that ended without a word.
    facts: what it last told of its progress.
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
        """None where nobody ever owned the folder, or where what is written about it cannot be read."""
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
        """Whether it ran where this process runs: same machine since its start, same view of processes."""
        return self.machine == this_machine()

    @property
    def alive(self) -> bool | None:
        """Whether its process runs; None for one of another machine."""
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
    """When a process began, by a clock that nobody sets: ticks since the machine was booted. None where no such process runs."""
    try:
        # What follows the name, which may hold anything, in parentheses: the state, and the 22nd field of all.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        # One that ended and that nobody has waited for, as in a container without an init.
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


#: In the place of a boot's name where the system tells none: what cannot be told apart is not taken for the same.
_NO_BOOT = uuid.uuid4().hex


def this_machine() -> str:
    """Tells machines, their boots and their containers apart."""
    parts = [socket.gethostname()]
    try:
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip() or _NO_BOOT)
    except OSError:
        parts.append(_NO_BOOT)
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


class Owner:
    """This process as the owner of a folder, heartbeat and all, until ``release``."""

    def __init__(self, state: Path, facts: Callable[[], Mapping[str, Any]], *, steal: bool, say: Callable[[str], None]) -> None:
        """Become the owner of a job's folder ``state``, which exists.

        facts: asked at each heartbeat for what to tell of the job's progress. steal: take the folder from a holder of another machine
        without watching its heartbeat, and from a lock that outlived its holder. say: told when there is something to wait for.
        Raises UsageError, naming the holder, where there is one that may be alive; ResourceError where nothing can be written.
        """
        self._state, self._facts = state, facts
        self._token = uuid.uuid4().hex
        self._beat = 0
        self._new_owner: str | None = None
        self._ended = threading.Event()
        self._guard = threading.Lock()
        #: What was unusual about becoming the owner, for the job's record.
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
                    raise UsageError(_held_message(self._state, holder)) from None
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
            # Whoever steals makes a new file: a lock on the old one is worth nothing.
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(lock.fileno()), os.stat(path)):
                    return lock
            lock.close()
            time.sleep(0.05)
        raise ResourceError(f"{path}: is replaced again and again; is another job taking the folder? Try again, or choose another folder")

    def _wait_for_holder(self, holder: Holder | None, steal: bool, say: Callable[[str], None]) -> None:
        """Raise UsageError where the holder before may be alive after all: with locks that reach no further than one machine."""
        if holder is None or holder.alive is False:
            if holder is not None and holder.outcome is None:
                self.notes.append(f"the job before ended without a word ({holder})")
            return
        if holder.alive:
            raise UsageError(_held_message(self._state, holder))
        if steal:
            self.notes.append(f"the folder was taken from {holder}, as --steal-lock said")
            return
        patience = MISSED_BEATS * BEAT_SECONDS
        say(f"{self._state.parent}: was held by {holder}; waiting {patience:.0f} s to see whether that one is still alive")
        until = time.monotonic() + patience
        while time.monotonic() < until:
            time.sleep(min(1.0, BEAT_SECONDS / 4))
            now = Holder.read(self._state)
            if now is not None and (now.token, now.beat) != (holder.token, holder.beat):
                if now.outcome is not None:
                    return
                raise UsageError(_held_message(self._state, now))
        self.notes.append(f"the folder was taken from {holder}, whose heartbeat had stopped")

    def _write(self, outcome: str | None, facts: Mapping[str, Any] | None = None) -> None:
        """The heartbeat. Not flushed to disk: after a power failure nobody is alive anyway."""
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
            # A name of its own: where locks reach nobody, two may be writing.
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
            # A disk that is full now may have room at the next beat; the job itself will say so if not. Whatever else may
            # happen: a heartbeat that ended would let others take the folder from a job that runs.
            with contextlib.suppress(Exception):
                self._detect_takeover()
                if self._new_owner is None:
                    self._write(None)

    def _detect_takeover(self) -> None:
        holder = Holder.read(self._state)
        if holder is not None and holder.token != self._token:
            self._new_owner = str(holder)

    def check(self) -> None:
        """Raise UsageError where another job has taken the folder over."""
        if self._new_owner is None:
            self._detect_takeover()
        if self._new_owner is not None:
            raise UsageError(f"{self._state.parent}: was taken over by another job ({self._new_owner}); this one stops")

    def release(self, outcome: str, facts: Mapping[str, Any] | None = None) -> None:
        """Say how it ended, and let others in. Never raises."""
        self._ended.set()
        self._thread.join()
        _owned_here.discard(self._token)
        with contextlib.suppress(OSError, BigqError):
            self._detect_takeover()
            if self._new_owner is None:
                try:
                    self._write(outcome, facts)
                except OSError:  # without room for a word, there is none: a name that is left would keep others out
                    (self._state / OWNER_NAME).unlink()
        with contextlib.suppress(OSError):
            self._lock.close()


def refuse_if_held(state: Path) -> None:
    """Raise UsageError where the folder's holder is alive for certain; before much work is put into a job that cannot begin."""
    holder = Holder.read(state)
    if holder is not None and holder.alive:
        raise UsageError(_held_message(state, holder))


@contextlib.contextmanager
def ownership(state: Path, progress: Progress, *, steal: bool) -> Iterator[Owner]:
    """Own a job's folder, made if need be. How the job ended is left in it. Raises as ``Owner``."""
    try:
        state.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unusable_folder(state.parent, error) from error
    for folder in (state.parent, state.parent.parent):
        with contextlib.suppress(OSError):  # of a folder above there may be no leave to read
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
    """What to tell of an output folder that nothing can be written to."""
    return ResourceError(f"{out}: cannot be used as output folder: {error.strerror}; {remedy(error)}")


def _held_message(state: Path, holder: Holder | None) -> str:
    who = "" if holder is None else f" ({holder})"
    advice = "wait for it or stop it"
    if holder is not None and holder.alive is None:
        advice += ", or use --steal-lock if you know that it is dead"
    return f"{state.parent}: another bigq job is writing to this folder{who}; {advice}"
