"""Solving one block, level by level ("true-sequential"), and replaying it.

Each level replays the calibration set through what is already quantized, up to the inputs of the level's Linears. Modules with a
shortcut run once: what they return follows from the inputs that the Hessian was made of (``memo``).

With asymmetric calibration each batch goes through the block as it was first, on the rows as the original model has them (``original``),
and what the Linears get there is set against what they get now.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bigq.errors import NumericsError
from bigq.kernels.finiteness import finite
from bigq.machine.memory import return_freed_memory
from bigq.model.blocks import block_linears
from bigq.model.capture import BlockCall, StopForward, all_replaced
from bigq.model.skeleton import linear_weight, set_linear_weight
from bigq.model.structure import BlockPlan, Group, Shortcut
from bigq.progress.clock import Clock, Lap
from bigq.progress.records import LinearRecord
from bigq.quantized_weight import QuantizedWeight
from bigq.sched.nan_search import bad_rows, culprit
from bigq.sched.rows.original import Original
from bigq.sched.rows.shortcut_cache import Memo
from bigq.sched.rows.store import ActivationStore
from bigq.scheme import QuantScheme
from bigq.solver.gptq import solve
from bigq.solver.hessian import OTHER_DTYPE, HessianSum, factorize, finite_tokens
from bigq.solver.rtn import round_to_nearest
from bigq.solver.upstream_error import Correction, CrossSum


@dataclass(frozen=True, slots=True)
class Solved:
    """One Linear done: its full module name, its codes, and how long its factor and solve took, known when the clock has settled.

    left_out: calibration tokens that were left out of its Hessian because they are not finite.
    """

    name: str
    weight: QuantizedWeight
    seconds: Mapping[str, Lap]
    left_out: int = 0

    def record(self) -> LinearRecord:
        """What is told of it."""
        weight = self.weight
        m, n = weight.codes.shape
        return LinearRecord(
            name=self.name,
            bits=weight.scheme.bits,
            group_size=weight.scheme.group_size,
            shape=(m, n),
            loss=weight.loss,
            relative_error=weight.relative_error,
            damping=weight.damping,
            seconds=self.seconds,
        )


@dataclass(frozen=True, slots=True)
class Skipped:
    """One Linear that cannot be quantized and stays as it is: its full module name, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockJob:
    """What solving a block needs: the loaded block, its plan, and the scheme of every Linear to quantize.

    prefix: the block's module path. schemes: by name in the block; Linears that are absent stay as they are.
    memo: what is kept of the rows' way through the block. original: the same rows in the original model, for asymmetric calibration.
    on_nonfinite: "stop" with an error where something is not finite or a factorization fails, or "skip" the tokens and the Linears
        concerned.
    """

    index: int
    prefix: str
    block: nn.Module
    plan: BlockPlan
    schemes: Mapping[str, QuantScheme]
    device: torch.device
    clock: Clock
    memo: Memo
    original: Original | None = None
    on_nonfinite: str = "stop"


def solve_block(job: BlockJob, store: ActivationStore, true_sequential: bool) -> Iterator[Solved | Skipped]:
    """Quantize a block's Linears with GPTQ or GPTAQ, level by level.

    On return each holds its dequantized codes, or what it held if it was skipped.

    Raises NumericsError, naming the Linear, where activations or Hessians are not finite or a factorization fails; nothing of
    that where the job is to skip them.
    """
    linears = block_linears(job.block)
    streams = 1 if job.original is None else 2
    passes = 1 + streams * len(
        linears
    )  # of a level at most: one to capture, one for each shortcut; so a level's number is its own, memo or not
    for step, level in zip(itertools.count(1, passes), job.plan.levels(true_sequential), strict=False):
        wanted = [Group(kept, g.level) for g in level if (kept := tuple(n for n in g.names if n in job.schemes))]
        if not wanted:
            continue
        names = {name for group in wanted for name in group.names}
        keep = [s for s in job.plan.shortcuts if s.linear in names] if true_sequential else []
        with job.clock.phase("replay"):
            sums = store.afresh(job.index, step, functools.partial(_capture, job, linears, wanted, store, keep))
        return_freed_memory()
        for group in wanted:
            yield from _solve_group(job, linears, group, sums.pop(group.names))
        return_freed_memory()
        with job.clock.phase("replay"):
            for number, shortcut in enumerate(keep, 1):
                linear = linears[shortcut.linear]
                job.memo.finish(shortcut, linear, store, job.index, step + number)
                if job.original is not None:
                    with job.original.weights_of(job.block):
                        job.original.memo.finish(shortcut, linear, job.original.store, job.index, step + len(linears) + number)


