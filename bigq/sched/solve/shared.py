"""Solving Linears together with other ranks.

A large Hessian is factored by all together. Of a Linear, each rank quantizes some rows of the weight: given the factor, they are
independent. Of experts, whose matrices are small, each rank factors and solves some.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bigq.errors import NumericsError
from bigq.machine.ranks import Ranks, share
from bigq.methods.base import Factor
from bigq.quantized_weight import QuantizedWeight
from bigq.scheme import QuantScheme

#: Dtypes of the tensors of a quantized weight, by name.
_DTYPES = {str(dtype): dtype for dtype in (torch.uint8, torch.float16, torch.float32)}


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


def sharing_of(ranks: Ranks) -> Ranks | None:
    """With whom a factor is shared."""
    return ranks if ranks.count > 1 else None


def agreed(scales: Tensor, ranks: Ranks) -> Tensor:
    """The scales that the first rank has chosen: on another processor the same statistics may lead to others."""
    if ranks.count > 1:
        scales = scales.clone() if ranks.index == 0 else torch.zeros_like(scales)
        ranks.tensor_(scales)
    return scales


def solve_shared(factor: Factor, weights: list[Tensor], scheme: QuantScheme, label: str, ranks: Ranks) -> list[QuantizedWeight]:
    """``factor.solve`` by all ranks, each of which gets the whole result. They all raise the NumericsError of the first that has one.

    Where scales of different rows are rounded together, or a weight has fewer rows than there are ranks, each rank solves all rows: their
    factors and inputs are the same.
    """
    if not are_dealt(scheme, ranks) or any(len(weight) < ranks.count for weight in weights):
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


def dealt(count: int, scheme: QuantScheme, ranks: Ranks) -> range:
    """Which of so many experts this rank solves, perhaps none."""
    return share(count, ranks.index, ranks.count) if are_dealt(scheme, ranks) else range(count)


def are_dealt(scheme: QuantScheme, ranks: Ranks) -> bool:
    """Whether ranks solve different rows or experts. Where a weight is more than its codes, scales and zero points, each solves all."""
    return ranks.count > 1 and not scheme.grid.settles


def gathered(
    mine: list[list[QuantizedWeight] | NumericsError], count: int, scheme: QuantScheme, device: torch.device, ranks: Ranks
) -> list[list[QuantizedWeight] | NumericsError]:
    """The results of all ``count`` experts, whose weights have equal shapes, from those that each rank was dealt and has solved."""
    if not are_dealt(scheme, ranks):
        return mine
    said: Any = ranks.everyone([str(each) if isinstance(each, NumericsError) else [_outline(part) for part in each] for each in mine])
    outlines = [each for of_rank in said for each in of_rank]
    pattern = next((each for each in outlines if not isinstance(each, str)), None)
    results: list[list[QuantizedWeight]] = [[] for _ in outlines]
    for i, one in enumerate(pattern or ()):
        tensors: dict[str, Tensor] = {}
        for name, (shape, dtype) in one["tensors"].items():
            stack = torch.zeros(len(mine), *shape, dtype=_DTYPES[dtype], device=device)
            for to, each in zip(stack, mine, strict=True):
                if not isinstance(each, NumericsError):
                    to.copy_(getattr(each[i], name))
            tensors[name] = ranks.joined(stack, count)
        for e, (outline, found) in enumerate(zip(outlines, results, strict=True)):
            if not isinstance(outline, str):
                parts: dict[str, Any] = {name: of_all[e] for name, of_all in tensors.items()}
                found.append(QuantizedWeight(**parts, scheme=scheme, **outline[i]["numbers"]))
    return [NumericsError(said) if isinstance(said, str) else found for said, found in zip(outlines, results, strict=True)]


def _outline(weight: QuantizedWeight) -> dict[str, Any]:
    """A quantized weight without its scheme and tensors, of which there are shapes and dtypes."""
    assert weight.nested is None, "such weights are solved by all ranks"
    tensors = {"codes": weight.codes, "scales": weight.scales, "zeros": weight.zeros}
    return {
        "tensors": {name: (list(tensor.shape), str(tensor.dtype)) for name, tensor in tensors.items()},
        "numbers": {"loss": weight.loss, "energy": weight.energy, "damping": weight.damping, "dead_inputs": weight.dead_inputs},
    }
