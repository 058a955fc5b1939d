"""Solving Linears together with other ranks: each quantizes some rows of every weight. Given the factor, they are independent."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from bigq.errors import NumericsError
from bigq.machine.ranks import Ranks, share
from bigq.methods.base import Factor
from bigq.quantized_weight import QuantizedWeight
from bigq.scheme import QuantScheme


@contextlib.contextmanager
def failing_together(ranks: Ranks) -> Iterator[None]:
    """If what is done here fails in one rank, all raise the NumericsError of the first that has one: they go on, or not, in the same way.

    Factors of the same Hessian may differ between processors.
    """
    failure = None
    try:
        yield
    except NumericsError as error:
        if ranks.count == 1:
            raise
        failure = str(error)
    if (first := next(filter(None, ranks.everyone(failure)), None)) is not None:
        raise NumericsError(str(first))


def solve_shared(factor: Factor, weights: list[Tensor], scheme: QuantScheme, label: str, ranks: Ranks) -> list[QuantizedWeight]:
    """``factor.solve`` by all ranks, each of which gets the whole result. They all raise the NumericsError of the first that has one.

    Where scales of different rows are rounded together, or a weight has fewer rows than there are ranks, each rank solves all rows: their
    factors and inputs are the same.
    """
    if ranks.count == 1 or scheme.grid.settles or any(len(weight) < ranks.count for weight in weights):
        with failing_together(ranks):
            return factor.solve(weights, scheme, label)
    spans = [share(len(weight), ranks.index, ranks.count) for weight in weights]
    with failing_together(ranks):
        parts = factor.solve([weight[span.start : span.stop] for weight, span in zip(weights, spans, strict=True)], scheme, label)
    numbers = ranks.everyone([(part.loss, part.energy) for part in parts])
    found = []
    for i, (weight, part) in enumerate(zip(weights, parts, strict=True)):
        loss, energy = torch.tensor([each[i] for each in numbers], dtype=torch.float64).sum(0).tolist()  # type: ignore[index]
        codes, scales, zeros = (ranks.joined(tensor, len(weight)) for tensor in (part.codes, part.scales, part.zeros))
        found.append(dataclasses.replace(part, codes=codes, scales=scales, zeros=zeros, loss=loss, energy=energy))
    return found
