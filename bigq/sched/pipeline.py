"""The job: a list of blocks, each a transaction.

    load block i → find its Hessians and solve it, level by level → replay it quantized → commit its shard → evict

Weights of one block are in memory at a time. What lies outside the blocks is copied from shard to shard first, so that
a damaged embedding or a full disk is found before hours of work. config.json comes last: a folder that loads is complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bigq import faults
from bigq.config import JobConfig
from bigq.errors import NumericsError, Stopped, UsageError
from bigq.io.device_to_host import DeviceToHost
from bigq.io.file_stamps import Stamps
from bigq.io.folders import STATE_FOLDER
from bigq.io.index import TensorInfo
from bigq.io.writer import OutputTensor, write_shard
from bigq.job.batches import Batches, Halving, told
from bigq.job.finish import FinishedBlock, reopen_folder
from bigq.job.journal import Commit, Journal, modification_time
from bigq.job.owner import Owner
from bigq.job.stop import Haste, Stop
from bigq.machine.memory import return_freed_memory
from bigq.model import skeleton
from bigq.model.blocks import block_linears
from bigq.model.pager import Pager
from bigq.model.skeleton import linear_weight
from bigq.model.structure import BlockPlan, plan_block
from bigq.progress.clock import Clock
from bigq.progress.progress import Progress
from bigq.progress.records import LinearRecord
from bigq.sched.block import BlockJob, Skipped, Solved, propagate, round_block, solve_block
from bigq.sched.head import Head, solve_head
from bigq.sched.plan.cost import Choice
from bigq.sched.rows.checkpoint import Checkpoints
from bigq.sched.rows.original import ORIGINAL_STEP, Original
from bigq.sched.rows.probe import Probe, embed, probe_model, store_for
from bigq.sched.rows.shortcut_cache import Memo
from bigq.sched.rows.store import ActivationStore
from bigq.sched.rows.tiers import Tier
from bigq.sched.write_behind import WriteBehind
from bigq.scheme import QuantScheme, scheme_for


@dataclass(frozen=True, slots=True, kw_only=True)
class _Unit:
    """What a shard will hold and the journal will say of it. number: among the journal's units. batch: rows at a time that it took."""

    number: int
    tensors: list[OutputTensor]
    records: Sequence[LinearRecord] = ()
    left_out: Sequence[str] = ()
    skipped: Mapping[str, str] = dataclasses.field(default_factory=dict)
    batch: int | None = None


