"""The state of all jobs of a file, from the records in their folders and those of ``bigq batch``. Nothing is changed. Imports no torch."""

from __future__ import annotations

import datetime
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigq.batch.attempts import Attempt, last_attempt
from bigq.batch.table import BatchJob, read_batch
from bigq.errors import BigqError, BusyError, Stopped
from bigq.inspect.status import Status, status
from bigq.job.owner import BEAT_SECONDS, MISSED_BEATS
from bigq.progress.sizes import show_duration
from bigq.progress.terminal import one_line

#: The states of a job in an overview, and what they mean.
STATES: Mapping[str, str] = {
    "done": "everything is written",
    "running": "a process is running it",
    "starting": "its process has begun, and does not write yet",
    "unknown": "it may be running on another machine; its heartbeat is old",
    "stopped": "it was stopped or killed; the same command resumes it",
    "failed": "it ended with an error",
    "waiting": "it has not begun",
}
_OF_STATUS = {"finished": "done", "running": "running", "stopped": "stopped", "killed": "stopped", "failed": "failed"}


@dataclass(frozen=True, slots=True, kw_only=True)
class JobState:
    """One job of a file. state: one of ``STATES``. message: the error of its last run, or what is wrong with its folder; None without.

    found: what its folder says; None where it holds no job yet.
    """

    job: BatchJob
    state: str
    message: str | None
    found: Status | None

    @property
    def fraction(self) -> float | None:
        """The fraction of the blocks that are done; None where their number is unknown."""
        if self.state == "done":
            return 1.0
        if self.found is None or not self.found.blocks:
            return None
        return min(1.0, self.found.blocks_done / self.found.blocks)

    @property
    def eta(self) -> float | None:
        """Estimated seconds left of a job that runs."""
        return self.found.eta_seconds if self.found is not None and self.state == "running" else None

    @property
    def progress_text(self) -> str:
        """Blocks and time left, for a person."""
        if self.found is None or self.found.blocks is None:
            return ""
        left = "" if self.eta is None else f", about {show_duration(self.eta)} left"
        return f"{self.found.blocks_done} of {self.found.blocks} blocks{left}"

    def to_json(self) -> dict[str, Any]:
        """As plain values. status: what ``bigq status OUT --json`` prints, or null."""
        return {
            "index": self.job.index,
            "model": self.job.model,
            "out": self.job.out,
            "state": self.state,
            "message": self.message,
            "status": None if self.found is None else self.found.to_json(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """All jobs of a file."""

    file: Path
    jobs: Sequence[JobState]

    @property
    def counts(self) -> dict[str, int]:
        """How many jobs are in each state that occurs."""
        counted = Counter(each.state for each in self.jobs)
        return {state: counted[state] for state in STATES if counted[state]}

    @property
    def may_run(self) -> bool:
        """Whether a process runs one of them, as far as is known."""
        return any(each.state in ("running", "starting", "unknown") for each in self.jobs)

    @property
    def counts_text(self) -> str:
        return ", ".join(f"{count} {state}" for state, count in self.counts.items())

    def to_json(self) -> dict[str, Any]:
        return {"file": str(self.file), "counts": self.counts, "jobs": [each.to_json() for each in self.jobs]}

    def text(self) -> str:
        """A line for each job, and one for its error."""
        lines = [f"{self.file}: {self.counts_text}"]
        width = max(len(each.progress_text) for each in self.jobs)
        for each in self.jobs:
            lines.append(f"  {each.job.index:3}  {each.state:8}  {each.progress_text.ljust(width)}  {one_line(each.job.out)}".rstrip())
            if each.message is not None and each.state != "done":
                lines.append(f"       {one_line(each.message)}")
        return "\n".join(lines)


def overview(file: Path) -> Overview:
    """The state of all jobs of a file. Raises UsageError for a file that holds no jobs."""
    return Overview(file=file, jobs=[_job_state(file, job) for job in read_batch(file)])


def _job_state(file: Path, job: BatchJob) -> JobState:
    attempt = last_attempt(file, job)
    try:
        found = _status(job)
    except BigqError as error:
        return JobState(job=job, state="failed", message=str(error), found=None)
    state = "waiting" if found is None else _OF_STATUS.get(found.state, _unknown(found))
    message = None if found is None or state == "done" else found.said
    if attempt is not None and state not in ("done", "running"):
        if attempt.alive is not False and (found is None or found.holder is None or _is_newer(attempt.at, found.holder.last_heartbeat)):
            state, message = ("starting" if attempt.alive else "unknown"), None
        elif _adds(attempt, found):
            state, message = ("stopped" if attempt.exit_code == Stopped.exit_code else "failed"), attempt.message
    return JobState(job=job, state=state, message=message, found=found)


def _status(job: BatchJob) -> Status | None:
    """What OUT says; None where it holds no job."""
    out = Path(os.path.expanduser(job.out))
    if not os.path.lexists(out):
        return None
    found = status(out)
    return None if found.state == "not begun" else found


def _unknown(found: Status) -> str:
    """The state of a job on another machine. Its heartbeat's age is measured by the clock of the file system that both see."""
    age = None if found.holder is None else found.holder.heartbeat_age
    return "running" if age is not None and age <= MISSED_BEATS * BEAT_SECONDS else "unknown"


def _adds(attempt: Attempt, found: Status | None) -> bool:
    """Whether the last try ended after everything that the folder tells of."""
    if attempt.ended is None or attempt.exit_code in (None, 0, BusyError.exit_code):
        return False
    return found is None or found.holder is None or _is_newer(attempt.ended, found.holder.last_heartbeat)


def _is_newer(one: str, other: str) -> bool:
    """Whether a time, as ISO 8601, is not before another one. False for what is no time."""
    try:
        return datetime.datetime.fromisoformat(one) >= datetime.datetime.fromisoformat(other)
    except (ValueError, TypeError):
        return False