@dataclass(frozen=True, slots=True)
class _Sums:
    """What a group's Linears are solved with. cross: for asymmetric calibration."""

    hessian: HessianSum
    cross: CrossSum | None


def _capture(
    job: BlockJob, linears: Mapping[str, nn.Module], groups: list[Group], store: ActivationStore, keep: list[Shortcut]
) -> dict[tuple[str, ...], _Sums]:
    """Replay the calibration set until every wanted Linear has seen its input; one sum per group."""
    original = job.original
    sums = {g.names: _sums(job, linear_weight(linears[g.names[0]]).shape[1]) for g in groups}
    leader = {g.names[0]: sums[g.names] for g in groups}
    kept = {shortcut.linear: shortcut for shortcut in keep}
    before: dict[str, Tensor] = {}

    def see(name: str, x: Tensor) -> None:
        if name in leader:
            with job.clock.phase("hessian"):
                leader[name].hessian.add(x)
                if (cross := leader[name].cross) is not None:
                    cross.add(before.pop(name), x)
        if name in kept:
            job.memo.put(kept[name], store, x)

    def see_original(name: str, x: Tensor) -> None:
        assert original is not None
        if name in leader:
            before[name] = x
        if name in kept:
            original.memo.put(kept[name], original.store, x)

    for hidden, call in store.batches(job.index):
        if original is not None:
            with original.weights_of(job.block), original.memo.active(job.block, original.follow(store)):
                _run_up_to(job.block, linears, groups, call, original.store.take(*store.at), see_original)
        with job.memo.active(job.block, store):
            _run_up_to(job.block, linears, groups, call, hidden, see)
    return sums


def _sums(job: BlockJob, n: int) -> _Sums:
    finite_only = job.on_nonfinite == "skip"
    cross = None if job.original is None else CrossSum(n, job.device, finite_only=finite_only)
    return _Sums(HessianSum(n, job.device, finite_only=finite_only), cross)


def _run_up_to(
    block: nn.Module,
    linears: Mapping[str, nn.Module],
    groups: Sequence[Group],
    call: BlockCall,
    hidden: Tensor,
    see: Callable[[str, Tensor], None],
) -> None:
    """Run a block until every Linear of the groups has seen its input; ``see`` is given each Linear's name and input.

    Those of the deepest level do not compute: what they reach is not looked at.
    """
    names = [name for g in groups for name in g.names]
    deepest = max(g.level for g in groups)
    feeding = {name for g in groups if g.level < deepest for name in g.names}
    waiting = set(names)

    def make(k: int) -> Callable[[Tensor], Tensor]:
        name, module = names[k], linears[names[k]]
        outputs = linear_weight(linears[name]).shape[0]

        def forward(x: Tensor) -> Tensor:
            see(name, x)
            waiting.discard(name)
            if not waiting:
                raise StopForward
            if name in feeding:
                y: Tensor = type(module).forward(module, x)
                return y
            return x.new_zeros(*x.shape[:-1], outputs)

        return forward

    with all_replaced([linears[name] for name in names], make), contextlib.suppress(StopForward):
        call.run(block, hidden)


