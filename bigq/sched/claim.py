"""Claims the output folder for one run: its owner, its journal, and the record of the run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigq.io.atomic import write_bytes
from bigq.io.folders import STATE_FOLDER
from bigq.job.journal import Journal
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
from bigq.sched.units.base import Unit


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A folder that this process owns. times: of the run's units."""

    owner: Owner
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
    Raises ResourceError if another process owns the folder, UsageError, CheckpointError.
    """
    out, config = job.target.out, job.config
    with ownership(out / STATE_FOLDER, progress, steal=config.steal_lock) as owner:
        away = None if job.target.push is None else job.target.push.away
        journal = Journal(out, request, [shard.name for unit in units for shard in unit.shards], compare, away)
        trace = Trace(keep=config.trace is not None)
        clock = Clock(job.target.device, trace)
        every = config.checkpoint_every if plan.choice.checkpoints else None
        checkpoints = Checkpoints(out / STATE_FOLDER, every, progress.say)
        earlier, begun, times = recorded_runs(out), reached(journal, checkpoints), UnitTimes(started)
        patience = Patience(journal=journal, checkpoints=checkpoints, stop=stop, times=times, begun=begun, earlier=earlier)
        notes = [*owner.notes, *journal.notes, *plan.warnings, *patience.notes()]
        for note in notes:
            progress.say(f"warning: {note}")
        run = run_entry(job.pager, request, plan, journal, notes, model=job.target.model, command=command) | {"reached": begun}
        recorder = RunRecorder(journal=journal, owner=owner, meter=RunMeter(started, clock, job.target.device), patience=patience)
        with recorder.recording(run, progress.say), patience.judging(recorder.leave), _traced(config.trace, clock, trace):
            yield Claim(owner=owner, journal=journal, checkpoints=checkpoints, clock=clock, times=times)


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
