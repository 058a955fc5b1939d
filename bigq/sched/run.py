"""``quantize``: what comes before the loop over blocks and after it, and who is told."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bigq.config import JobConfig
from bigq.conversion.gguf import check_gguf_job, write_gguf
from bigq.errors import ResourceError, UnsupportedModelError, UsageError
from bigq.io.atomic import write_bytes
from bigq.io.device_to_host import DeviceToHost
from bigq.io.file_stamps import Stamps
from bigq.io.folders import STATE_FOLDER, refuse_nesting
from bigq.io.hub import resolve_model
from bigq.job.batches import Batches
from bigq.job.finish import finish_folder, is_finished
from bigq.job.journal import Journal, read_job, require_ours
from bigq.job.manifest import GGUF_NAME, add_gguf, has_gguf
from bigq.job.owner import Owner, owned, refuse_if_held
from bigq.job.request import compare, make_request, require_same_code
from bigq.job.settle import check_shapes, row_length, settled_scheme
from bigq.job.stop import Stop
from bigq.machine.device import choose_device, memory_errors
from bigq.machine.memory import hold_heap
from bigq.model import skeleton
from bigq.model.pager import Pager
from bigq.progress.clock import Clock
from bigq.progress.display import Display
from bigq.progress.progress import Progress
from bigq.progress.records import Report, device_memory_peak, host_memory_peak
from bigq.progress.trace import Trace
from bigq.sched.head import head_of
from bigq.sched.pipeline import Job
from bigq.sched.plan.inputs import plan_job
from bigq.sched.prepare import rest_shards, rows_for
from bigq.sched.rows.checkpoint import Checkpoints
from bigq.sched.run_record import RunMeter, begun, run_recorded
from bigq.sched.write_behind import WriteBehind


def quantize(
    model: str,
    out: str | Path,
    config: JobConfig | None = None,
    stop: Stop | None = None,
    display: Display | None = None,
    *,
    command: Sequence[str] = (),
) -> Report:
    """Quantize a model folder or hub id into the folder ``out``; goes on where an interrupted run of the same job ended.

    config: None means as the job in ``out`` was begun, or the defaults where there is none. stop: asked between steps.
    command: the arguments that asked for it, for the record.
    display: how progress is shown; None means as suits stderr, or with config.quiet not at all.
    Raises UsageError, DataError, ResourceError or Stopped (see ``bigq.errors``); then ``out`` holds no config.json, unless all that
    is missing is a GGUF file.
    """
    started = time.monotonic()
    out = Path(os.path.expanduser(out))
    job_before = read_job(out)
    before = None if job_before is None else JobConfig.from_frozen(job_before.get("settings"), f"{out}: its job.json")
    config = config or before or JobConfig()
    stop = stop or Stop(config.grace)
    device = choose_device(config.device)
    folder = resolve_model(model)
    refuse_nesting(folder, out)
    if config.trace is not None and not Path(config.trace).parent.is_dir():
        raise UsageError(f"--trace {config.trace}: its folder does not exist; make it first")
    require_ours(out)
    refuse_if_held(out / STATE_FOLDER)
    if job_before is not None and config.trust_remote_code:
        require_same_code(out, job_before, folder)  # before any of it is run
    hold_heap()
    skeleton.silence()
    with torch.no_grad(), memory_errors(device):
        pager = Pager(folder, device=device, dtype=config.dtype, trust_remote_code=config.trust_remote_code)
        stamps = Stamps({folder / "config.json", *(info.file for info in pager.checkpoint.tensors.values())})
        if pager.packed:
            raise UnsupportedModelError(f"{folder}: is already quantized; give the original model")
        config = dataclasses.replace(
            config,
            seqlen=row_length(pager.config, config),
            scheme=settled_scheme(pager, config),
            batch=config.batch or (before.batch if before else None),
        )
        check_shapes(pager, config)
        head = head_of(pager, config)
        if config.format == "gguf":
            check_gguf_job(pager, config)
        stop.check()
        rows = rows_for(pager, config)
        stop.check()
        plan = plan_job(pager, rows, config, out)
        config = dataclasses.replace(config, batch=plan.choice.batch)
        rest = rest_shards(pager, head)
        units = [f"rest-{i}" for i in range(len(rest))] + [f"block-{i}" for i in range(len(pager.blocks))]
        units += [] if head is None else ["head-0"]
        request = make_request(config, folder, pager.checkpoint.fingerprint, rows, device)
        if job_before is not None:
            compare(out, job_before, request)  # a job that is refused leaves no trace in the folder of another
        with Progress(len(pager.blocks), device, config.quiet, display=display) as progress:
            progress.planned(plan.brief(), plan.to_json())
            if plan.shortages:
                raise ResourceError(f"{out}: the job does not fit: {'; '.join(plan.shortages)}")
            stop.check()
            with owned(out / STATE_FOLDER, progress, steal=config.steal_lock) as owner, contextlib.ExitStack() as recorded:
                journal = Journal(out, request, units, compare)
                notes = [*owner.notes, *journal.notes]
                for note in notes:
                    progress.say(f"warning: {note}")
                trace = Trace(keep=config.trace is not None)
                clock = Clock(device, trace)
                run = begun(pager, request, plan, journal, notes, model=model, command=command)
                recorded.enter_context(run_recorded(journal, owner, run, RunMeter(started, clock, device), progress.say))
                try:
                    with (
                        contextlib.closing(WriteBehind(beside=plan.choice.beside)) as behind,
                        pager.reading_ahead(plan.choice.ahead, trace),
                    ):
                        to_host = DeviceToHost(device) if device.type == "cuda" else None
                        every = config.checkpoint_every if plan.choice.checkpoints else None
                        checkpoints = Checkpoints(out / STATE_FOLDER, every, progress.say)
                        job = Job(
                            pager,
                            config,
                            plan.choice,
                            journal,
                            owner,
                            rest,
                            head,
                            progress,
                            clock,
                            behind,
                            to_host,
                            checkpoints,
                            stamps,
                            stop,
                        )
                        job.run(rows)
                finally:
                    if config.trace is not None:
                        with contextlib.suppress(RuntimeError):  # a device that failed has no more to tell
                            clock.settle()
                        write_bytes(Path(config.trace), trace.to_json())
                if not is_finished(journal):
                    owner.check()
                    finish_folder(folder, journal, config, pager.linears)
                if config.format == "gguf" and not has_gguf(out):
                    _write_gguf(out, config, owner, progress, stop)
                checkpoints.discard()
    return Report(
        out=str(out),
        blocks=len(pager.blocks),
        linears=tuple(record for commit in journal.commits for record in commit.linears),
        seconds=time.monotonic() - started,
        seconds_by_phase=clock.seconds,
        source_bytes=sum(t.nbytes for t in pager.checkpoint.tensors.values()),
        output_bytes=sum(commit.shard.size for commit in journal.commits),
        host_peak_bytes=host_memory_peak(),
        device_peak_bytes=device_memory_peak(device),
        planned_host_bytes=plan.cost.host,
        planned_device_bytes=plan.cost.device,
        resumed_blocks=job.resumed,
        left_out=tuple(name for commit in journal.commits for name in commit.left_out),
        waiting=clock.waiting(),
        batches=() if rows is None else Batches(plan.choice.batch, journal.halvings).used,
    )


def _write_gguf(out: Path, config: JobConfig, owner: Owner, progress: Progress, stop: Stop) -> None:
    """Make the GGUF file of a finished folder. A job that ends here does it when it is run again. Raises Stopped where asked to."""

    def written(done: int, blocks: int) -> None:
        owner.check()
        if stop.requested and done < blocks:
            raise stop.stopped(f"while {GGUF_NAME} was written")
        progress.phase(f"{GGUF_NAME}: {done} of {blocks} blocks")

    progress.phase(GGUF_NAME)
    write_gguf(out, out / GGUF_NAME, trust_remote_code=config.trust_remote_code, say=progress.say, written=written)
    owner.check()
    add_gguf(out)
