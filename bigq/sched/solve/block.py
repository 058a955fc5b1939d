"""Solving the Linears of one block, level by level ("true-sequential").

Each level replays the calibration rows through the Linears solved so far, up to the inputs of the level's Linears. A module with a
shortcut runs once: its output is computed from the kept inputs of its Linear (``rows.shortcut_cache``).

Methods that correct the upstream error also replay each batch through the unquantized block, on the rows of the unquantized model
(``rows.reference``), so a Linear's inputs in both models are available at the same time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bigq.errors import NumericsError
from bigq.machine.memory import return_freed_memory
from bigq.machine.ranks import OneProcess, Ranks
from bigq.methods.base import CalibratedMethod, DataFreeMethod
from bigq.model.blocks import block_linears
from bigq.model.forward.block_call import BlockCall
from bigq.model.forward.capture import StopForward, replace_forwards
from bigq.model.skeleton import linear_weight, set_linear_weight
from bigq.model.structure import BlockPlan, Group, Shortcut
from bigq.progress.clock import Clock
from bigq.sched.rows.reference import ReferenceBlock
from bigq.sched.rows.routed import RoutedRows, record_routed
from bigq.sched.rows.shortcut_cache import ShortcutCache
from bigq.sched.rows.store import ActivationStore
from bigq.sched.solve.bank import BankJob, round_bank, run_bank_rows, solve_bank
from bigq.sched.solve.collected import Collected
from bigq.sched.solve.fold import FOLD_STEP
from bigq.sched.solve.results import Skipped, Solved, SolvedExpert
from bigq.sched.solve.shared import failing_together, sharing_of, solve_shared
from bigq.scheme import QuantScheme
from bigq.vocabulary import OnNonfinite


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockJob:
    """One loaded block and how its Linears are quantized.

    index: of the block. prefix: its module path. schemes: by the Linear's name in the block; Linears without a scheme stay unquantized.
    on_nonfinite: if a value is not finite or a factorization fails, "stop" with an error, or "skip" the tokens and Linears concerned.
    banks: the banks of experts by their name in the block. largest_inputs: whether the largest input of each Linear is needed.
    """

    index: int
    prefix: str
    block: nn.Module
    plan: BlockPlan
    schemes: Mapping[str, QuantScheme]
    device: torch.device
    clock: Clock
    on_nonfinite: OnNonfinite = "stop"
    banks: Mapping[str, BankJob] = field(default_factory=dict)
    largest_inputs: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockRows:
    """The calibration rows that enter one block.

    store: the hidden states that leave the quantized blocks before it. cache: what modules with a shortcut need to run once.
    reference: the same rows in the unquantized model, for methods that correct the upstream error.
    """

    store: ActivationStore
    cache: ShortcutCache
    reference: ReferenceBlock | None = None


def solve_block(
    job: BlockJob, rows: BlockRows, method: CalibratedMethod, *, true_sequential: bool, ranks: Ranks | None = None
) -> Iterator[Solved | Skipped | SolvedExpert]:
    """Quantize a block's Linears and experts with a calibrated method, level by level.

    A bank comes before the Linears of its level, which may depend on it; without ``true_sequential`` after all Linears. Afterwards each
    Linear holds its dequantized codes; skipped Linears are unchanged.
    Raises NumericsError, naming the Linear, if activations or sums are not finite or a factorization fails, unless the job skips these.
    """
    linears = block_linears(job.block)
    passes = _passes(job, method)
    for number, level in enumerate(job.plan.levels(true_sequential)):
        step = _first_step(method) + number * passes + method.passes * len(job.banks)
        for name in _banks_at(job, number, true_sequential):
            yield from _solve_bank(job, rows, method, name, true_sequential)
        wanted = [Group(kept, g.level) for g in level if (kept := tuple(n for n in g.names if n in job.schemes))]
        if not wanted:
            continue
        names = {name for group in wanted for name in group.names}
        keep = [s for s in job.plan.shortcuts if s.linear in names] if true_sequential else []
        with job.clock.phase("replay"):
            collectors = rows.store.read_pass(job.index, step, functools.partial(_collect, job, rows, method, linears, wanted, keep))
        return_freed_memory()
        for group in wanted:
            collector = collectors.pop(group.names)
            collector.reduce(ranks or OneProcess())
            yield from _solve_group(job, rows, linears, group, collector, ranks or OneProcess())
            del collector
        return_freed_memory()
        with job.clock.phase("replay"):
            for number, shortcut in enumerate(keep, 1):
                if shortcut.last:
                    rows.cache.use_inputs(shortcut)
                    if rows.reference is not None:
                        rows.reference.cache.use_inputs(shortcut)
                    continue
                linear = linears[shortcut.linear]
                rows.cache.compute_outputs(shortcut, linear, rows.store, job.index, step + number)
                if rows.reference is not None:
                    with rows.reference.unquantized_weights(job.block):
                        rows.reference.cache.compute_outputs(
                            shortcut, linear, rows.reference.store, job.index, step + len(linears) + number
                        )
    for name in _banks_at(job, len(job.plan.levels(true_sequential)), true_sequential):
        yield from _solve_bank(job, rows, method, name, true_sequential)


def replay_banks(job: BlockJob, rows: BlockRows, method: CalibratedMethod, *, true_sequential: bool) -> None:
    """Compute the outputs of a finished block's banks, with the same bits as ``solve_block`` did."""
    for name, bank in job.banks.items():
        step = bank_step(job, method, name, true_sequential)
        with bank_rows(job, rows.store, rows.cache, name, step) as routed:
            run_bank_rows(bank, routed)


