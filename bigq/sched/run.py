"""``quantize``, step by step: resolve → plan → claim the folder → run the units → finish."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bigq.config import JobConfig
from bigq.conversion.gguf import write_gguf
from bigq.errors import NumericsError, ResourceError
from bigq.io.device_to_host import DeviceToHost
from bigq.io.folders import STATE_FOLDER
from bigq.io.index import Checkpoint
from bigq.job.batches import Batches, Halving, halving_message
from bigq.job.command import kept_options
from bigq.job.finish import finish_folder, is_finished
from bigq.job.journal import Commit
from bigq.job.manifest import GGUF_NAME, add_gguf, has_gguf
from bigq.job.stop import Stop
from bigq.machine.device import memory_errors
from bigq.machine.memory import hold_heap, return_freed_memory, without_collection
from bigq.machine.ranks import OneProcess, Ranks
from bigq.methods.base import CalibratedMethod
from bigq.mixed.record import read_bits
from bigq.mixed.settings import lacks_bits
from bigq.model import skeleton
from bigq.progress.display import Display
from bigq.progress.progress import Progress
from bigq.progress.records import Report, Stages, device_memory_peak, host_memory_peak
from bigq.sched.claim import Claim, claimed
from bigq.sched.control import Control
from bigq.sched.finished import finished_commits
from bigq.sched.loop import run_units
from bigq.sched.mixing import with_bits
from bigq.sched.plan.budgets import Streamed
from bigq.sched.plan.inputs import plan_job
from bigq.sched.plan.planner import Plan
from bigq.sched.push import Pusher, abandoned_on_error, pushing
from bigq.sched.resolve import Job, Target, request_of, resolve_job, resolve_target, units_of
from bigq.sched.rows.calibration import CalibrationRows
from bigq.sched.rows.probe import probe_model
from bigq.sched.rows.shortcut_cache import LastInputs
from bigq.sched.rows.tiers import Tier
from bigq.sched.shards import ShardWriter
from bigq.sched.solving import Solving, WithRows, solving_of
from bigq.sched.together import agreed_plan, rank_folder, refuse_halving, remove_rank_folder, require_same_request
from bigq.sched.units.base import Bench, Unit
from bigq.sched.write_behind import WriteBehind


def quantize(
    model: str,
    out: str | Path,
    config: JobConfig | None = None,
    stop: Stop | None = None,
    display: Display | None = None,
    *,
    command: Sequence[str] = (),
    started: float | None = None,
    ranks: Ranks | None = None,
) -> Report:
    """Quantize a model folder or hub id into the folder ``out``, or resume the job that ``out`` holds.

    config: defaults to that of the job in ``out``, or to ``JobConfig()`` if there is none. stop: checked between steps.
    display: how progress is shown; by default as suits stderr, or not at all with config.quiet.
    command: arguments to record for this run. started: when the program began, by ``time.monotonic``; defaults to now.
    ranks: the processes that share the job; by default it has one.
    Raises UsageError, DataError, ResourceError or Stopped (see ``bigq.errors``); then ``out`` holds no config.json, unless only its
    GGUF file is missing, or only the last files that are uploaded to a hub repository.
    """
    started = time.monotonic() if started is None else started
    stages = Stages(started)
    ranks = ranks or OneProcess()
    target = resolve_target(model, out, config, ranks)
    commits = finished_commits(target)
    if all(ranks.everyone(commits is not None)) and commits is not None:
        return _finished_report(target, commits, display, started)
    stop = stop or Stop(target.config.grace)
    hold_heap()
    with torch.no_grad(), memory_errors(target.device):
        with without_collection():
            skeleton.silence_transformers()
            job = resolve_job(target, stop, stages, ranks)
            plan = plan_job(job.pager, job.rows, job.adapted, target.out, job.made, ranks)
        plan = agreed_plan(plan, ranks)
        job = job.with_choice(plan.choice)
        units, request = units_of(job), request_of(job)
        require_same_request(request, ranks)
        return_freed_memory()
        stages.ended("planning")
        with Progress(len(job.pager.blocks), target.device, job.config.quiet, display=display) as progress:
            _announce(plan, target.out, progress, stop)
            with claimed(job, units, request, plan, progress, stop, started=started, command=command) as claim:
                control = Control(stop=stop, progress=progress, clock=claim.clock, times=claim.times, ranks=ranks)
                if lacks_bits(job.config):
                    job, plan = _with_bits(job, units, plan, claim, control)
                    units = units_of(job)
                    progress.planned(plan.brief(), plan.to_json())
                with _pushing(job, claim, control) as pusher:
                    with _in_another_folder(target.out):
                        resumed = _run(job, units, plan, claim, control, pusher)
                    _finish(job, claim, control, pusher)
    return _report(job, plan, claim, resumed, started, stages)


def _pushing(job: Job, claim: Claim, control: Control) -> contextlib.AbstractContextManager[Pusher | None]:
    """Uploads beside the job, if it asks for them; the first of several ranks does this."""
    owner = claim.owner
    if owner is None:
        return contextlib.nullcontext()
    return pushing(job.target.push, job.target.out, claim.journal.commits, control, owner.check)


def _finished_report(target: Target, commits: Sequence[Commit], display: Display | None, started: float) -> Report:
    """The report of a job that an earlier run finished."""
    blocks = sum(commit.unit.startswith("block-") for commit in commits)
    with Progress(blocks, target.device, target.config.quiet, display=display) as progress:
        progress.start(blocks)
        progress.say(f"{target.out}: is finished already; there is nothing to do (bigq verify checks every byte)")
    return Report(
        out=str(target.out),
        blocks=blocks,
        linears=tuple(record for commit in commits for record in commit.linears),
        seconds=time.monotonic() - started,
        seconds_by_phase={},
        source_bytes=Checkpoint.open(target.folder, target.remote).stored_bytes,
        output_bytes=sum(commit.shard.size for commit in commits),
        host_peak_bytes=host_memory_peak(),
        device_peak_bytes=device_memory_peak(target.device),
        planned_host_bytes=0,
        planned_device_bytes=0,
        resumed_blocks=blocks,
        left_out=tuple(name for commit in commits for name in commit.left_out),
        bits=_bits_text(target, [record for commit in commits for record in commit.linears]),
    )


def _bits_text(target: Target, records: Sequence[Mapping[str, Any]]) -> str:
    """What ``bits_per_weight`` has led to; empty without it."""
    chosen = None if target.config.bits_per_weight is None else read_bits(target.out)
    return "" if chosen is None else chosen.text(Counter(record["bits"] for record in records))


def _announce(plan: Plan, out: Path, progress: Progress, stop: Stop) -> None:
    """Show the plan. Raises ResourceError if the job does not fit, before anything is written."""
    progress.planned(plan.brief(), plan.to_json())
    if plan.shortages:
        raise ResourceError(f"{out}: the job does not fit: {'; '.join(plan.shortages)}")
    stop.check()


def _run(job: Job, units: Sequence[Unit], plan: Plan, claim: Claim, control: Control, pusher: Pusher | None) -> int:
    """Commit all units. Returns how many blocks earlier runs had committed."""
    with abandoned_on_error(pusher), _writing(job, units, plan, claim, control, pusher) as writer:
        setup = _Setup(job=job, plan=plan, claim=claim, writer=writer)
        return run_units(units, writer, setup.bench, setup.solving)


def _with_bits(job: Job, units: Sequence[Unit], plan: Plan, claim: Claim, control: Control) -> tuple[Job, Plan]:
    """The job with the bits that are chosen for it now, and its plan, in which the survey that chose them still counts."""
    with _writing(job, units, plan, claim, control, None) as writer:
        tier = Tier(plan.choice.tier, job.target.device, job.target.out / STATE_FOLDER, claim.clock)
        job = with_bits(job, plan.shape, _Setup(job=job, plan=plan, claim=claim, writer=writer).bench(), tier)
    return_freed_memory()
    chosen = plan_job(job.pager, job.rows, job.adapted, job.target.out, job.made)
    surveyed = tuple(phase for phase in plan.cost.phases if phase.name == "survey")
    return job, dataclasses.replace(chosen, cost=dataclasses.replace(chosen.cost, phases=surveyed + chosen.cost.phases))


@contextlib.contextmanager
def _writing(job: Job, units: Sequence[Unit], plan: Plan, claim: Claim, control: Control, pusher: Pusher | None) -> Iterator[ShardWriter]:
    """What reads the source and writes shards, while the context is open."""
    device = job.target.device
    with (
        _streaming(job, plan, control),
        contextlib.closing(WriteBehind(threaded=plan.choice.beside)) as behind,
        job.pager.prefetch(plan.choice.ahead, claim.clock.trace),
    ):
        writer = ShardWriter(
            checkpoint=job.pager.checkpoint,
            remote=job.pager.remote,
            journal=claim.journal,
            owner=claim.owner,
            stamps=job.stamps,
            behind=behind,
            exporter=DeviceToHost(device) if device.type == "cuda" else None,
            control=control,
            ranks=job.ranks,
            pusher=pusher,
        )
        writer.require_same_sources([shard for unit in units for shard in unit.shards], str(job.pager.folder))
        yield writer


@contextlib.contextmanager
def _streaming(job: Job, plan: Plan, control: Control) -> Iterator[None]:
    """Read shards that are on a server through a cache while the context is open."""
    if job.pager.remote is None:
        yield
        return
    assert isinstance(plan.fetch, Streamed)
    with job.pager.remote.cached(job.target.out / STATE_FOLDER, plan.fetch.cache, control.progress.say):
        yield


@dataclass(frozen=True, slots=True, kw_only=True)
class _Setup:
    """Prepares the work on streamed units, if any are missing."""

    job: Job
    plan: Plan
    claim: Claim
    writer: ShardWriter

    def bench(self) -> Bench:
        """Probes the model."""
        job = self.job
        return Bench(
            pager=job.pager,
            config=job.config,
            choice=self.plan.choice,
            writer=self.writer,
            control=self.writer.control,
            probe=probe_model(job.pager),
        )

    @contextlib.contextmanager
    def solving(self, bench: Bench) -> Iterator[Solving]:
        """Opens the calibration rows, if the method looks at any."""
        with solving_of(self.job.method, lambda method: self._with_rows(method, bench)) as solving:
            yield solving

    @contextlib.contextmanager
    def _with_rows(self, method: CalibratedMethod, bench: Bench) -> Iterator[WithRows]:
        job, claim, choice = self.job, self.claim, self.plan.choice
        own = job.own_rows
        assert own is not None, "a calibrated method has rows"
        tier = Tier(choice.tier, job.target.device, rank_folder(job.target.out, job.ranks), claim.clock)
        batches = Batches(choice.batch, claim.journal.halvings, self._halved)
        last = LastInputs(choice.kept_rows, dataclasses.replace(tier, kind=choice.kept_tier))
        with (
            contextlib.closing(last),
            CalibrationRows.opened(
                own, job.pager, bench.probe, batches, tier, claim.checkpoints, job.ranks, both_models=method.passes > 1
            ) as rows,
        ):
            yield WithRows(
                method=method,
                true_sequential=job.config.true_sequential,
                rows=rows,
                pager=job.pager,
                control=bench.control,
                ranks=self.writer.ranks,
                last=last,
                wait=self.writer.wait,
                tune_steps=job.config.tune_steps,
            )

    def _halved(self, before: int, halving: Halving) -> None:
        if self.job.ranks.count > 1:
            refuse_halving(before, halving, self.job.ranks.index)
        self.writer.control.progress.say(halving_message(before, halving))
        self.claim.journal.record_halving(halving)


@contextlib.contextmanager
def _in_another_folder(out: Path) -> Iterator[None]:
    """Errors that advise options which this job may not change any more say so."""
    try:
        yield
    except (NumericsError, ResourceError) as error:
        options = kept_options(str(error))
        if not options:
            raise
        raise type(error)(f"{error} (in another folder, since the job in {out} keeps its {' and '.join(options)})") from error


def _finish(job: Job, claim: Claim, control: Control, pusher: Pusher | None) -> None:
    """Make the folder loadable, and write its GGUF file if the job asks for one; then make the hub repository loadable too.

    The first of several ranks does so once all of them are done.
    """
    job.ranks.everyone(None)
    claim.checkpoints.discard()
    remove_rank_folder(job.target.out, job.ranks)
    if claim.owner is None:
        return
    if pusher is not None:
        pusher.drain()
    if not is_finished(claim.journal):
        claim.owner.check()
        finish_folder(job.target.folder, claim.journal, job.config, job.pager.plain_modules(job.pager.extras.dropped))
    if job.config.format == "gguf" and not has_gguf(job.target.out):
        _write_gguf(job, claim, control)
    if pusher is not None:
        pusher.finish(claim.journal.commits)


def _write_gguf(job: Job, claim: Claim, control: Control) -> None:
    """Write the GGUF file of a finished folder. A job that stops here writes it when it resumes. Raises Stopped."""
    out, progress, stop = job.target.out, control.progress, control.stop

    owner = claim.owner
    assert owner is not None, "who writes owns the folder"

    def written(done: int, blocks: int) -> None:
        owner.check()
        if stop.requested and done < blocks:
            raise stop.error(f"while {GGUF_NAME} was written")
        progress.phase(f"{GGUF_NAME}: {done} of {blocks} blocks")

    progress.phase(GGUF_NAME)
    write_gguf(out, out / GGUF_NAME, trust_remote_code=job.config.trust_remote_code, say=progress.say, written=written)
    owner.check()
    add_gguf(out)


def _report(job: Job, plan: Plan, claim: Claim, resumed: int, started: float, stages: Stages) -> Report:
    commits = claim.journal.commits
    return Report(
        out=str(job.target.out),
        blocks=len(job.pager.blocks),
        linears=tuple(record for commit in commits for record in commit.linears),
        seconds=time.monotonic() - started,
        seconds_by_phase=claim.clock.seconds,
        source_bytes=job.pager.checkpoint.stored_bytes,
        output_bytes=sum(commit.shard.size for commit in commits),
        host_peak_bytes=host_memory_peak(),
        device_peak_bytes=device_memory_peak(job.target.device),
        planned_host_bytes=plan.cost.host,
        planned_device_bytes=plan.cost.device,
        resumed_blocks=resumed,
        left_out=tuple(name for commit in commits for name in commit.left_out),
        waiting=claim.clock.wait_seconds(),
        batches=() if job.rows is None else Batches(plan.choice.batch, claim.journal.halvings).sizes,
        seconds_before=stages.seconds,
        read_by=plan.read_by,
        reader_notes=plan.notes,
        bits=_bits_text(job.target, [record for commit in commits for record in commit.linears]),
    )
