"""Fault injection for tests: named points at which a job can be killed, delayed or made to fail. Inactive unless ``arm`` was called.

Only the command line reads the environment variable ``BIGQ_FAULT`` and passes it to ``arm``:

    NAME[:COUNT[:ACTION]] [, …]      run ACTION when the point NAME is passed for the COUNT-th time

COUNT defaults to 1, ACTION to ``kill``. ACTION is one of

    kill             SIGKILL to this process
    sleep=SECONDS    wait
    OOM              raise the RuntimeError of a failed CUDA allocation
    ENOSPC, EIO, …   raise OSError with this errno
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

#: All points, in the order in which a job first passes them.
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
    "survey.block",
    "bits.written",
    "rows.embedded",
    "block.loaded",
    "batch.begun",
    "linear.solved",
    "expert.solved",
    "block.solved",
    "block.replayed",
    "checkpoint.begun",
    "checkpoint.written",
    "checkpoint.recorded",
    "batch.halved",
    "push.uploaded",
    "push.recorded",
    "push.dropped",
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
    """Activate the faults of ``spec`` (syntax: see the module). Raises UsageError if it is malformed."""
    faults = [_parse(spec, part.strip()) for part in spec.split(",")]
    for name, fault in faults:
        _armed.setdefault(name, []).append(fault)


def _parse(spec: str, part: str) -> tuple[str, _Fault]:
    name, _, rest = part.partition(":")
    count, _, action = rest.partition(":")
    count, action = count or "1", action or "kill"
    known = action in ("kill", "OOM", *errno.errorcode.values()) or re.fullmatch(r"sleep=[0-9]{1,6}(\.[0-9]+)?", action)
    if name not in POINTS or not re.fullmatch("[1-9][0-9]{0,8}", count) or not known:
        raise UsageError(f"BIGQ_FAULT={spec}: {part!r} is not NAME[:COUNT[:ACTION]] with a valid action and a NAME of {', '.join(POINTS)}")
    return name, _Fault(int(count), action)


def disarm() -> None:
    """Remove all faults."""
    _armed.clear()


def point(name: str) -> None:
    """Mark a point that the job passes. Raises OSError or, for OOM, RuntimeError if such a fault is armed and due."""
    if _armed:
        _trigger(name)


def _trigger(name: str) -> None:
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
