"""A decoder block as a unit of work: load, solve, hand over, replay, evict."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from bigq import faults
from bigq.config import JobConfig
from bigq.io.formats import Format
from bigq.io.writer import OutputTensor
from bigq.job.finish import FinishedBlock
from bigq.job.journal import Commit
from bigq.machine.memory import return_freed_memory
from bigq.methods import method_of
from bigq.model import skeleton
from bigq.model.pager import Pager
from bigq.model.skeleton import linear_weight
from bigq.model.structure import BlockPlan
from bigq.progress.records import LinearRecord, dead_inputs_warning
from bigq.sched.shards import Product, Shard
from bigq.sched.solve.bank import BankJob
from bigq.sched.solve.block import BlockJob
from bigq.sched.solve.expert_scales import few_tokens_warning
from bigq.sched.solve.fold import FoldWork
from bigq.sched.solve.results import Skipped, SolvedExpert
from bigq.sched.solving import BlockVisit, Solving
from bigq.sched.units.base import Bench, StreamedUnit
from bigq.sched.units.experts import BankWork, expert_groups, uncommitted
from bigq.scheme import QuantScheme, scheme_for


class BlockUnit(StreamedUnit):
    """Decoder block ``index``. number: of its shard."""

    def __init__(self, number: int, index: int, pager: Pager, config: JobConfig) -> None:
        self.block = self.index = index
        self.prefix = f"{pager.blocks_path}.{index}"
        own = pager.stored_under(self.prefix)
        self.shard = Shard(number=number, name=f"block-{index}", sources=[name for name in pager.checkpoint if name in own])
        self.groups = expert_groups(pager, index, number + 1, config)

    @property
    def shards(self) -> Sequence[Shard]:
        return [self.shard, *(group.shard for group in self.groups)]

    def visit(self, bench: Bench, solving: Solving, *, last: bool) -> None:
        control, pager, blocks = bench.control, bench.pager, len(bench.pager.blocks)
        progress = control.progress
        control.clock.subject = self.prefix
        commit = bench.writer.committed(self.shard)
        whole = commit is not None and not any(uncommitted(self.groups, bench))
        control.begin("replay" if whole else "solve", f"block {self.index + 1} of {blocks}")
        progress.phase("load", self.index)
        started = time.monotonic()
        with control.clock.phase("load"):
            block = pager.load_block(self.index)
        loading = time.monotonic() - started
        progress.read(sum(info.nbytes for info in pager.block_tensors(self.index)))
        faults.point("block.loaded")
        # Experts are prefetched themselves: the next block would take their place.
        if not last and not self.groups:
            pager.announce_block(self.index + 1)
        plan = bench.structure(block, self.index)
        experts = BankWork(bench, self.index, self.groups, solving.batch, method_of(bench.config).scaling)
        schemes = self._schemes(bench.config, plan)
        restored = {} if commit is None else self._unless_left_out(schemes, commit)
        banks = experts.jobs(self.prefix, block, bench.banks(block, self.index, plan))
        folds = self._folds(bench, block, schemes, banks)
        if folds is not None:
            experts.factors = folds.factors
        job = BlockJob(
            index=self.index,
            prefix=self.prefix,
            block=block,
            plan=plan.with_shortcuts(last=not last and bench.choice.kept_rows > 0, others=bench.choice.memo),
            schemes=schemes if commit is None else {},
            device=pager.device,
            clock=control.clock,
            on_nonfinite=bench.config.on_nonfinite,
            banks=banks,
            largest_inputs=bool(bench.config.made.input_suffix),
        )
        records: list[LinearRecord] = []
        with solving.block(job) as visit:
            restore = None if commit is None else functools.partial(self._restore, bench, block, restored, commit, folds)
            # Rows of the unquantized model pass through it as it was then: with scales folded into it.
            if folds is not None and (commit is None or method_of(bench.config).passes > 1):
                visit.fold(folds)
            if not whole:
                if restore is not None:
                    visit.keep_originals(restored)
                    restore()
                changed = folds.changed if folds is not None else ()
                product = self._solve(bench, job, visit, solving, experts, changed)
                records += product.records
                if commit is None:
                    bench.writer.hand_over(self.shard, product, self.index)
            if not last:
                if self.groups:
                    pager.announce_block(self.index + 1)
                visit.advance(restore if whole else None, loading)
        pager.evict_block(self.index)
        return_freed_memory()
        control.end()
        self._show_done(bench, whole, records, time.monotonic() - started)
        if not last:
            solving.between()

    def _schemes(self, config: JobConfig, plan: BlockPlan) -> dict[str, QuantScheme]:
        """The scheme of each Linear of the block that will be quantized, by its name in the block."""
        names = [name for group in plan.groups for name in group.names]
        found = {name: scheme_for(f"{self.prefix}.{name}", config.base_scheme, config.rules) for name in names}
        return {name: scheme for name, scheme in found.items() if scheme is not None}

    def _solve(
        self, bench: Bench, job: BlockJob, visit: BlockVisit, solving: Solving, experts: BankWork, changed: Iterable[str]
    ) -> Product:
        """Quantize the block's Linears and experts, and pack each as soon as it is solved. Groups of experts are handed over.

        changed: names in the block of parameters that scales were folded into.
        """
        control = bench.control
        control.progress.phase("solve", self.index)
        writes = bench.writer.ranks.writes(self.shard.number)
        packed: dict[str, dict[str, Tensor]] = {}
        records: list[LinearRecord] = []
        skipped: dict[str, str] = {}
        lost = 0
        of_experts: list[LinearRecord] = []
        experts.copy_unquantized()
        for solved in visit.solve():
            if isinstance(solved, Skipped):
                skipped[solved.name] = solved.reason
                control.progress.say(f"block {self.index + 1}: {solved.name} stays unquantized: {solved.reason}")
                continue
            lost = max(lost, solved.left_out)
            if isinstance(solved, SolvedExpert):
                of_experts += experts.take(solved)
                control.progress.solved(len(records), len(job.schemes), _share(job, [*records, *of_experts]))
                faults.point("expert.solved")
                control.pause()
                continue
            source = bench.pager.source_of(f"{solved.name}.weight")
            made, prefix = bench.config.made, source.name.removesuffix(".weight")
            with control.clock.phase("pack"):
                if writes:
                    packed[source.name] = made.pack(prefix, solved.weight, source.dtype) | made.pack_inputs(prefix, solved.largest_input)
            records.append(solved.record())
            control.progress.solved(len(records), len(job.schemes), _share(job, records))
            faults.point("linear.solved")
            control.pause()
        if lost:
            control.progress.say(f"block {self.index + 1}: up to {lost} calibration tokens are not finite and were left out of a Hessian")
        if (warning := dead_inputs_warning(records)) is not None:
            control.progress.warn_once("dead inputs", warning)
        if experts.unscaled:
            control.progress.warn_once("few tokens", few_tokens_warning(experts.unscaled))
        tensors = self._tensors(bench, packed, changed) if writes else []
        left_out = [f"{self.prefix}.{name}" for name in job.plan.left_out] + list(skipped)
        return Product(tensors=tensors, records=records, left_out=left_out, skipped=skipped, batch=solving.batch)

    def _tensors(self, bench: Bench, packed: Mapping[str, Mapping[str, Tensor]], changed: Iterable[str]) -> list[OutputTensor]:
        """What the shard holds, in the checkpoint's order. packed: the quantized Linears by the name of their weight in the checkpoint.
        changed: names in the block of parameters that scales were folded into.

        Unquantized weights are copied; of those that are not stored plainly, the loaded value is written.
        """
        pager, writer = bench.pager, bench.writer
        inside = [name for name in pager.block_names(self.index) if pager.has_source(name)]
        sources = {source.name: (name, source) for name in inside if not (source := pager.source_of(name)).is_plain}
        for source, full in ((pager.source_of(full), full) for full in (f"{self.prefix}.{name}" for name in changed)):
            sources[source.name] = full, source
        owned = {info.name for _, source in sources.values() for info in source.tensors}
        tensors: list[OutputTensor] = []
        for name in dict.fromkeys([*self.shard.sources, *sources]):
            if name in packed:
                tensors += writer.packed(packed[name])
            elif name in sources:
                full, source = sources[name]
                tensors += writer.packed({name: pager.model.get_parameter(full).detach().to(source.dtype)})
            elif name not in owned:
                tensors.append(writer.stored(name))
        return tensors

    def _folds(self, bench: Bench, block: nn.Module, schemes: Mapping[str, QuantScheme], banks: Mapping[str, BankJob]) -> FoldWork | None:
        """Where inputs of the block's Linears can be scaled, if the method does so. schemes: of those that are to be quantized."""
        scaling = method_of(bench.config).scaling
        if scaling is None:
            return None
        return FoldWork(
            ranks=bench.writer.ranks,
            folds=bench.pager.folds[self.index].folds,
            scaling=scaling,
            index=self.index,
            block=block,
            schemes=schemes,
            banks=banks,
            clock=bench.control.clock,
        )

    def _unless_left_out(self, schemes: Mapping[str, QuantScheme], commit: Commit) -> dict[str, QuantScheme]:
        """The scheme of each Linear that the committed shard holds quantized, by its name in the block."""
        return {name: scheme for name, scheme in schemes.items() if f"{self.prefix}.{name}" not in commit.left_out}

    def _restore(self, bench: Bench, block: nn.Module, schemes: Mapping[str, QuantScheme], commit: Commit, folds: FoldWork | None) -> None:
        """Load the committed weights of a block's Linears into its modules, and what scales were folded into. schemes: by name in it."""
        made: Format = bench.config.made
        finished = FinishedBlock(bench.writer.journal, commit, made)
        for name, scheme in schemes.items():
            source = bench.pager.source_of(f"{self.prefix}.{name}.weight").name.removesuffix(".weight")
            module = block.get_submodule(name)
            weight = finished.weight(source, scheme, linear_weight(module).dtype, bench.pager.device)
            skeleton.set_linear_weight(module, weight)
        if folds is not None:
            names = {name: bench.pager.source_of(f"{self.prefix}.{name}").name for name in folds.kept(schemes)}
            folds.restore({name: finished.plain(source) for name, source in names.items()})

    def _show_done(self, bench: Bench, whole: bool, records: Sequence[LinearRecord], seconds: float) -> None:
        if whole:
            bench.control.progress.block_skipped()
            return
        worst = max(records, key=lambda r: r.relative_error, default=None)
        named = None if worst is None else (worst.name.removeprefix(self.prefix + "."), worst.relative_error)
        names = bench.writer.journal.units
        later = {names[number] for number in bench.writer.journal.missing}
        left = sum(f"block-{i}" in later for i in range(self.index + 1, len(bench.pager.blocks)))
        bench.control.progress.block_done(self.index, seconds, named, left)


def _share(job: BlockJob, records: Sequence[LinearRecord]) -> float:
    """The fraction of the block's weights to be quantized that these Linears hold."""
    whole = sum(linear_weight(job.block.get_submodule(name)).numel() for name in job.schemes)
    for bank in job.banks.values():
        whole += sum(getattr(bank.module, key).numel() for key in bank.schemes)
    return sum(m * n for m, n in (record.shape for record in records)) / whole
