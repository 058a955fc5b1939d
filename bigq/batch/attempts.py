"""What ``bigq batch`` tried: one small record for each job of a file, in FILE.state beside it.

A job that fails before it owns OUT leaves no trace there, and nothing says which jobs are still starting. Tasks of an array write
different records. The records are for people: nothing depends on them, and a damaged one counts as missing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from bigq.batch.table import BatchJob
from bigq.errors import BigqError
from bigq.io.checksum import load_record, save_record
from bigq.job.owner import process_start, this_machine

#: Characters of a message that are kept.
MAX_MESSAGE = 4000


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One try of a job. at: when it began, and ended: when it ended, None while it runs, as UTC in ISO 8601.

    exit_code: None while it runs; of a process that a signal ended, 128 and the number of the signal. message: its error, or None.
    machine, pid, started: the process that runs it, as in owner.json.
    """

    out: str
    model: str
    at: str
    machine: str
    pid: int
    started: float | None
    ended: str | None = None
    exit_code: int | None = None
    message: str | None = None

    @classmethod
    def begin(cls, job: BatchJob, pid: int) -> Attempt:
        return cls(out=str(job.folder), model=job.model, at=_now(), machine=this_machine(), pid=pid, started=process_start(pid))

    def end(self, exit_code: int, message: str | None) -> Attempt:
        said = None if message is None else message[:MAX_MESSAGE]
        return dataclasses.replace(self, ended=_now(), exit_code=exit_code, message=said)

    @property
    def alive(self) -> bool | None:
        """Whether its process runs; None where that is unknown because it is on another machine."""
        if self.ended is not None:
            return False
        if self.machine != this_machine():
            return None
        return self.started is not None and process_start(self.pid) == self.started

    def save(self, file: Path) -> None:
        """Write the record. Raises ResourceError."""
        path = _path(file, self.out)
        with contextlib.suppress(OSError):  # writing reports why
            path.parent.mkdir(exist_ok=True)
        save_record(path, dataclasses.asdict(self))


def last_attempt(file: Path, job: BatchJob) -> Attempt | None:
    """The last try of a job of a file; None where there is none, or its record is damaged."""
    try:
        value = load_record(_path(file, str(job.folder)), "")
        found = None if value is None else Attempt(**value)
    except (BigqError, TypeError):
        return None
    if found is None:
        return None
    kinds: dict[str, tuple[type, ...]] = {
        "out": (str,),
        "model": (str,),
        "at": (str,),
        "machine": (str,),
        "pid": (int,),
        "started": (float, int, type(None)),
        "ended": (str, type(None)),
        "exit_code": (int, type(None)),
        "message": (str, type(None)),
    }
    return found if all(isinstance(getattr(found, name), kind) for name, kind in kinds.items()) else None


def _path(file: Path, out: str) -> Path:
    name = hashlib.sha256(os.fsencode(out)).hexdigest()[:16]
    return file.with_name(f"{file.name}.state") / f"{name}.json"


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