def replay_unquantized_banks(job: BlockJob, reference: ReferenceBlock, method: CalibratedMethod, *, true_sequential: bool) -> None:
    """Compute the outputs of banks in the unquantized model, with the same bits as ``solve_block`` did. The block has its unquantized
    weights."""
    for name, bank in job.banks.items():
        step = bank_step(job, method, name, true_sequential) + 1
        with bank_rows(job, reference.store, reference.cache, name, step) as routed:
            run_bank_rows(dataclasses.replace(bank, load=bank.load_original), routed)


def _solve_bank(job: BlockJob, rows: BlockRows, method: CalibratedMethod, name: str, true_sequential: bool) -> Iterator[SolvedExpert]:
    step, reference = bank_step(job, method, name, true_sequential), rows.reference
    with contextlib.ExitStack() as stack:
        routed = stack.enter_context(bank_rows(job, rows.store, rows.cache, name, step))
        before = None
        if reference is not None:
            with reference.unquantized_weights(job.block):
                before = stack.enter_context(bank_rows(job, reference.store, reference.cache, name, step + 1))
        yield from solve_bank(job.banks[name], method, routed, before)


def _first_step(method: CalibratedMethod) -> int:
    return FOLD_STEP + (method.scaling is not None)


def _passes(job: BlockJob, method: CalibratedMethod) -> int:
    """A level's steps: a pass to each bank, one to collect, one for each shortcut. They do not depend on what is cached."""
    return 1 + method.passes * (len(job.banks) + len(block_linears(job.block)))


def bank_step(job: BlockJob, method: CalibratedMethod, name: str, true_sequential: bool) -> int:
    """The step of the pass to a bank; the one of the unquantized model comes next."""
    level = _bank_level(job, name, true_sequential)
    return _first_step(method) + level * _passes(job, method) + method.passes * list(job.banks).index(name)


def _bank_level(job: BlockJob, name: str, true_sequential: bool) -> int:
    """The level before which a bank is solved."""
    levels = len(job.plan.levels(true_sequential))
    return min(levels, next(b.level for b in job.plan.banks if b.name == name)) if true_sequential else levels


def _banks_at(job: BlockJob, level: int, true_sequential: bool) -> list[str]:
    return [name for name in job.banks if _bank_level(job, name, true_sequential) == level]


@contextlib.contextmanager
def bank_rows(job: BlockJob, store: ActivationStore, cache: ShortcutCache, name: str, step: int) -> Iterator[RoutedRows]:
    """The tokens of a store at a bank. If all is well when the context closes, the block takes the bank's output from them."""
    running = functools.partial(cache.apply, job.block, store)
    with contextlib.ExitStack() as undo:
        with job.clock.phase("replay"):
            routed = record_routed(name, job.block, store, job.index, step, running, job.prefix)
        undo.callback(routed.close)
        undo.callback(routed.drop_inputs)
        return_freed_memory()
        routed.begin_total(store, job.banks[name].bank)
        yield routed
        undo.pop_all()
    routed.drop_inputs()
    cache.use_bank(name, routed)


def _collect(
    job: BlockJob,
    rows: BlockRows,
    method: CalibratedMethod,
    linears: Mapping[str, nn.Module],
    groups: list[Group],
    keep: list[Shortcut],
) -> dict[tuple[str, ...], Collected]:
    """Replay the calibration rows up to the inputs of all Linears in the groups. Returns one collector per group, by the group's names."""
    store, reference = rows.store, rows.reference

    def collector(group: Group) -> Collected:
        n = linear_weight(linears[group.names[0]]).shape[1]
        return Collected(method, n, job.device, finite_only=job.on_nonfinite == "skip", largest=job.largest_inputs)

    collectors = {group.names: collector(group) for group in groups}
    leader = {group.names[0]: collectors[group.names] for group in groups}
    kept = {shortcut.linear: shortcut for shortcut in keep}
    seen: dict[str, Tensor] = {}

    def see(name: str, x: Tensor) -> None:
        if name in leader:
            with job.clock.phase("hessian"):
                leader[name].add(x, seen.pop(name, None))
        if name in kept:
            rows.cache.put(kept[name], store, x)

    def replay_reference(reference: ReferenceBlock) -> None:
        def see_reference(name: str, x: Tensor) -> None:
            if name in leader:
                seen[name] = x
            if name in kept:
                reference.cache.put(kept[name], reference.store, x)

        with reference.unquantized_weights(job.block), reference.cache.apply(job.block, reference.align(store)):
            call = reference.store.call(job.index, *store.at)
            _run_up_to(job.block, linears, groups, call, reference.store.fetch(*store.at), see_reference)

    for hidden, call in store.batches(job.index):
        if reference is not None:
            replay_reference(reference)
        with rows.cache.apply(job.block, store):
            _run_up_to(job.block, linears, groups, call, hidden, see)
    return collectors