def _solve_group(job: BlockJob, linears: Mapping[str, nn.Module], group: Group, sums: _Sums) -> Iterator[Solved | Skipped]:
    """Factor a group's Hessian once and solve its Linears together, as far as their schemes agree.

    What fails together is skipped together: readers that fuse Linears (q/k/v, gate/up) want all of them quantized or none.
    """
    label = ", ".join(f"{job.prefix}.{n}" for n in group.names)
    correction: Correction | None = None
    with _skipping(job, group.names, label) as skipped, job.clock.phase("hessian"):
        h = sums.hessian.finish(label)
        if sums.cross is not None and job.original is not None:
            correction = Correction(sums.cross.finish(sums.hessian.tokens, label), job.original.alpha)
    if skipped:
        yield from skipped
        return
    kinds = sorted({(job.schemes[n].act_order, job.schemes[n].damping) for n in group.names})
    for act_order, damping in kinds:
        alike: dict[QuantScheme, list[str]] = {}
        for name in group.names:
            scheme = job.schemes[name]
            if (scheme.act_order, scheme.damping) == (act_order, damping):
                alike.setdefault(scheme, []).append(name)
        with _skipping(job, [n for names in alike.values() for n in names], label) as skipped, job.clock.phase("factor") as factor_time:
            own = h if (act_order, damping) == kinds[-1] else h.clone()
            factor = factorize(own, act_order=act_order, damping=damping, name=label)
            return_freed_memory()
        if skipped:
            yield from skipped
            continue
        for scheme, names in alike.items():
            with _skipping(job, names, label) as skipped, job.clock.phase("solve") as solve_time:
                results = solve([linear_weight(linears[n]) for n in names], factor, scheme, label, correction)
                return_freed_memory()
            if skipped:
                yield from skipped
                continue
            seconds = {"factor": factor_time, "solve": solve_time}
            for name, result in zip(names, results, strict=True):
                if job.original is not None:
                    job.original.keep(name, linears[name])
                set_linear_weight(linears[name], result.dequantize(linear_weight(linears[name]).dtype))
                yield Solved(f"{job.prefix}.{name}", result, seconds, sums.hessian.left_out)


@contextlib.contextmanager
def _skipping(job: BlockJob, names: Sequence[str], label: str) -> Iterator[list[Skipped]]:
    """Where the job is to skip what fails, a NumericsError inside ends there and fills the list that this gives: one for each name.

    label: what the error's message begins with; behind its first semicolon is advice.
    """
    skipped: list[Skipped] = []
    try:
        yield skipped
    except NumericsError as error:
        if job.on_nonfinite != "skip":
            raise
        reason = str(error).removeprefix(f"{label}: ").partition(";")[0]
        skipped += [Skipped(f"{job.prefix}.{name}", reason) for name in names]


def round_block(job: BlockJob) -> Iterator[Solved | Skipped]:
    """Quantize a block's Linears by rounding to nearest."""
    linears = block_linears(job.block)
    for name, scheme in job.schemes.items():
        label = f"{job.prefix}.{name}"
        with _skipping(job, [name], label) as skipped, job.clock.phase("solve") as solve_time:
            result = round_to_nearest(linear_weight(linears[name]), scheme, label)
        if skipped:
            yield from skipped
            continue
        yield Solved(label, result, {"solve": solve_time})


def propagate(
    index: int,
    block: nn.Module,
    store: ActivationStore,
    name: str,
    memo: Memo | None = None,
    on_nonfinite: str = "stop",
    place: tuple[int, int] | None = None,
) -> int:
    """Replay the whole block; its outputs overwrite its inputs. Returns how many tokens' outputs are not finite: with "stop" none are.

    place: block and step of this pass (see ``Halving``), where it is not the one that brings rows to the next block's entrance.
    With "skip" they stay so. A later block's attention hands them on to other tokens of the same row, never to other rows.
    Raises NumericsError, naming where it began, for outputs that are not finite, or with "skip" where not a single one is finite.
    """
    lost = tokens = 0

    def run(lo: int, hi: int) -> None:
        nonlocal lost, tokens
        with (memo or Memo()).active(block, store):
            output = store.call(index, hi - lo).run(block, store.take(lo, hi))
        here = 0
        if not finite(output):
            if on_nonfinite != "skip":
                raise NumericsError(
                    f"{name}: its outputs are not finite (NaN or Inf) for {bad_rows(output, lo)}, beginning with "
                    f"{culprit(block, store.call(index, hi - lo), store.rows(lo, hi))}; {OTHER_DTYPE}; "
                    "when quantizing, --on-nonfinite skip goes on without such tokens"
                )
            here = int((~finite_tokens(output)).sum())
        store.put(lo, output)
        lost, tokens = lost + here, tokens + output[..., 0].numel()

    store.in_place(*(place or (index + 1, 0)), run)
    if lost == tokens:
        raise NumericsError(
            f"{name}: its outputs are not finite for a single calibration token, so nothing is left to go on with; {OTHER_DTYPE}"
        )
    return lost
