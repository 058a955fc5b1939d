"""What the survey of a job with ``bits_per_weight`` takes (see ``sched.mixing``). Pure functions."""

from __future__ import annotations

from collections.abc import Sequence

from bigq.kernels.pick import piece
from bigq.mixed.groups import Group
from bigq.mixed.loss import rows_of
from bigq.sched.plan.costs.bank import CHOICE, running_bytes
from bigq.sched.plan.shape import BankShape, BlockShape, LinearShape, ModelShape
from bigq.sched.plan.work import Choice, Work

#: Bytes per weight of the rows that are rounded at a time (``solver.rtn``).
ROUNDING = 25
#: Bytes moved per weight to round it.
MOVED = 16.0


def quantized_groups(groups: Sequence[Group], shape: ModelShape) -> tuple[Group, ...]:
    """Without Linears that stay unquantized in every job, such as those that choose experts."""
    names = set(shape.linear_names()) | ({shape.head.name} if shape.head is not None else set())
    return tuple(group for group in groups if group.experts or group.parts[0] in names)


def rounding_bytes(weights: int, choice: Choice) -> int:
    """Bytes while a Linear of so many weights is rounded: its codes, and what some rows need."""
    return weights + ROUNDING * min(weights, piece(on_gpu=choice.on_gpu))


def survey_bytes(shape: ModelShape, block: BlockShape, work: Work, choice: Choice) -> int:
    """Bytes on the computing device in addition to a block: its rounded weights, a forward, and the streams if they are there."""
    batch = min(choice.batch, rows_of(work.rows, shape.seqlen))
    largest = max((linear.m * linear.n for linear in block.linears), default=0)
    rounding = rounding_bytes(largest, choice) + shape.itemsize * largest
    needed = max(block.forward.at(batch), rounding, *(_bank_bytes(shape, bank, work, choice) for bank in block.banks))
    streams = stream_bytes(shape, work) if choice.tier == ("gpu" if choice.on_gpu else "host") else 0
    return _weights(block.linears) * shape.itemsize + block.calls.at(batch) + needed + streams


def stream_bytes(shape: ModelShape, work: Work) -> int:
    """Bytes of the hidden states of all streams."""
    return work.survey * _tokens(shape, work) * shape.width * shape.itemsize


def survey_flops(shape: ModelShape, block: BlockShape, work: Work) -> float:
    """Operations of all streams in a block."""
    tokens = _tokens(shape, work)
    experts = sum(bank.chosen * _weights(bank.linears) for bank in block.banks)
    return work.survey * (2.0 * tokens * (_weights(block.linears) + experts) + tokens / shape.seqlen * block.attention)


def survey_moved(block: BlockShape) -> float:
    """Bytes moved to round a block's weights once."""
    return MOVED * (_weights(block.linears) + sum(bank.experts * _weights(bank.linears) for bank in block.banks))


def _tokens(shape: ModelShape, work: Work) -> int:
    return rows_of(work.rows, shape.seqlen) * shape.seqlen


def _weights(linears: Sequence[LinearShape]) -> int:
    return sum(linear.m * linear.n for linear in linears)


def _bank_bytes(shape: ModelShape, bank: BankShape, work: Work, choice: Choice) -> int:
    """Inputs of a bank and sums of its outputs in all streams; an expert, what it is rounded to, and its forward."""
    tokens = _tokens(shape, work)
    rows = work.survey * tokens * (2 * bank.inputs * shape.width * shape.itemsize + CHOICE * bank.chosen)
    largest = max(sum(linear.m * linear.n for linear in product) for product in bank.products)
    running = max(running_bytes(bank, tokens, shape.itemsize), rounding_bytes(largest, choice) + shape.itemsize * largest)
    return rows + 2 * _weights(bank.linears) * shape.itemsize + running
