"""What several processes that share a job change in the cost of one of them: its share of rows and experts, and buffers.

The terms follow ``solve.shared`` and ``machine.process_group``. Pure functions.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

from bigq.kernels.cholesky import SHARED_FROM, panel_width
from bigq.machine.ranks import PIECE, bands
from bigq.sched.plan.shape import LinearShape
from bigq.sched.plan.sharing import Sharing
from bigq.scheme import QuantScheme

#: Bytes of a scale and of a zero point.
SCALE, ZERO = 2, 1
FP32 = 4


def summing_bytes(n: int, sharing: Sharing, *, square: bool = False) -> int:
    """Bytes while the triangle of a matrix [n, n] of fp32 numbers, or the whole square, is added up over processes: what is sent, what is
    received, and the library's copy of it."""
    if sharing.ranks == 1:
        return 0
    elements = min(n * n, PIECE) if square else max((hi - lo) * (n - lo) for lo, hi in bands(n))
    return FP32 * sharing.part(elements) * (3 * sharing.ranks + 1)


def dealing_bytes(count: int, n: int, sharing: Sharing) -> int:
    """Bytes while the triangles of so many matrices [n, n] are added up, each for the process that goes on with it."""
    if sharing.ranks == 1:
        return 0
    elements = max((hi - lo) * (n - lo) for lo, hi in bands(n, count))
    return FP32 * elements * (count + sharing.part(count) * (2 * sharing.ranks + 1))


def is_shared(n: int, sharing: Sharing) -> bool:
    """Whether processes share the factorization of a Hessian [n, n]."""
    return sharing.ranks > 1 and n >= SHARED_FROM


def factor_flops(n: int, sharing: Sharing, *, on_gpu: bool) -> float:
    """Operations of one process. The corners of panels are factored by all."""
    whole = float(n) ** 3 / 3
    return whole / sharing.ranks + n * panel_width(on_gpu=on_gpu) ** 2 / 3 if is_shared(n, sharing) else whole


def panel_bytes(n: int, sharing: Sharing, *, on_gpu: bool) -> int:
    """Bytes of a panel while its rows are joined."""
    return 3 * FP32 * n * panel_width(on_gpu=on_gpu) if is_shared(n, sharing) else 0


def solved_together(linears: Sequence[LinearShape], schemes: Mapping[str, QuantScheme]) -> Iterator[tuple[QuantScheme, list[LinearShape]]]:
    """Linears of one input by their scheme: those of one scheme are solved together."""
    for scheme in dict.fromkeys(schemes[linear.name] for linear in linears):
        yield scheme, [linear for linear in linears if schemes[linear.name] == scheme]


def by_rows(linears: Sequence[LinearShape], scheme: QuantScheme, sharing: Sharing) -> bool:
    """Whether each process solves some rows of Linears that are solved together."""
    return sharing.ranks > 1 and not scheme.grid.settles and all(linear.m >= sharing.ranks for linear in linears)


def own_rows(linears: Sequence[LinearShape], schemes: Mapping[str, QuantScheme], sharing: Sharing) -> list[LinearShape]:
    """The Linears of one input, each with the rows of it that one process solves."""
    return [
        dataclasses.replace(linear, m=sharing.part(linear.m)) if by_rows(alike, scheme, sharing) else linear
        for scheme, alike in solved_together(linears, schemes)
        for linear in alike
    ]


def result_bytes(linear: LinearShape, scheme: QuantScheme) -> int:
    """Bytes of a row of what a Linear becomes: codes, scales and zero points."""
    return linear.n + (SCALE + ZERO) * (linear.n // scheme.group_width(linear.n))


def joining_bytes(linears: Sequence[LinearShape], schemes: Mapping[str, QuantScheme], sharing: Sharing) -> int:
    """Bytes while the rows of Linears of one input are joined: what this process has of each, the results, and the largest once more."""
    most = 0
    for scheme, alike in solved_together(linears, schemes):
        if by_rows(alike, scheme, sharing):
            own = [sharing.part(linear.m) * result_bytes(linear, scheme) for linear in alike]
            most = max(most, sum(own) + sum(linear.m * result_bytes(linear, scheme) for linear in alike) + (sharing.ranks + 1) * max(own))
    return most


def are_dealt(schemes: Sequence[QuantScheme], sharing: Sharing) -> bool:
    """Whether each process solves some of a bank's experts only."""
    return sharing.ranks > 1 and not any(scheme.grid.settles for scheme in schemes)


def dealt(at_once: int, sharing: Sharing, schemes: Sequence[QuantScheme]) -> int:
    """The most of so many experts that one process solves."""
    return sharing.part(at_once) if are_dealt(schemes, sharing) else at_once


def batches(experts: int, group: int, at_once: int) -> list[int]:
    """How many experts each batch of a bank has. group: of one shard, beyond which no batch goes."""
    groups = [min(group, experts - first) for first in range(0, experts, group)]
    return list(itertools.chain.from_iterable([min(at_once, size - first) for first in range(0, size, at_once)] for size in groups))


def gathering_bytes(linears: Sequence[LinearShape], schemes: Mapping[str, QuantScheme], at_once: int, own: int, sharing: Sharing) -> int:
    """Bytes while the results of experts are joined, ``own`` of ``at_once`` of which this process has solved."""
    if not are_dealt([schemes[linear.name] for linear in linears], sharing):
        return 0
    sizes = [linear.m * result_bytes(linear, schemes[linear.name]) for linear in linears]
    return (own + at_once) * sum(sizes) + 2 * (own + own * sharing.ranks) * max(sizes)
