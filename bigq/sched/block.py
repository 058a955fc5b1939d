"""Solving one block, level by level ("true-sequential"), and replaying it.

Each level replays the calibration set through what is already quantized, up to the inputs of the level's Linears. Modules with a
shortcut run once: what they return follows from the inputs that the Hessian was made of. Keeping those costs one hidden
state per token and leaves 1.5 forwards of a llama block's Linears and 1 of its attention, instead of 2.2 and 4.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bigq.arch import block_linears
from bigq.clock import Clock, Lap
from bigq.errors import NumericsError
from bigq.kernels.finite import finite
from bigq.report import LinearRecord
from bigq.sched.activations import ActivationStore
from bigq.sched.capture import StopForward, all_replaced
from bigq.sched.memory import return_freed_memory
from bigq.sched.nonfinite import bad_rows, culprit
from bigq.sched.structure import BlockPlan, Group, Shortcut
from bigq.sched.tiers import RowBuffer
from bigq.scheme import QuantizedWeight, QuantScheme
from bigq.skeleton import linear_weight, set_linear_weight
from bigq.solver.gptq import solve
from bigq.solver.hessian import OTHER_DTYPE, HessianSum, factorize, finite_tokens
from bigq.solver.rtn import round_to_nearest


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
    on_nonfinite: str = "stop"


class Memo:
    """What modules with a shortcut return, row by row; until their Linear is solved, its inputs. Kept in the store's tier.

    A pass that begins anew with a smaller batch puts all rows again. Rows serve only passes with the batch that they were made
    with: a block that is replayed from its shard has no memo, and must come to the same bytes.
    """

    def __init__(self) -> None:
        self._kept: dict[Shortcut, _Kept] = {}
        self._finished: list[Shortcut] = []

    def put(self, shortcut: Shortcut, store: ActivationStore, x: Tensor) -> None:
        """Keep the Linear's input for the store's current batch."""
        lo, hi = store.at
        if shortcut not in self._kept:
            self._kept[shortcut] = _Kept.like(x, hi - lo, store)
        self._kept[shortcut].put(lo, hi, x)
        self._kept[shortcut].batch = store.batch

    def finish(self, shortcut: Shortcut, linear: nn.Module, store: ActivationStore, block: int, step: int) -> None:
        """The Linear is solved: turn its inputs into its outputs, in a pass of the store's."""
        inputs = self._kept[shortcut]
        outputs: _Kept | None = None

        def run(lo: int, hi: int) -> None:
            nonlocal outputs
            y = linear(inputs.get(lo, hi))
            if outputs is None:
                outputs = inputs if y.numel() == inputs.elements * (hi - lo) else _Kept.like(y, hi - lo, store)
            outputs.put(lo, hi, y)

        store.in_place(block, step, run)
        assert outputs is not None
        outputs.batch = inputs.batch if store.batch == inputs.batch else None
        if outputs is not inputs:
            inputs.buffer.close()
        self._kept[shortcut] = outputs
        self._finished.append(shortcut)

    @contextlib.contextmanager
    def active(self, block: nn.Module, store: ActivationStore) -> Iterator[None]:
        """Let finished modules return what is kept for the store's current batch instead of running, as long as it has the same size."""
        usable = [s for s in self._finished if self._kept[s].batch == store.batch]

        def make(i: int) -> Callable[..., Any]:
            shortcut = usable[i]
            return lambda *args, **kwargs: shortcut.returns(self._kept[shortcut].get(*store.at), args, kwargs)

        with all_replaced([block.get_submodule(s.module) for s in usable], make):
            yield

    def close(self) -> None:
        """Give up everything kept."""
        for kept in self._kept.values():
            kept.buffer.close()
        self._kept.clear()
        self._finished.clear()