def _run_up_to(
    block: nn.Module,
    linears: Mapping[str, nn.Module],
    groups: Sequence[Group],
    call: BlockCall,
    hidden: Tensor,
    see: Callable[[str, Tensor], None],
) -> None:
    """Run a block until every group has received its input; ``see`` is called with each Linear's name and input.

    Linears of the deepest level do not compute, since no other group depends on their outputs.
    """
    group_of = {name: g for g in groups for name in g.names}
    names = list(group_of)
    deepest = max(g.level for g in groups)
    waiting = set(groups)

    def make(k: int) -> Callable[[Tensor], Tensor]:
        module, group = linears[names[k]], group_of[names[k]]
        outputs = linear_weight(module).shape[0]

        def forward(x: Tensor) -> Tensor:
            if group in waiting:
                waiting.remove(group)
                for member in group.names:
                    see(member, x)
            if not waiting:
                raise StopForward
            if group.level < deepest:
                y: Tensor = type(module).forward(module, x)
                return y
            return x.new_zeros(*x.shape[:-1], outputs)

        return forward

    with replace_forwards([linears[name] for name in names], make), contextlib.suppress(StopForward):
        call.run(block, hidden)


def _solve_group(
    job: BlockJob, rows: BlockRows, linears: Mapping[str, nn.Module], group: Group, collector: Collected, ranks: Ranks
) -> Iterator[Solved | Skipped]:
    """Solve a group's Linears; those with equal schemes are solved together.

    Linears that fail together are skipped together: readers that fuse Linears (q/k/v, gate/up) need all of them quantized or none.
    """
    label = ", ".join(f"{job.prefix}.{n}" for n in group.names)
    with _skipping(job, group.names, label) as skipped, failing_together(ranks), job.clock.phase("hessian"):
        solver = collector.finish(label)
    if skipped:
        yield from skipped
        return
    kinds: dict[Hashable, dict[QuantScheme, list[str]]] = {}
    for name in group.names:
        scheme = job.schemes[name]
        kinds.setdefault(solver.kind(scheme), {}).setdefault(scheme, []).append(name)
    ordered = sorted(kinds)  # type: ignore[type-var]  # the kinds of one solver can be sorted
    for kind in ordered:
        alike = kinds[kind]
        names = [name for same in alike.values() for name in same]
        with _skipping(job, names, label) as skipped, failing_together(ranks), job.clock.phase("factor") as factor_time:
            factor = solver.factor(next(iter(alike)), label, last=kind == ordered[-1], sharing=sharing_of(ranks))
            return_freed_memory()
        if skipped:
            yield from skipped
            continue
        for scheme, names in alike.items():
            with _skipping(job, names, label) as skipped, job.clock.phase("solve") as solve_time:
                results = solve_shared(factor, [linear_weight(linears[n]) for n in names], scheme, label, ranks)
                return_freed_memory()
            if skipped:
                yield from skipped
                continue
            seconds = {"factor": factor_time, "solve": solve_time}
            for name, result in zip(names, results, strict=True):
                if rows.reference is not None:
                    rows.reference.keep_weight(name, linears[name])
                set_linear_weight(linears[name], result.dequantize(linear_weight(linears[name]).dtype))
                yield Solved(f"{job.prefix}.{name}", result, seconds, collector.left_out, collector.largest_input)


@contextlib.contextmanager
def _skipping(job: BlockJob, names: Sequence[str], label: str) -> Iterator[list[Skipped]]:
    """If the job skips failures, catch a NumericsError and add a ``Skipped`` for each name to the yielded list.

    label: the beginning of the error's message. The text after its first semicolon is advice, which is dropped.
    """
    skipped: list[Skipped] = []
    try:
        yield skipped
    except NumericsError as error:
        if job.on_nonfinite != "skip":
            raise
        reason = str(error).removeprefix(f"{label}: ").partition(";")[0]
        skipped += [Skipped(f"{job.prefix}.{name}", reason) for name in names]


def quantize_weights(job: BlockJob, method: DataFreeMethod) -> Iterator[Solved | Skipped | SolvedExpert]:
    """Quantize a block's Linears with a method without calibration. The block itself is unchanged."""
    linears = block_linears(job.block)
    for name, scheme in job.schemes.items():
        label = f"{job.prefix}.{name}"
        with _skipping(job, [name], label) as skipped, job.clock.phase("solve") as solve_time:
            result = method.quantize(linear_weight(linears[name]), scheme, label)
        if skipped:
            yield from skipped
            continue
        yield Solved(label, result, {"solve": solve_time})
    for bank in job.banks.values():
        yield from round_bank(bank, method)
