"""The interface between the loop and the parts of a model: units of work.

A job is a list of units. Each is made from some tensors of the checkpoint, becomes one shard, and is committed as a whole. A
``PlainUnit`` needs no forward pass. A ``StreamedUnit`` has a place in the forward pass. When the calibration rows reach it, it is solved,
or restored from its shard if an earlier run committed it. Then it passes the rows on.

A new kind of unit (a group of experts, say) is a new file in ``bigq.sched.units`` and a line in ``bigq.sched.resolve.units_of``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from bigq.config import JobConfig
from bigq.model.blocks import block_linears
from bigq.model.pager import Pager
from bigq.model.skeleton import linear_weight
from bigq.model.structure import BlockPlan, plan_block
from bigq.sched.control import Control
from bigq.sched.plan.cost import Choice
from bigq.sched.rows.probe import Probe
from bigq.sched.shards import Product, Shard, ShardWriter
from bigq.sched.solving import Solving


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """The common objects of streamed units. structures: of the blocks so far, by their shape."""

    pager: Pager
    config: JobConfig
    choice: Choice
    writer: ShardWriter
    control: Control
    probe: Probe
    structures: dict[Any, BlockPlan] = field(default_factory=dict)

    def structure(self, block: nn.Module, index: int) -> BlockPlan:
        """The groups, levels and shortcuts of a loaded block, which is checked first. Blocks of one shape are probed once.

        Raises UnsupportedModelError.
        """
        shape = tuple((name, type(m).__name__, linear_weight(m).shape) for name, m in block_linears(block).items())
        with self.control.clock.phase("probe"):
            self.probe.check.run(index, block)
            if shape not in self.structures:
                self.structures[shape] = plan_block(block, self.probe.hidden, self.probe.calls[index])
        return self.structures[shape]


class Unit(ABC):
    """shard: the shard that the unit becomes. block: its number among the decoder blocks, for the display; None for other units."""

    shard: Shard
    block: int | None = None


class PlainUnit(Unit):
    """A unit that needs no forward pass."""

    #: The text for the display, and the phase of the clock.
    doing: str
    phase: str

    @abstractmethod
    def product(self, writer: ShardWriter) -> Product:
        """The content of the shard."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that are read from the checkpoint for this unit."""


class StreamedUnit(Unit):
    """A unit in the order of the forward pass."""

    @abstractmethod
    def visit(self, bench: Bench, solving: Solving, *, last: bool) -> None:
        """Solve and hand over the unit if it is not committed yet. Then replay the calibration rows through it, unless it is the last one.

        Raises Stopped if the job was asked to stop, NumericsError, ResourceError, CheckpointError.
        """
