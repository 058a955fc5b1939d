"""The memory and arithmetic of rotating weights as they are read (``bigq.model.rotation.weights``)."""

from __future__ import annotations

from bigq.model.rotation.matrices import factors
from bigq.model.rotation.weights import PIECE
from bigq.sched.plan.shape import BlockShape, ModelShape

#: Buffers of the size of a piece, in fp32: the piece, with its signs, and before and after a factor.
COPIES = 4
FP32 = 4


def piece_bytes(numbers: int) -> int:
    """Bytes for rotating a matrix of so many numbers, besides what it is made of and what it becomes."""
    return COPIES * FP32 * min(PIECE, numbers)


def block_bytes(block: BlockShape) -> int:
    """Bytes for rotating the largest Linear of a block, with what it is made of."""
    return block.largest_stored + piece_bytes(max((linear.m * linear.n for linear in block.linears), default=0))


def block_flops(block: BlockShape, width: int) -> float:
    """Operations of rotating the Linears of a block. width: of the stream."""
    return 2.0 * sum(linear.m * linear.n for linear in block.linears) * sum(rows for _, rows in factors(width))


def outside_flops(shape: ModelShape) -> float:
    """Operations of rotating the embedding and the head."""
    return 4.0 * shape.vocabulary * shape.width * sum(rows for _, rows in factors(shape.width))
