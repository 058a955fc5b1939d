"""The job: a list of blocks, each a transaction.

    load block i → find its Hessians and solve it, level by level → replay it quantized → commit its shard → evict

Weights of one block are in memory at a time. What lies outside the blocks is copied from shard to shard first, so that
a damaged embedding or a full disk is found before hours of work. config.json comes last: a folder that loads is complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigq import skeleton
from bigq.arch import block_linears
from bigq.clock import Clock
from bigq.config import JobConfig
from bigq.errors import ResourceError, UnsupportedModelError, UsageError
from bigq.io.atomic import write_bytes
from bigq.io.gptq_format import pack_linear
from bigq.io.hub import resolve_model
from bigq.io.index import TensorInfo
from bigq.io.outgoing import Outgoing
from bigq.io.writer import OutputTensor, write_shard
from bigq.report import LinearRecord, Progress, Report, device_memory_peak, host_memory_peak
from bigq.sched.activations import ActivationStore
from bigq.sched.batches import Batches, Halving, told
from bigq.sched.behind import WriteBehind
from bigq.sched.block import BlockJob, Memo, Solved, propagate, round_block, solve_block
from bigq.sched.cost import Choice
from bigq.sched.device import choose_device, memory_errors
from bigq.sched.finish import FinishedBlock, finish_folder
from bigq.sched.journal import STATE_FOLDER, Commit, Journal, remembered_batch, require_ours
from bigq.sched.memory import hold_heap, return_freed_memory
from bigq.sched.pager import Pager
from bigq.sched.planning import plan_job
from bigq.sched.prepare import check_shapes, refuse_nesting, rest_shards, row_length, rows_for
from bigq.sched.probe import Probe, activations_for, probe_model
from bigq.sched.structure import BlockPlan, plan_block
from bigq.sched.tiers import Tier
from bigq.scheme import QuantScheme, scheme_for
from bigq.skeleton import linear_weight
from bigq.trace import Trace


def quantize(model: str, out: str | Path, config: JobConfig | None = None) -> Report:
    """Quantize a model folder or hub id into the folder ``out``; goes on where an interrupted run of the same job ended.

    Raises UsageError, DataError or ResourceError (see ``bigq.errors``); then ``out`` holds no config.json.
    """
    config = config or JobConfig()
    started = time.monotonic()
    device = choose_device(config.device)
    folder, out = resolve_model(model), Path(out).expanduser()
    refuse_nesting(folder, out)
    if config.trace is not None and not Path(config.trace).parent.is_dir():
        raise UsageError(f"--trace {config.trace}: its folder does not exist; make it first")
    require_ours(out)
    hold_heap()
    skeleton.silence()
    with torch.no_grad(), memory_errors(device):
        pager = Pager(folder, device=device, dtype=config.dtype, trust_remote_code=config.trust_remote_code)
        if pager.packed:
            raise UnsupportedModelError(f"{folder}: is already quantized; give the original model")
        check_shapes(pager, config)
        config = dataclasses.replace(config, seqlen=row_length(pager.config, config), batch=config.batch or remembered_batch(out))
        rows = rows_for(pager, config)
        plan = plan_job(pager, rows, config, out)
        config = dataclasses.replace(config, batch=plan.choice.batch)
        rest = rest_shards(pager)
        units = [f"rest-{i}" for i in range(len(rest))] + [f"block-{i}" for i in range(len(pager.blocks))]
        with Progress(len(pager.blocks), device, config.quiet) as progress:
            progress.say(plan.brief())
            if plan.shortages:
                raise ResourceError(f"{out}: the job does not fit: {'; '.join(plan.shortages)}")
            with contextlib.closing(Journal(out, _request(pager, config, rows), units)) as journal:
                trace = Trace(keep=config.trace is not None)
                clock = Clock(device, trace)
                try:
                    with (
                        contextlib.closing(WriteBehind(beside=plan.choice.beside)) as behind,
                        pager.reading_ahead(plan.choice.ahead, trace),
                    ):
                        outgoing = Outgoing(device) if device.type == "cuda" else None
                        job = _Job(pager, config, plan.choice, journal, units, rest, progress, clock, behind, outgoing)
                        job.run(rows)
                finally:
                    if config.trace is not None:
                        with contextlib.suppress(RuntimeError):  # a device that failed has no more to tell
                            clock.settle()
                        write_bytes(Path(config.trace), trace.to_json())
                finish_folder(folder, journal, config)
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


def _request(pager: Pager, config: JobConfig, rows: Tensor | None) -> dict[str, Any]:
    """What decides the output's bytes."""
    return {
        "settings": config.frozen(),
        "source": pager.checkpoint.fingerprint,
        "config": hashlib.sha256((pager.folder / "config.json").read_bytes()).hexdigest(),
        "calibration_tokens": None if rows is None else hashlib.sha256(rows.numpy().tobytes()).hexdigest(),
    }


