"""The Linears of a job whose bits are chosen together, and what they store at each number of bits. Pure functions of names and shapes.

Bits per weight count what is stored for quantized Linears: codes, scales and zero points, padding of packed words included. Not counted
are a format's notes on shapes and on the order of groups, which hold no values.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import torch

from bigq.errors import UsageError
from bigq.io.formats.base import Format, PackedLinear
from bigq.io.formats.fused import FusedLinear, fused_linears
from bigq.scheme import BITS, QuantScheme

#: Suffixes of stored tensors that are not counted.
NOTES = ("g_idx", "weight_g_idx", "weight_shape")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A Linear, or a matrix of an expert: its module name, m outputs, n inputs; dtype: of its weight in the checkpoint.

    scheme: by the settings of the job, without a choice. chosen: whether its bits may be chosen: no rule decides it.
    bits: the numbers of bits that the format takes for it.
    """

    name: str
    m: int
    n: int
    dtype: torch.dtype
    scheme: QuantScheme
    chosen: bool
    bits: tuple[int, ...] = BITS


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Parts that get the same bits, since readers load them as one.

    name: of the Linear, the fused Linear or the bank. experts: whether it is a bank. weights: of all parts.
    sizes: stored bits of all parts by bits per code; one entry where the bits are not chosen.
    """

    name: str
    parts: tuple[str, ...]
    experts: bool
    weights: int
    sizes: Mapping[int, int] = field(hash=False)

    @property
    def fixed(self) -> bool:
        return len(self.sizes) == 1


def stored_bits(made: Format, part: Part, bits: int) -> int:
    """What the codes, scales and zero points of a Linear take in a format, in bits."""
    linear = PackedLinear(bits=bits, outputs=part.m, inputs=part.n, groups=part.n // part.scheme.group_width(part.n))
    stored = made.layout(part.name, linear, part.scheme.symmetric, part.dtype)
    return sum(8 * dtype.itemsize * math.prod(shape) for name, (dtype, shape) in stored.items() if made.split(name)[1] not in NOTES)


def groups_of(parts: Sequence[Part], made: Format) -> tuple[Group, ...]:
    """The groups of a job's Linears, in their order. parts: without those that stay unquantized.

    Raises UsageError if the parts of a group have no number of bits in common.
    """
    by_name = {part.name: part for part in parts}
    fused = {name: whole for whole in fused_linears(by_name) for name in whole.parts}
    together: dict[str, list[Part]] = {}
    for part in parts:
        together.setdefault(fused[part.name].name if part.name in fused else part.name, []).append(part)
    return tuple(_group(name, members, fused.get(members[0].name), made) for name, members in together.items())


def _group(name: str, parts: Sequence[Part], fused: FusedLinear | None, made: Format) -> Group:
    chosen = all(part.chosen for part in parts)
    bits = [b for b in BITS if all(b in part.bits for part in parts)] if chosen else [parts[0].scheme.bits]
    if not bits:
        raise UsageError(f"--bits-per-weight: no number of bits fits {name}; leave it unquantized with --skip")
    # Experts are many and alike.
    kinds: dict[Part, int] = {}
    for part in parts:
        kind = dataclasses.replace(part, name="")
        kinds[kind] = kinds.get(kind, 0) + 1
    return Group(
        name=name,
        parts=tuple(part.name for part in parts),
        experts=fused is not None and fused.experts,
        weights=sum(part.m * part.n for part in parts),
        sizes={b: sum(count * stored_bits(made, kind, b) for kind, count in kinds.items()) for b in bits},
    )


def capacity(groups: Iterable[Group], budget: float) -> int:
    """The most bits that all groups may store together. The budget is taken as the decimal number that was given."""
    return math.floor(Fraction(str(budget)) * sum(group.weights for group in groups))


def require_budget(groups: Sequence[Group], budget: float) -> None:
    """Raise UsageError if the budget is below what all groups store at their least bits, or if there is nothing to choose."""
    if all(group.fixed for group in groups):
        raise UsageError("--bits-per-weight: no effect, since the bits of no Linear are left to choose; leave it out")
    weights = sum(group.weights for group in groups)
    least = sum(min(group.sizes.values()) for group in groups)
    if least > capacity(groups, budget):
        few = math.ceil(Fraction(1000 * least, weights)) / 1000
        raise UsageError(
            f"--bits-per-weight {budget:g}: at the fewest bits that the format takes, codes, scales and zero points are {few:g} bits per "
            f"weight; use --bits-per-weight {few:g} or more, or a larger --group-size"
        )


def reached(groups: Iterable[Group], bits_of: Callable[[Group], int]) -> float:
    """Bits per weight of a choice."""
    groups = list(groups)
    return sum(group.sizes[bits_of(group)] for group in groups) / sum(group.weights for group in groups)
