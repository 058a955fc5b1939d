"""Claims the output folder for one run: its owner, its journal, and the record of the run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigq.io.atomic import write_bytes
from bigq.io.folders import STATE_FOLDER
from bigq.job.away import Away
from bigq.job.journal import Commit, FollowedJournal, Journal
from bigq.job.owner import Owner, ownership
from bigq.job.request import compare
from bigq.progress.clock import Clock
from bigq.progress.progress import Progress
from bigq.progress.trace import Trace
from bigq.sched.plan.planner import Plan
from bigq.sched.resolve import Job
from bigq.sched.rows.checkpoint import Checkpoints
from bigq.sched.run_record import RunMeter, record_run, run_entry
from bigq.sched.together import make_rank_folder, remove_other_counts
from bigq.sched.units.base import Unit


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A folder that this process owns, or one of the ranks that share a job; then the first of them is the owner."""

    owner: Owner | None
    journal: Journal
    checkpoints: Checkpoints
    clock: Clock


@contextlib.contextmanager
def claimed(
    job: Job,
    units: Sequence[Unit],
    request: Mapping[str, Any],
    plan: Plan,
    progress: Progress,
    *,
    started: float,
    command: Sequence[str],
) -> Iterator[Claim]:
    """Own OUT, open its journal, and record the run when it begins and when it ends.

    started: the start of the run, by ``time.monotonic``. command: arguments to record for the run.
    The ranks of a job enter and leave together. Raises ResourceError if another process owns the folder, UsageError, CheckpointError.
    """
    names = [shard.name for unit in units for shard in unit.shards]
    if job.ranks.index > 0:
        yield _followed(job, names, plan, progress)
        return
    out, config = job.target.out, job.config
    with ownership(out / STATE_FOLDER, progress, steal=config.steal_lock) as owner:
        journal = Journal(out, request, names, compare, _away(job))
        notes = [*owner.notes, *journal.notes, *plan.warnings]
        for note in notes:
            progress.say(f"warning: {note}")
        trace = Trace(keep=config.trace is not None)
        clock = Clock(job.target.device, trace)
        run = run_entry(job.pager, request, plan, journal, notes, model=job.target.model, command=command)
        with record_run(journal, owner, run, RunMeter(started, clock, job.target.device), progress.say):
            remove_other_counts(out, job.ranks)
            job.ranks.everyone(([commit.to_line() for commit in journal.commits], journal.halvings))
            with _traced(config.trace, clock, trace):
                yield Claim(owner=owner, journal=journal, checkpoints=_checkpoints(job, plan, progress), clock=clock)


def _followed(job: Job, names: list[str], plan: Plan, progress: Progress) -> Claim:
    """The claim of another rank than the first: it begins with what the first one has found in the folder."""
    first: Any = job.ranks.everyone(None)[0]
    commits = [commit for line in first[0] if (commit := Commit.from_line(line)) is not None]
    journal = FollowedJournal(job.target.out, names, commits, first[1], _away(job))
    clock = Clock(job.target.device, Trace(keep=False))
    return Claim(owner=None, journal=journal, checkpoints=_checkpoints(job, plan, progress), clock=clock)


def _away(job: Job) -> Away | None:
    return None if job.target.push is None else job.target.push.away


def _checkpoints(job: Job, plan: Plan, progress: Progress) -> Checkpoints:
    folder = make_rank_folder(job.target.out, job.ranks)
    return Checkpoints(folder, job.config.checkpoint_every if plan.choice.checkpoints else None, progress.say)


@contextlib.contextmanager
def _traced(file: str | None, clock: Clock, trace: Trace) -> Iterator[None]:
    """Write the timeline at the end, even if the run failed."""
    try:
        yield
    finally:
        if file is not None:
            with contextlib.suppress(RuntimeError):  # after a device error, the remaining events cannot be read
                clock.synchronize()
            write_bytes(Path(file), trace.to_json())