@dataclass(slots=True)
class _Job:
    """One run of a job: what its steps share."""

    pager: Pager
    config: JobConfig
    choice: Choice
    journal: Journal
    units: list[str]
    rest: list[list[TensorInfo]]
    progress: Progress
    clock: Clock
    behind: WriteBehind
    outgoing: Outgoing | None
    resumed: int = 0

    def run(self, rows: Tensor | None) -> None:
        """Commit every shard that is not committed yet."""
        self._check_committed()
        done = len(self.journal.commits)
        for i in range(done, len(self.rest)):
            self.progress.phase("copying what stays as it is")
            with self.clock.phase("copy"):
                self._commit(i, [OutputTensor.copy_of(info) for info in self.rest[i]], [])
        self.resumed = max(0, done - len(self.rest))
        if self.resumed == len(self.pager.blocks):
            return
        with self.clock.phase("probe"):
            probe = probe_model(self.pager)
        store = None
        if rows is not None:
            with self.clock.phase("embed"):
                tier = Tier(self.choice.tier, self.pager.device, self.journal.out / STATE_FOLDER, self.clock)
                batches = Batches(self.choice.batch, self.journal.halvings, self._halved)
                store = activations_for(self.pager, rows, batches, probe, tier)
        plans: dict[Any, BlockPlan] = {}
        with contextlib.nullcontext() if store is None else contextlib.closing(store):
            for i in range(len(self.pager.blocks)):
                if i >= self.resumed or store is not None:
                    self._block(i, probe, plans, store)
        with self.clock.phase("write"):
            self.behind.wait()

    def _block(self, i: int, probe: Probe, plans: dict[Any, BlockPlan], store: ActivationStore | None) -> None:
        started = time.monotonic()
        prefix = f"{self.pager.blocks_path}.{i}"
        self.clock.subject = prefix
        self.progress.phase(f"block {i + 1} load")
        with self.clock.phase("load"):
            block = self.pager.load_block(i)
        self.pager.announce_block(i + 1)
        shape = tuple((name, type(m).__name__, linear_weight(m).shape) for name, m in block_linears(block).items())
        if shape not in plans:
            with self.clock.phase("probe"):
                plans[shape] = plan_block(block, probe.hidden, probe.calls[i])
        plan = plans[shape] if self.choice.memo else dataclasses.replace(plans[shape], shortcuts=())
        job = BlockJob(
            index=i,
            prefix=prefix,
            block=block,
            plan=plan,
            schemes=self._schemes(prefix, plan),
            device=self.pager.device,
            clock=self.clock,
            memo=Memo(),
        )
        if i < self.resumed:
            self._restore(job)
        else:
            records = self._solve_and_commit(job, store)
        last = i == len(self.pager.blocks) - 1
        if store is not None and not last:
            self.progress.phase(f"block {i + 1} replay")
            with self.clock.phase("replay"):
                propagate(i, block, store, prefix, job.memo)
        job.memo.close()
        self.pager.evict_block(i)
        return_freed_memory()
        if i < self.resumed:
            self.progress.block_skipped()
        else:
            worst = max(records, key=lambda r: r.relative_error, default=None)
            named = None if worst is None else (worst.name.removeprefix(prefix + "."), worst.relative_error)
            self.progress.block_done(i, time.monotonic() - started, named)

    def _halved(self, before: int, halving: Halving) -> None:
        self.progress.say(told(before, halving))
        self.journal.halve(halving)

    def _schemes(self, prefix: str, plan: BlockPlan) -> dict[str, QuantScheme]:
        """The scheme of each Linear of a block that will be quantized, by its name in the block."""
        names = [name for group in plan.groups for name in group.names]
        found = {name: scheme_for(f"{prefix}.{name}", self.config.base_scheme, self.config.rules) for name in names}
        return {name: scheme for name, scheme in found.items() if scheme is not None}

    def _solve_and_commit(self, job: BlockJob, store: ActivationStore | None) -> list[LinearRecord]:
        self.progress.phase(f"block {job.index + 1} solve")
        packed: dict[str, dict[str, Tensor]] = {}
        records: list[LinearRecord] = []
        solving: Iterator[Solved] = round_block(job) if store is None else solve_block(job, store, self.config.true_sequential)
        for solved in solving:
            source = self.pager.sources[f"{solved.name}.weight"].name
            with self.clock.phase("pack"):
                packed[source] = pack_linear(source.removesuffix(".weight"), solved.weight, self.config.format_version)
            records.append(solved.record())
        tensors = []
        for name in self._sources(len(self.rest) + job.index):
            if name in packed:
                tensors += [OutputTensor.of(n, t, self.outgoing) for n, t in packed[name].items()]
            else:
                tensors.append(OutputTensor.copy_of(self.pager.checkpoint[name]))
        left_out = [f"{job.prefix}.{name}" for name in job.plan.left_out]
        batch = None if store is None else store.batch
        self.clock.settle()  # the records' seconds become numbers before another thread writes them
        self.progress.phase(f"block {job.index + 1} write")
        with self.clock.phase("write"):
            self.behind.start(lambda: self._commit(len(self.rest) + job.index, tensors, records, left_out, batch))
        return records

    def _restore(self, job: BlockJob) -> None:
        """Give a block that an earlier run committed the weights that it was committed with."""
        finished = FinishedBlock(self.journal.out, self.journal.commits[len(self.rest) + job.index])
        for name, scheme in job.schemes.items():
            source = self.pager.sources[f"{job.prefix}.{name}.weight"].name.removesuffix(".weight")
            module = job.block.get_submodule(name)
            weight = finished.weight(source, scheme.bits, self.config.format_version, linear_weight(module).dtype, self.pager.device)
            skeleton.set_linear_weight(module, weight)

    def _check_committed(self) -> None:
        """Raise UsageError where a committed shard was made from other weights than the source holds now."""
        for number, commit in enumerate(self.journal.commits):
            if commit.source != self.pager.checkpoint.sample(self._sources(number)):
                raise UsageError(
                    f"{self.journal.out}: its shard {commit.shard.file} was made from another source than {self.pager.folder} "
                    "(the weights differ); give the model that the job was begun with, or choose another folder"
                )

    def _sources(self, number: int) -> list[str]:
        """Names of the checkpoint's tensors that shard ``number`` is made from, in the checkpoint's order."""
        if number < len(self.rest):
            return [info.name for info in self.rest[number]]
        prefix = f"{self.pager.blocks_path}.{number - len(self.rest)}"
        own = {info.name for name, info in self.pager.sources.items() if name.startswith(prefix + ".")}
        return [name for name in self.pager.checkpoint if name in own]

    def _commit(
        self, number: int, tensors: list[OutputTensor], records: list[LinearRecord], left_out: Sequence[str] = (), batch: int | None = None
    ) -> None:
        """Write shard ``number`` and its line in the journal."""
        unit = self.units[number]
        with self.clock.trace.span("commit", unit):
            shard = write_shard(self.journal.out / f"model-{number + 1:05d}-of-{len(self.units):05d}.safetensors", tensors)
            source = self.pager.checkpoint.sample(self._sources(number))
            linears = tuple(r.to_json() for r in records)
            self.journal.commit(Commit(unit=unit, shard=shard, linears=linears, left_out=tuple(left_out), source=source, batch=batch))
