"""How the units of a job are solved: with calibration rows that pass through them, or from weights alone.

``Solving`` hides this difference from units. It decides which units are visited, since rows must pass through every unit before a
missing one, and it solves a unit's Linears.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from bigq import faults
from bigq.errors import Stopped
from bigq.machine.ranks import Ranks
from bigq.methods.base import CalibratedMethod, DataFreeMethod, Method
from bigq.model.pager import Pager
from bigq.sched.control import Control
from bigq.sched.rows.calibration import CalibrationRows
from bigq.sched.rows.reference import REFERENCE_STEP, ReferenceBlock
from bigq.sched.rows.shortcut_cache import LastInputs, ShortcutCache
from bigq.sched.solve.block import BlockJob, BlockRows, quantize_weights, replay_banks, replay_unquantized_banks, solve_block
from bigq.sched.solve.fold import FoldWork
from bigq.sched.solve.head import HeadJob, quantize_head, solve_head
from bigq.sched.solve.propagate import propagate
from bigq.sched.solve.results import Skipped, Solved, SolvedExpert
from bigq.sched.solve.tune import tune_block

U = TypeVar("U")


class BlockVisit(Protocol):
    """One block, while it is loaded."""

    def solve(self) -> Iterator[Solved | Skipped | SolvedExpert]:
        """Quantize the block's Linears."""

    def fold(self, work: FoldWork) -> None:
        """Fold scales of inputs into the unquantized block."""

    def keep_originals(self, names: Iterable[str]) -> None:
        """Keep the weights of Linears, by name in the block, which are about to be replaced although experts of the block are missing."""

    def advance(self, restore: Callable[[], None] | None, loading: float) -> int:
        """Replay the calibration rows through the block. Returns how many tokens are not finite afterwards.

        restore: sets the committed weights, for a block that was not solved in this run. loading: seconds for which the block was loaded.
        """


class Solving(Protocol):
    """How units are solved. batch: the current number of calibration rows per forward; None without calibration."""

    @property
    def batch(self) -> int | None: ...

    def visits(self, units: Sequence[U], missing: Sequence[U]) -> Iterator[tuple[U, bool]]:
        """The streamed units to visit, in order, as (unit, whether it is the last one). missing: the units that are not committed."""

    def block(self, job: BlockJob) -> contextlib.AbstractContextManager[BlockVisit]:
        """A visit of a loaded block."""

    def head(self, job: HeadJob) -> Solved:
        """Quantize the output head. Raises NumericsError."""

    def between(self) -> None:
        """Between two units: save the hidden states if a checkpoint is due."""


class WithoutRows:
    """Solves each unit from its weights alone."""

    batch = None

    def __init__(self, method: DataFreeMethod) -> None:
        self._method = method

    def visits(self, units: Sequence[U], missing: Sequence[U]) -> Iterator[tuple[U, bool]]:
        for unit in missing:
            yield unit, True

    @contextlib.contextmanager
    def block(self, job: BlockJob) -> Iterator[BlockVisit]:
        yield _VisitWithoutRows(job, self._method)

    def head(self, job: HeadJob) -> Solved:
        return quantize_head(job, self._method)

    def between(self) -> None:
        """There are no hidden states."""


class _VisitWithoutRows:
    def __init__(self, job: BlockJob, method: DataFreeMethod) -> None:
        self._job, self._method = job, method

    def solve(self) -> Iterator[Solved | Skipped | SolvedExpert]:
        return quantize_weights(self._job, self._method)

    def fold(self, work: FoldWork) -> None:
        """No method without rows scales inputs."""

    def keep_originals(self, names: Iterable[str]) -> None:
        """Nothing needs them."""

    def advance(self, restore: Callable[[], None] | None, loading: float) -> int:
        """There are no rows."""
        return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class WithRows:
    """Solves units in order, on calibration rows that pass through them.

    last: where inputs of the last Linears of a block are kept. tune_steps: by gradients, for each block's scales.
    wait: waits until everything that was handed over is committed; called before hidden states are saved.
    """

    method: CalibratedMethod
    true_sequential: bool
    rows: CalibrationRows
    pager: Pager
    control: Control
    ranks: Ranks
    last: LastInputs
    wait: Callable[[], None]
    tune_steps: int = 0

    @property
    def batch(self) -> int | None:
        return self.rows.quantized.batch

    def visits(self, units: Sequence[U], missing: Sequence[U]) -> Iterator[tuple[U, bool]]:
        """From the unit that the rows have reached to the last missing unit."""
        progress, clock = self.control.progress, self.control.clock
        progress.phase("calibration rows")
        with clock.phase("embed"):
            at = self.rows.enter(self.pager, units.index(missing[0]))
        self.rows.watch(self.control.pause_in_pass, progress.step)
        for _ in range(at):
            progress.block_skipped()
        for unit in units[at : units.index(missing[-1]) + 1]:
            yield unit, unit is missing[-1]

    @contextlib.contextmanager
    def saved_on_stop(self) -> Iterator[None]:
        """If the job stops inside this context, save the hidden states, provided that the grace period allows it."""
        try:
            yield
        except Stopped:
            self.wait()
            if self.control.agreed(self.rows.expected_saving_seconds() < self.control.stop.seconds_left / 2):
                self._save()
                # The first rank to end ends the others soon after.
                self.ranks.everyone(None)
            raise

    @contextlib.contextmanager
    def block(self, job: BlockJob) -> Iterator[BlockVisit]:
        with contextlib.ExitStack() as stack:
            caches = [stack.enter_context(contextlib.closing(ShortcutCache(self.last))) for _ in self.rows.stores]
            spare = _Spare(self, caches)
            for store in self.rows.stores:
                store.spare = spare
            cache, reference = caches[0], None
            if self.rows.unquantized is not None:
                reference = ReferenceBlock(self.rows.unquantized, caches[1])
            yield _VisitWithRows(self, job, BlockRows(store=self.rows.quantized, cache=cache, reference=reference))

    def head(self, job: HeadJob) -> Solved:
        return solve_head(job, self.rows, self.method.for_head(), self.ranks)

    def between(self) -> None:
        due = any(self.ranks.everyone(self.rows.checkpoints.due))
        if due and self.rows.at is not None:
            self.control.progress.phase(f"saving activations at block {self.rows.at + 1}")
            with self.control.clock.phase("checkpoint"):
                self.wait()
                self._save()

    def _save(self) -> None:
        self.rows.save(self.control.progress.event, len(self.pager.blocks))