@dataclass(slots=True)
class _Kept:
    """Tensors of a batch as rows of a buffer. shape: of what belongs to one row, whose leading dimension may be folded.

    batch: the rows that went through the block at once to make it; None where that was not the same number for all.
    """

    buffer: RowBuffer
    elements: int
    shape: tuple[int, ...]
    batch: int | None = None

    @classmethod
    def like(cls, x: Tensor, rows: int, store: ActivationStore) -> _Kept:
        elements = x.numel() // rows
        return cls(store.buffer(elements, x.dtype), elements, (x.shape[0] // rows, *x.shape[1:]))

    def put(self, lo: int, hi: int, x: Tensor) -> None:
        self.shape = (x.shape[0] // (hi - lo), *x.shape[1:])
        self.buffer.put(lo, x.reshape(hi - lo, -1))

    def get(self, lo: int, hi: int) -> Tensor:
        return self.buffer.get(lo, hi).view((hi - lo) * self.shape[0], *self.shape[1:])


def solve_block(job: BlockJob, store: ActivationStore, true_sequential: bool) -> Iterator[Solved | Skipped]:
    """Quantize a block's Linears with GPTQ, level by level. On return each holds its dequantized codes, or what it held if it was skipped.

    Raises NumericsError, naming the Linear, where activations or Hessians are not finite or a factorization fails; nothing of
    that where the job is to skip them.
    """
    linears = block_linears(job.block)
    passes = 1 + len(linears)  # of a level at most: one to capture, one for each shortcut; so a level's number is its own, memo or not
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
                job.memo.finish(shortcut, linears[shortcut.linear], store, job.index, step + number)


def _capture(
    job: BlockJob, linears: Mapping[str, nn.Module], groups: list[Group], store: ActivationStore, keep: list[Shortcut]
) -> dict[tuple[str, ...], HessianSum]:
    """Replay the calibration set until every wanted Linear has seen its input; one Hessian sum per group.

    Wanted Linears of the deepest level do not compute: what they reach is not looked at.
    """
    finite_only = job.on_nonfinite == "skip"
    sums = {g.names: HessianSum(linear_weight(linears[g.names[0]]).shape[1], job.device, finite_only=finite_only) for g in groups}
    leader = {g.names[0]: sums[g.names] for g in groups}
    kept = {shortcut.linear: shortcut for shortcut in keep}
    names = [name for g in groups for name in g.names]
    deepest = max(g.level for g in groups)
    feeding = {name for g in groups if g.level < deepest for name in g.names}
    waiting: set[str] = set()

    def make(k: int) -> Callable[[Tensor], Tensor]:
        name, module = names[k], linears[names[k]]
        outputs = linear_weight(linears[name]).shape[0]

        def forward(x: Tensor) -> Tensor:
            if name in leader:
                with job.clock.phase("hessian"):
                    leader[name].add(x)
            if name in kept:
                job.memo.put(kept[name], store, x)
            waiting.discard(name)
            if not waiting:
                raise StopForward
            if name in feeding:
                y: Tensor = type(module).forward(module, x)
                return y
            return x.new_zeros(*x.shape[:-1], outputs)

        return forward

    with job.memo.active(job.block, store), all_replaced([linears[name] for name in names], make):
        for hidden, call in store.batches(job.index):
            waiting.update(names)
            with contextlib.suppress(StopForward):
                call.run(job.block, hidden)
    return sums


def _solve_group(job: BlockJob, linears: Mapping[str, nn.Module], group: Group, total: HessianSum) -> Iterator[Solved | Skipped]:
    """Factor a group's Hessian once and solve its Linears together, as far as their schemes agree.

    What fails together is skipped together: readers that fuse Linears (q/k/v, gate/up) want all of them quantized or none.
    """
    label = ", ".join(f"{job.prefix}.{n}" for n in group.names)
    with _skipping(job, group.names, label) as skipped, job.clock.phase("hessian"):
        h = total.finish(label)
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
                results = solve([linear_weight(linears[n]) for n in names], factor, scheme, label)
                return_freed_memory()
            if skipped:
                yield from skipped
                continue
            seconds = {"factor": factor_time, "solve": solve_time}
            for name, result in zip(names, results, strict=True):
                set_linear_weight(linears[name], result.dequantize(linear_weight(linears[name]).dtype))
                yield Solved(f"{job.prefix}.{name}", result, seconds, total.left_out)


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


def propagate(index: int, block: nn.Module, store: ActivationStore, name: str, memo: Memo | None = None, on_nonfinite: str = "stop") -> int:
    """Replay the whole block; its outputs overwrite its inputs. Returns how many tokens' outputs are not finite: with "stop" none are.

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

    store.in_place(index + 1, 0, run)
    if lost == tokens:
        raise NumericsError(
            f"{name}: its outputs are not finite for a single calibration token, so nothing is left to go on with; {OTHER_DTYPE}"
        )
    return lost
