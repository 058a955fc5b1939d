"""What calibration rows take throughout a job: hidden states, and what is kept beside them. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass

from bigq.sched.plan.shape import BlockShape, ModelShape
from bigq.sched.plan.work import Choice, Work
from bigq.sched.rows.tiers import WRITES_IN_FLIGHT


@dataclass(frozen=True, slots=True)
class RowBytes:
    """Bytes of the hidden states throughout the job."""

    device: int = 0
    host: int = 0
    disk: int = 0


def row_bytes(shape: ModelShape, work: Work, choice: Choice) -> RowBytes:
    token = work.streams * shape.seqlen * shape.itemsize
    row = token * shape.width
    memos = max((_memo_width(block) for block in shape.blocks), default=0) if choice.memo else 0
    beside = work.streams * shape.handed_on + shape.of_tokens
    kept = work.rows * (row + beside + token * memos)
    # The inputs of a bank and the sums of its outputs, elsewhere than on the computing device: there, ``bank_phases`` counts them.
    banks = 2 * work.rows * row * max((bank.inputs for block in shape.blocks for bank in block.banks), default=0)
    # Those in host memory are reused by the next block. Buffers of one width at a time: see ``LastInputs``.
    inputs = choice.kept_rows * token * max(map(last_width, shape.blocks), default=0) if choice.kept_tier == "host" else 0
    if choice.tier == "disk":
        # One batch in use, one prefetched, and those waiting to be written.
        return RowBytes(host=(3 + WRITES_IN_FLIGHT) * choice.batch * (row + beside), disk=kept + banks)
    if choice.tier == "host" and choice.on_gpu:
        return RowBytes(device=2 * choice.batch * (row + beside), host=kept + banks + inputs)
    return RowBytes(device=kept, host=inputs)


def _memo_width(block: BlockShape) -> int:
    """The maximum elements per token of a block's cached outputs, and of the inputs that they are computed from."""
    return sum(max(memo.m, memo.n) for memo in block.memos if not memo.last)


def last_width(block: BlockShape) -> int:
    """The elements per token of the inputs that are kept of a block's last Linears."""
    return sum(memo.n for memo in block.memos if memo.last)
