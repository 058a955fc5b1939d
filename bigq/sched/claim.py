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
from bigq.job.batches import Halving
from bigq.job.journal import Commit, FollowedJournal, Journal
from bigq.job.owner import Owner, ownership
from bigq.job.request import compare
from bigq.job.stop import Stop
from bigq.progress.clock import Clock
from bigq.progress.progress import Progress
from bigq.progress.trace import Trace
from bigq.sched.plan.planner import Plan
from bigq.sched.resolve import Job
from bigq.sched.rows.checkpoint import Checkpoints
from bigq.sched.run_record import RunMeter, RunRecorder, run_entry
from bigq.sched.short_runs import Patience, UnitTimes, reached, recorded_runs
from bigq.sched.together import make_rank_folder, remove_other_counts
from bigq.sched.units.base import Unit


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A folder that this process owns, or one of the ranks that share a job; then the first of them is the owner.

    times: of the run's units.
    """

    owner: Owner | None
    journal: Journal
    checkpoints: Checkpoints
    clock: Clock
    times: UnitTimes


@contextlib.contextmanager
def claimed(
    job: Job,
    units: Sequence[Unit],
    request: Mapping[str, Any],
    plan: Plan,
    progress: Progress,
    stop: Stop,
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
        trace = Trace(keep=config.trace is not None)
        clock = Clock(job.target.device, trace)
        checkpoints = _checkpoints(job, plan, progress)
        earlier, begun, times = recorded_runs(out), reached(journal, checkpoints), UnitTimes(started)
        patience = Patience(journal=journal, checkpoints=checkpoints, stop=stop, times=times, begun=begun, earlier=earlier)
        notes = [*owner.notes, *journal.notes, *plan.warnings, *patience.notes()]
        for note in notes:
            progress.say(f"warning: {note}")
        run = run_entry(job.pager, request, plan, journal, notes, model=job.target.model, command=command) | {"reached": begun}
        recorder = RunRecorder(journal=journal, owner=owner, meter=RunMeter(started, clock, job.target.device), patience=patience)
        with recorder.recording(run, progress.say), patience.judging(recorder.leave), _traced(config.trace, clock, trace):
            remove_other_counts(out, job.ranks)
            job.ranks.everyone(([commit.to_line().decode() for commit in journal.commits], [each.to_json() for each in journal.halvings]))
            yield Claim(owner=owner, journal=journal, checkpoints=checkpoints, clock=clock, times=times)


def _followed(job: Job, names: list[str], plan: Plan, progress: Progress) -> Claim:
    """The claim of another rank than the first: it begins with what the first one has found in the folder."""
    first: Any = job.ranks.everyone(None)[0]
    commits = [commit for line in first[0] if (commit := Commit.from_line(line.encode())) is not None]
    journal = FollowedJournal(job.target.out, names, commits, [Halving(*each) for each in first[1]], _away(job))
    clock = Clock(job.target.device, Trace(keep=False))
    return Claim(owner=None, journal=journal, checkpoints=_checkpoints(job, plan, progress), clock=clock, times=UnitTimes())


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
