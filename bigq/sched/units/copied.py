"""Tensors that are copied unquantized: those outside the blocks, and those that the model does not use but its loaders expect."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bigq.io.index import TensorInfo
from bigq.model.pager import Pager
from bigq.sched.shards import Product, Shard, ShardWriter
from bigq.sched.units.base import PlainUnit

#: The maximum size of a shard of copied tensors, in bytes. A larger tensor gets its own shard.
SHARD_BYTES = 5 * 10**9


class CopiedUnit(PlainUnit):
    """A shard of tensors that are copied in bounded pieces and checked for NaN and Inf."""

    doing, phase = "copying unquantized tensors", "copy"

    def __init__(self, number: int, tensors: Sequence[TensorInfo]) -> None:
        self._tensors = tensors
        self.shard = Shard(number=number, name=f"rest-{number}", sources=[info.name for info in tensors])

    def product(self, writer: ShardWriter) -> Product:
        return Product(tensors=[writer.stored(info.name) for info in self._tensors])

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self._tensors)


def copied_units(pager: Pager, quantized: Iterable[str]) -> list[CopiedUnit]:
    """Units for all tensors outside the blocks, in the checkpoint's order, without those that the output leaves out.

    quantized: names of tensors that belong to other units.
    """
    experts = {name for bank in pager.banks.values() for name in bank.stored(range(bank.experts))}
    elsewhere = pager.stored_under(pager.blocks_path) | experts | set(quantized) | set(pager.extras.dropped)
    shards: list[list[TensorInfo]] = []
    size = 0
    for name, info in pager.checkpoint.tensors.items():
        if name in elsewhere:
            continue
        if not shards or size + info.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(info)
        size += info.nbytes
    return [CopiedUnit(number, tensors) for number, tensors in enumerate(shards)]