@dataclass(frozen=True, slots=True)
class _Spare:
    """The kept inputs of a block's last Linears. They do not change the output, as a smaller batch might."""

    solving: WithRows
    caches: Sequence[ShortcutCache]

    @property
    def held(self) -> bool:
        return any(cache.holds_inputs for cache in self.caches)

    def drop(self) -> None:
        for cache in self.caches:
            cache.drop_inputs()
        self.solving.last.close()
        self.solving.control.progress.say("out of memory: inputs of last Linears are not kept any more")


@dataclass(slots=True)
class _VisitWithRows:
    """original_ahead: the rows of the unquantized model have left the block already."""

    solving: WithRows
    job: BlockJob
    at: BlockRows
    original_ahead: bool = False

    def solve(self) -> Iterator[Solved | Skipped | SolvedExpert]:
        solving = self.solving
        found = solve_block(self.job, self.at, solving.method, true_sequential=solving.true_sequential, ranks=solving.ranks)
        return self._tuned(found) if solving.tune_steps else found

    def _tuned(self, found: Iterator[Solved | Skipped | SolvedExpert]) -> Iterator[Solved | Skipped | SolvedExpert]:
        """The same with tuned scales, once all Linears are solved."""
        control, solved = self.solving.control, list[Solved]()
        for one in found:
            if isinstance(one, Solved):
                solved.append(one)
            else:
                yield one
        if not solved:
            return
        assert self.at.reference is not None, "tuning needs the rows of the unquantized model"
        control.progress.phase("tune", self.job.index)
        self._advance_original(restored=False)
        # What is kept was computed with the scales before.
        self.at.cache.close()
        tuned = tune_block(self.job, solved, self.at.store, self.at.reference.store, self.solving.tune_steps, control.pause)
        control.progress.say(f"block {self.job.index + 1}: tuned, error of its outputs {tuned.before:.2e} → {tuned.after:.2e}")
        yield from tuned.linears

    def fold(self, work: FoldWork) -> None:
        self.solving.control.progress.phase("fold", self.job.index)
        work.run(self.at.store)

    def keep_originals(self, names: Iterable[str]) -> None:
        """For methods that correct the upstream error."""
        if self.at.reference is not None:
            for name in names:
                self.at.reference.keep_weight(name, self.job.block.get_submodule(name))

    def _advance_original(self, *, restored: bool) -> int:
        """Replay the rows of the unquantized model, if there are any, through the unquantized block. Returns how many are not finite.

        restored: whether the block was not solved in this run, which would have computed its banks too.
        """
        reference, job = self.at.reference, self.job
        if reference is None or self.original_ahead:
            return 0
        self.solving.rows.at, self.original_ahead = None, True
        if restored:
            replay_unquantized_banks(job, reference, self.solving.method, true_sequential=self.solving.true_sequential)
        with self.solving.control.clock.phase("replay"), reference.unquantized_weights(job.block):
            place = (job.index, REFERENCE_STEP)
            lost = propagate(
                job.index, job.block, reference.store, job.prefix, reference.cache, job.on_nonfinite, place, ranks=self.solving.ranks
            )
        if self.solving.tune_steps:
            reference.cache.close()
            reference.kept.clear()
        return lost

    def advance(self, restore: Callable[[], None] | None, loading: float) -> int:
        """Replay the unquantized rows first: a block to be restored still holds its unquantized weights then."""
        job, rows, control = self.job, self.solving.rows, self.solving.control
        control.progress.phase("replay", job.index)
        control.pause()
        rows.at = None
        started = time.monotonic()
        lost = self._advance_original(restored=restore is not None)
        if restore is not None:
            restore()
            replay_banks(self.job, self.at, self.solving.method, true_sequential=self.solving.true_sequential)
        with control.clock.phase("replay"):
            ranks = self.solving.ranks
            lost = propagate(job.index, job.block, self.at.store, job.prefix, self.at.cache, job.on_nonfinite, ranks=ranks) or lost
        rows.at = job.index + 1
        if lost:
            control.progress.say(
                f"block {job.index + 1}: the outputs of {lost} calibration tokens are not finite; later blocks leave them out"
            )
        faults.point("block.replayed")
        # A resumed job replays the block without what is kept: attention and the MLP run whole, which takes two to three times as long.
        passes = 1 if restore is not None else 1 + len(job.plan.shortcuts)
        rows.checkpoints.add_replay_time(loading + passes * (time.monotonic() - started))
        return lost


@contextlib.contextmanager
def solving_of(method: Method, with_rows: Callable[[CalibratedMethod], contextlib.AbstractContextManager[WithRows]]) -> Iterator[Solving]:
    """How a method solves the units of a job. with_rows: opens the calibration rows, for calibrated methods."""
    if isinstance(method, CalibratedMethod):
        with with_rows(method) as solving, solving.saved_on_stop():
            yield solving
    else:
        assert isinstance(method, DataFreeMethod)
        yield WithoutRows(method)