@dataclass(slots=True)
class Job:
    """One run of a job: what its steps share.

    entering: the block whose inputs the store holds; None while they are being overwritten.
    """

    pager: Pager
    config: JobConfig
    choice: Choice
    journal: Journal
    owner: Owner
    rest: list[list[TensorInfo]]
    head: Head | None
    progress: Progress
    clock: Clock
    behind: WriteBehind
    to_host: DeviceToHost | None
    checkpoints: Checkpoints
    stamps: Stamps
    stop: Stop
    resumed: int = 0
    entering: int | None = None
    haste: Haste = dataclasses.field(default_factory=Haste)

    def run(self, rows: Tensor | None) -> None:
        """Commit every shard that is not committed yet."""
        self._check_committed()
        missing = self.journal.missing
        wanted = [number - len(self.rest) for number in missing if number >= len(self.rest)]
        self.resumed = len(self.pager.blocks) - sum(i < len(self.pager.blocks) for i in wanted)
        self.progress.start(self.resumed)
        if missing:
            reopen_folder(self.journal.out)
        for i in range(len(self.rest)):
            if i in missing:
                self.stop.check()
                self.progress.phase("copying what stays as it is")
                with self.clock.phase("copy"):
                    self._commit(_Unit(number=i, tensors=[OutputTensor.copy_of(info) for info in self.rest[i]]))
                self.progress.read(sum(info.nbytes for info in self.rest[i]))
        if not wanted:
            return
        with self.clock.phase("probe"):
            probe = probe_model(self.pager)
        plans: dict[Any, BlockPlan] = {}
        if rows is None:
            for i in wanted:
                if i < len(self.pager.blocks):
                    self._block(i, probe, plans, [], last=True)
                else:
                    self._head(None)
        else:
            self._stream(rows, probe, plans, wanted)
        with self.clock.phase("write"):
            self.behind.wait()

    def _stream(self, rows: Tensor, probe: Probe, plans: dict[Any, BlockPlan], wanted: list[int]) -> None:
        """Take the calibration rows through the blocks up to the last one that is wanted."""
        tier = Tier(self.choice.tier, self.pager.device, self.journal.out / STATE_FOLDER, self.clock)
        batches = Batches(self.choice.batch, self.journal.halvings, self._halved)
        with contextlib.ExitStack() as stack:
            stores = [stack.enter_context(contextlib.closing(store_for(self.pager, rows, batches, probe, tier)))]
            if self.config.method == "gptaq":
                stores.append(stack.enter_context(contextlib.closing(stores[0].twin())))
            self.progress.phase("calibration rows")
            with self.clock.phase("embed"):
                self.entering = self.checkpoints.restore(wanted[0], *stores)
                if self.entering is None:
                    embed(self.pager, rows, probe, stores[0])
                    for other in stores[1:]:
                        other.copy_of(stores[0])
                    self.entering = 0
                faults.point("rows.embedded")
            for store in stores:
                store.pause, store.passing = self._pause, self.progress.step
            try:
                for _ in range(self.entering):
                    self.progress.block_skipped()
                for i in range(self.entering, min(wanted[-1] + 1, len(self.pager.blocks))):
                    self._block(i, probe, plans, stores, last=i == wanted[-1])
                if wanted[-1] == len(self.pager.blocks):
                    self._head((stores[0], rows, probe))
            except Stopped:
                self._save_on_leaving(stores)
                raise

    def _block(self, i: int, probe: Probe, plans: dict[Any, BlockPlan], stores: Sequence[ActivationStore], *, last: bool) -> None:
        """stores: the rows as the quantized blocks before leave them, and for asymmetric calibration as the original ones do."""
        prefix = f"{self.pager.blocks_path}.{i}"
        self.clock.subject = prefix
        finished = self.journal.committed(len(self.rest) + i)
        self.haste.begin("solve" if finished is None else "replay")
        self._pause()
        self.progress.phase("load", i)
        started = time.monotonic()
        with self.clock.phase("load"):
            block = self.pager.load_block(i)
        loading = time.monotonic() - started
        self.progress.read(sum(info.nbytes for info in self.pager.block_tensors(i)))
        faults.point("block.loaded")
        if not last:
            self.pager.announce_block(i + 1)
        shape = tuple((name, type(m).__name__, linear_weight(m).shape) for name, m in block_linears(block).items())
        if shape not in plans:
            with self.clock.phase("probe"):
                plans[shape] = plan_block(block, probe.hidden, probe.calls[i])
        plan = plans[shape] if self.choice.memo else dataclasses.replace(plans[shape], shortcuts=())
        records: list[LinearRecord] = []
        with contextlib.ExitStack() as stack:
            memos = [stack.enter_context(contextlib.closing(Memo())) for _ in range(2)]
            job = BlockJob(
                index=i,
                prefix=prefix,
                block=block,
                plan=plan,
                schemes=self._schemes(prefix, plan),
                device=self.pager.device,
                clock=self.clock,
                memo=memos[0],
                original=Original(stores[1], memos[1], self.config.alpha) if len(stores) > 1 else None,
                on_nonfinite=self.config.on_nonfinite,
            )
            if finished is None:
                records = self._solve_and_commit(job, stores[0] if stores else None)
            if stores and not last:
                self.progress.phase("replay", i)
                self._pause()
                self.entering = None
                began = time.monotonic()
                lost = self._replay(job, stores[0], finished)
                self.entering = i + 1
                if lost:
                    self.progress.say(
                        f"block {i + 1}: the outputs of {lost} calibration tokens are not finite; they are left out from here on"
                    )
                faults.point("block.replayed")
                # Replayed without what was kept, attention runs again too.
                again = 2 if plan.shortcuts and finished is None else 1
                self.checkpoints.replayed(loading + again * (time.monotonic() - began))
        self.pager.evict_block(i)
        return_freed_memory()
        self.haste.end()
        if finished is not None:
            self.progress.block_skipped()
        else:
            worst = max(records, key=lambda r: r.relative_error, default=None)
            named = None if worst is None else (worst.name.removeprefix(prefix + "."), worst.relative_error)
            behind = range(len(self.rest) + i + 1, len(self.rest) + len(self.pager.blocks))
            left = sum(number in behind for number in self.journal.missing)
            self.progress.block_done(i, time.monotonic() - started, named, left)
        if stores and not last and self.checkpoints.due:
            self.progress.phase(f"saving activations at block {i + 2}")
            with self.clock.phase("checkpoint"):
                self.behind.wait()
                self._save(i + 1, stores)

    def _replay(self, job: BlockJob, store: ActivationStore, finished: Commit | None) -> int:
        """Take the rows through a block, the original ones first; returns how many tokens are lost (see ``propagate``).

        finished: of a block that was not solved in this run. It holds its original weights until the original rows are through.
        """
        lost = 0
        if job.original is not None:
            with self.clock.phase("replay"), job.original.weights_of(job.block):
                at = job.original.store, job.prefix, job.original.memo, job.on_nonfinite, (job.index, ORIGINAL_STEP)
                lost = propagate(job.index, job.block, *at)
        if finished is not None:
            self._restore(job, finished)
        with self.clock.phase("replay"):
            return propagate(job.index, job.block, store, job.prefix, job.memo, job.on_nonfinite) or lost

    def _pause(self) -> None:
        """Between steps: raise Stopped where asked to stop, unless the block can be finished within the grace."""
        if self.stop.requested and self.haste.must_leave(self.stop.left):
            at, blocks = self.entering, len(self.pager.blocks)
            where = "the output head" if at == blocks else f"block {'?' if at is None else at + 1} of {blocks}"
            raise self.stop.stopped(f"at {where}")

    def _save_on_leaving(self, stores: Sequence[ActivationStore]) -> None:
        """Keep what the job got to, as far as the grace allows."""
        self.behind.wait()
        if self.entering is not None and self.checkpoints.expected_seconds(*stores) < self.stop.left / 2:
            self._save(self.entering, stores)

    def _save(self, block: int, stores: Sequence[ActivationStore]) -> None:
        """Keep what enters a block on disk, where there is room."""
        self.checkpoints.save(block, *stores)
        if self.checkpoints.keeps(block):
            self.progress.event("checkpoint", block=block + 1, blocks=len(self.pager.blocks))

    def _halved(self, before: int, halving: Halving) -> None:
        self.progress.say(told(before, halving))
        self.journal.halve(halving)

    def _schemes(self, prefix: str, plan: BlockPlan) -> dict[str, QuantScheme]:
        """The scheme of each Linear of a block that will be quantized, by its name in the block."""
        names = [name for group in plan.groups for name in group.names]
        found = {name: scheme_for(f"{prefix}.{name}", self.config.base_scheme, self.config.rules) for name in names}
        return {name: scheme for name, scheme in found.items() if scheme is not None}

    def _solve_and_commit(self, job: BlockJob, store: ActivationStore | None) -> list[LinearRecord]:
        self.progress.phase("solve", job.index)
        packed: dict[str, dict[str, Tensor]] = {}
        records: list[LinearRecord] = []
        skipped: dict[str, str] = {}
        lost = 0
        solving: Iterator[Solved | Skipped] = round_block(job) if store is None else solve_block(job, store, self.config.true_sequential)
        for solved in solving:
            if isinstance(solved, Skipped):
                skipped[solved.name] = solved.reason
                self.progress.say(f"block {job.index + 1}: {solved.name} stays unquantized: {solved.reason}")
                continue
            lost = max(lost, solved.left_out)
            source = self.pager.sources[f"{solved.name}.weight"]
            with self.clock.phase("pack"):
                packed[source.name] = self.config.made.pack(source.name.removesuffix(".weight"), solved.weight, source.dtype)
            records.append(solved.record())
            self.progress.solved(len(records), len(job.schemes), _share(job, records))
            faults.point("linear.solved")
            self._pause()
        if lost:
            self.progress.say(f"block {job.index + 1}: up to {lost} calibration tokens are not finite and were left out of a Hessian")
        tensors = []
        for name in self._sources(len(self.rest) + job.index):
            if name in packed:
                tensors += [OutputTensor.of(n, t, self.to_host) for n, t in packed[name].items()]
            else:
                tensors.append(OutputTensor.copy_of(self.pager.checkpoint[name]))
        left_out = [f"{job.prefix}.{name}" for name in job.plan.left_out] + list(skipped)
        batch = None if store is None else store.batch
        number = len(self.rest) + job.index
        self._hand_over(_Unit(number=number, tensors=tensors, records=records, left_out=left_out, skipped=skipped, batch=batch))
        return records

    def _head(self, inputs: tuple[ActivationStore, Tensor, Probe] | None) -> None:
        """Quantize the output head and commit it. inputs: as ``solve_head`` takes them."""
        head = self.head
        assert head is not None
        self.haste.begin("head")
        self._pause()
        self.progress.phase("output head")
        self.clock.subject = head.name
        self.progress.read(head.source.nbytes)
        records: list[LinearRecord] = []
        skipped: dict[str, str] = {}
        try:
            solved = solve_head(head, self.pager, self.clock, inputs, finite_only=self.config.on_nonfinite == "skip")
        except NumericsError as error:
            if self.config.on_nonfinite != "skip":
                raise
            skipped[head.name] = str(error).removeprefix(f"{head.name}: ").partition(";")[0]
            self.progress.say(f"{head.name} stays unquantized: {skipped[head.name]}")
            tensors = [OutputTensor.copy_of(head.source)]
        else:
            with self.clock.phase("pack"):
                packed = self.config.made.pack(head.source.name.removesuffix(".weight"), solved.weight, head.source.dtype)
            records.append(solved.record())
            tensors = [OutputTensor.of(name, tensor, self.to_host) for name, tensor in packed.items()]
        batch = None if inputs is None else inputs[0].batch
        number = len(self.rest) + len(self.pager.blocks)
        self._hand_over(_Unit(number=number, tensors=tensors, records=records, left_out=list(skipped), skipped=skipped, batch=batch))

    def _hand_over(self, unit: _Unit) -> None:
        """Let what is solved be written and committed behind what comes next."""
        faults.point("block.solved")
        index = unit.number - len(self.rest)
        self.progress.phase("write", index if index < len(self.pager.blocks) else None)
        self.clock.settle()  # the records' seconds become numbers before another thread writes them
        with self.clock.phase("write"):
            self.behind.start(lambda: self._commit(unit))

    def _restore(self, job: BlockJob, commit: Commit) -> None:
        """Give a block that an earlier run committed the weights that it was committed with."""
        finished = FinishedBlock(self.journal.out, commit, self.config.made)
        for name, scheme in job.schemes.items():
            if f"{job.prefix}.{name}" in commit.left_out:
                continue
            source = self.pager.sources[f"{job.prefix}.{name}.weight"].name.removesuffix(".weight")
            module = job.block.get_submodule(name)
            weight = finished.weight(source, scheme, linear_weight(module).dtype, self.pager.device)
            skeleton.set_linear_weight(module, weight)

    def _check_committed(self) -> None:
        """Raise UsageError where a committed shard was made from other weights than the source holds now."""
        for number in range(len(self.journal.units)):
            commit = self.journal.committed(number)
            if commit is not None and commit.source != self.pager.checkpoint.sample(self._sources(number)):
                raise UsageError(
                    f"{self.journal.out}: its shard {commit.shard.file} was made from another source than {self.pager.folder} "
                    "(the weights differ); give the model that the job was begun with, or choose another folder"
                )

    def _sources(self, number: int) -> list[str]:
        """Names of the checkpoint's tensors that shard ``number`` is made from, in the checkpoint's order."""
        if number < len(self.rest):
            return [info.name for info in self.rest[number]]
        if number == len(self.rest) + len(self.pager.blocks):
            assert self.head is not None
            return [self.head.source.name]
        prefix = f"{self.pager.blocks_path}.{number - len(self.rest)}"
        own = {info.name for name, info in self.pager.sources.items() if name.startswith(prefix + ".")}
        return [name for name in self.pager.checkpoint if name in own]

    def _commit(self, unit: _Unit) -> None:
        """Write a shard and its line in the journal."""
        name = self.journal.units[unit.number]
        with self.clock.trace.span("commit", name):
            self.owner.check()
            path = self.journal.out / self.journal.shard_name(unit.number)
            shard = write_shard(path, unit.tensors)
            source = self.pager.checkpoint.sample(self._sources(unit.number))
            self.stamps.require_unchanged()
            self.owner.check()
            commit = Commit(
                unit=name,
                shard=shard,
                modified=modification_time(path),
                linears=tuple(r.to_json() for r in unit.records),
                left_out=tuple(unit.left_out),
                skipped=unit.skipped,
                source=source,
                batch=unit.batch,
            )
            if self.journal.differs(commit):
                self.progress.say(
                    f"warning: {name} was made again and is not what it was, as its device, batch or versions are others; "
                    "blocks behind it were solved on what it was before"
                )
            self.journal.commit(commit)


def _share(job: BlockJob, records: Sequence[LinearRecord]) -> float:
    """The part of a block's weights to be quantized that these Linears have."""
    whole = sum(linear_weight(job.block.get_submodule(name)).numel() for name in job.schemes)
    return sum(m * n for m, n in (record.shape for record in records)) / whole
