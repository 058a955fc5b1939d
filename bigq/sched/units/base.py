"""The interface between the loop and the parts of a model: units of work.

A job is a list of units. Each is made from some tensors of the checkpoint and becomes one shard, which is committed as a whole; a block
with experts becomes further shards, see ``units.experts``. A
``PlainUnit`` needs no forward pass. A ``StreamedUnit`` has a place in the forward pass. When the calibration rows reach it, it is solved,
or restored from its shard if an earlier run committed it. Then it passes the rows on.

A new kind of unit is a new file in ``bigq.sched.units`` and a line in ``bigq.sched.resolve.units_of``.
"""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from bigq.config import JobConfig
from bigq.model.blocks import block_linears
from bigq.model.experts.bank import Bank, bank_modules
from bigq.model.experts.cut import called_banks
from bigq.model.experts.proof import prove_bank, require_layout
from bigq.model.folding.experts import require_expert_fold
from bigq.model.folding.fold import ExpertFold
from bigq.model.pager import Pager
from bigq.model.skeleton import linear_weight
from bigq.model.structure import BlockPlan, plan_block
from bigq.sched.control import Control
from bigq.sched.plan.work import Choice
from bigq.sched.rows.probe import Probe
from bigq.sched.shards import Product, Shard, ShardWriter
from bigq.sched.solving import Solving
from bigq.sched.units.schemes import bank_schemes


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """The common objects of streamed units. structures, proven: of the blocks and of the banks so far, by their shape."""

    pager: Pager
    config: JobConfig
    choice: Choice
    writer: ShardWriter
    control: Control
    probe: Probe
    structures: dict[Any, BlockPlan] = field(default_factory=dict)
    proven: dict[Any, Bank] = field(default_factory=dict)

    def structure(self, block: nn.Module, index: int) -> BlockPlan:
        """The groups, levels and shortcuts of a loaded block, which is checked first. Blocks of one shape are probed once.

        Raises UnsupportedModelError.
        """
        shape = (
            tuple((name, type(m).__name__, linear_weight(m).shape) for name, m in block_linears(block).items()),
            tuple(bank_modules(block)),
        )
        with self.control.clock.phase("probe"):
            self.probe.check.run(index, block)
            if shape not in self.structures:
                self.structures[shape] = plan_block(block, self.probe.hidden, self.probe.calls[index])
        return self.structures[shape]

    def banks(self, block: nn.Module, index: int, plan: BlockPlan) -> dict[str, Bank]:
        """How the banks of a loaded block compute, by their name in it. One of each shape is proven. Raises UnsupportedModelError."""
        found: dict[str, Bank] = {}
        if not plan.banks:
            return found
        prefix = f"{self.pager.blocks_path}.{index}"
        with self.control.clock.phase("probe"):
            calls = called_banks(block, lambda: self.probe.calls[index].run(block, self.probe.hidden))
            for place in plan.banks:
                module = block.get_submodule(place.name)
                path = f"{prefix}.{place.name}"
                stored = self.pager.banks[path]
                named = stored.is_whole and bool(bank_schemes(stored, self.config))
                fold = self.expert_fold(index, place.name)
                key = (type(module), place.name, named, str(fold), tuple(p.shape for p in module.parameters(recurse=False)))
                if key not in self.proven:
                    load = functools.partial(self.pager.load_expert, path)
                    bank = prove_bank(path, module, calls[place.name], load)
                    if named:
                        require_layout(path, module, bank, calls[place.name], load(0))
                    if fold is not None:
                        require_expert_fold(path, module, bank, calls[place.name], fold, load(0))
                    self.proven[key] = bank
                found[place.name] = dataclasses.replace(self.proven[key], name=place.name)
        return found

    def expert_fold(self, index: int, name: str) -> ExpertFold | None:
        """Where scales may be folded inside each expert of a bank of block ``index``."""
        return next((fold for fold in self.pager.folds[index].experts if fold.bank == name), None) if self.pager.folds else None


class Unit(ABC):
    """shard: the shard that the unit becomes. block: its number among the decoder blocks, for the display; None for other units."""

    shard: Shard
    block: int | None = None

    @property
    def shards(self) -> Sequence[Shard]:
        """All shards that the unit becomes, in the order of their numbers. Each is committed by itself."""
        return [self.shard]


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
