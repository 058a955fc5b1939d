"""A place where each input of some Linears can be multiplied by a number of its own, because the module before them divides by it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bigq.model.experts.bank import Product


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fold:
    """Dividing ``producer``'s outputs by scales, and multiplying the inputs of all ``readers`` by them, changes nothing in what a block
    computes.

    Modules are named as in the block. readers: everything that receives the input: Linears, modules with a matrix such as routers, and
    banks of experts.
    rows: int64 [count], the outputs of a Linear that are divided; None for a norm, of which all are.
    channels: int64 [n], of which of the scales each input takes. Heads that share their values share scales.
    offset: what a norm adds to its weight before it multiplies by it (gemma's: 1).
    """

    producer: str
    readers: tuple[str, ...]
    channels: Tensor
    rows: Tensor | None = None
    offset: float = 0.0

    @property
    def count(self) -> int:
        """How many scales there are."""
        return int(self.channels.max()) + 1

    def __str__(self) -> str:
        return f"{self.producer} → {', '.join(self.readers)}"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertFold:
    """Dividing some outputs of one matrix of an expert by scales, and multiplying the inputs of its last matrix by them, changes nothing in
    what the expert computes.

    bank: the module's name in the block. producer, reader: the two matrices. rows: int64 [n], the producer's outputs that are divided, in
    the order of the reader's inputs.
    """

    bank: str
    producer: Product
    reader: Product
    rows: Tensor

    def __str__(self) -> str:
        return f"{self.bank}.{self.producer.parameter} → {self.bank}.{self.reader.parameter}"


@dataclass(frozen=True, slots=True)
class BlockFolds:
    """The folds of a block, and what has inputs that nothing before it can divide: Linears, banks, and the last matrices of experts."""

    folds: tuple[Fold, ...] = ()
    without: tuple[str, ...] = ()
    experts: tuple[ExpertFold, ...] = ()
