"""Named places at which a test can make a job fail: killed, out of disk, slow. Nothing happens unless ``arm`` was called.

The command line arms what the environment variable ``BIGQ_FAULT`` says, and is the only one to read it:

    NAME[:COUNT[:ACTION]] [, …]      the COUNT-th time (1) that NAME is passed, do ACTION (kill)

ACTION is ``kill`` (SIGKILL to this process), ``sleep=SECONDS``, ``OOM`` (the device's memory ends), or the name of an error number such
as ``ENOSPC``, which is raised as the operating system would.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import threading
import time
from dataclasses import dataclass

from bigq.errors import UsageError

#: Every place there is, in the order in which a job first passes them.
POINTS = (
    "lock.taken",
    "owner.written",
    "job.written",
    "run.recorded",
    "file.opened",
    "file.written",
    "file.synced",
    "file.renamed",
    "shard.piece",
    "journal.opened",
    "journal.half",
    "journal.written",
    "journal.synced",
    "rows.embedded",
    "block.loaded",
    "batch.begun",
    "linear.solved",
    "block.solved",
    "block.replayed",
    "checkpoint.begun",
    "checkpoint.written",
    "checkpoint.recorded",
    "batch.halved",
    "finish.begun",
    "finish.side",
    "finish.index",
    "finish.manifest",
    "gguf.piece",
    "finish.config",
)


@dataclass(slots=True)
class _Fault:
    count: int
    action: str


_armed: dict[str, list[_Fault]] = {}
_guard = threading.Lock()


def arm(spec: str) -> None:
    """Let things fail as ``spec`` says. Raises UsageError where it says nothing that can be done."""
    faults = [_parsed(spec, part.strip()) for part in spec.split(",")]
    for name, fault in faults:
        _armed.setdefault(name, []).append(fault)


def _parsed(spec: str, part: str) -> tuple[str, _Fault]:
    name, _, rest = part.partition(":")
    count, _, action = rest.partition(":")
    count, action = count or "1", action or "kill"
    known = action in ("kill", "OOM", *errno.errorcode.values()) or re.fullmatch(r"sleep=[0-9]{1,6}(\.[0-9]+)?", action)
    if name not in POINTS or not re.fullmatch("[1-9][0-9]{0,8}", count) or not known:
        raise UsageError(f"BIGQ_FAULT={spec}: {part!r} is no fault that can be made; points are {', '.join(POINTS)}")
    return name, _Fault(int(count), action)


def disarm() -> None:
    """Let nothing fail any more."""
    _armed.clear()


def point(name: str) -> None:
    """A place that is passed. Raises OSError, or RuntimeError for memory that ended, where that was armed for it."""
    if _armed:
        _pass(name)


def _pass(name: str) -> None:
    with _guard:
        due = []
        for fault in _armed.get(name, ()):
            fault.count -= 1
            if fault.count == 0:
                due.append(fault.action)
    for action in due:
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
        elif action.startswith("sleep="):
            time.sleep(float(action.removeprefix("sleep=")))
        elif action == "OOM":
            raise RuntimeError("CUDA error: out of memory")
        else:
            number = getattr(errno, action)
            raise OSError(number, os.strerror(number))
