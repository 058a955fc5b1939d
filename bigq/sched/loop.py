"""The loop over units. Each unit is a transaction:

    load → collect and solve, level by level → write and commit → replay → evict

Tensors outside the blocks are copied first, so a damaged embedding or a full disk is noticed before hours of work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from bigq.job.finish import reopen_folder
from bigq.machine.memory import return_freed_memory
from bigq.sched.shards import ShardWriter
from bigq.sched.solving import Solving
from bigq.sched.units.base import Bench, PlainUnit, StreamedUnit, Unit


def run_units(
    units: Sequence[Unit], writer: ShardWriter, bench: Callable[[], Bench], solving: Callable[[Bench], AbstractContextManager[Solving]]
) -> int:
    """Commit every unit that is not committed yet. Returns how many blocks earlier runs had committed.

    bench, solving: called only if a streamed unit is missing, since they probe the model and open the calibration rows.
    Raises Stopped, DataError, ResourceError; committed units stay committed.
    """
    control = writer.control
    missing = [unit for unit in units if any(writer.committed(shard) is None for shard in unit.shards)]
    resumed = sum(unit.block is not None for unit in units) - sum(unit.block is not None for unit in missing)
    control.progress.start(resumed)
    streamed = [unit for unit in units if isinstance(unit, StreamedUnit)]
    left = [unit for unit in missing if isinstance(unit, StreamedUnit)]
    writer.hold(shard for unit in streamed for shard in unit.shards if left)
    if missing and writer.ranks.index == 0:
        reopen_folder(writer.journal.out)
    writer.follow([unit.shard for unit in missing if isinstance(unit, PlainUnit)])
    for unit in missing:
        if isinstance(unit, PlainUnit) and writer.ranks.writes(unit.shard.number):
            control.stop.check()
            control.progress.phase(unit.doing)
            with control.clock.phase(unit.phase):
                writer.commit(unit.shard, unit.product(writer))
            control.progress.read(unit.nbytes)
    if left:
        with control.clock.phase("probe"):
            made = bench()
            return_freed_memory()
        with solving(made) as how:
            visits = list(how.visits(streamed, left))
            writer.follow([shard for unit, _ in visits for shard in unit.shards])
            writer.hold(shard for unit, _ in visits for shard in unit.shards)
            for unit, last in visits:
                unit.visit(made, how, last=last)
                writer.release(unit.shards)
                for shard in unit.shards:
                    if writer.committed(shard) is not None:
                        writer.leave(shard)
        with control.clock.phase("write"):
            writer.wait()
    return resumed
