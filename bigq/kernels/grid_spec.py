"""What the grid of a group may be. Apart from ``grid``, which computes it, so that it can be named without torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

#: Significant bits of fp16, and the fewest that a scale may be rounded to.
SCALE_BITS = 11
FEWEST_SCALE_BITS = 7

#: The smallest scale that a search by squared error tries, in hundredths of the one that spans the group's weights.
SMALLEST_TRIED = 21

#: What a search by the loss in a group tries, in the same unit, and the steps by which it then moves from the best one.
SOLVED = (100, 92, 84, 108, 76, 116, 68, 124, 60, 52, 44)
REFINED = (4, 2)

#: The smallest fp16 number above 0.
FP16_TINY = 2.0**-24


@dataclass(frozen=True, slots=True, kw_only=True)
class GridSpec:
    """What the points ``scale · (code − zero)`` of a group may be; the fields mean what they mean in ``QuantScheme``.

    search: the grid is the best of several: by the loss that GPTQ reaches in the group where the column loop finds it, else by squared
        error. Otherwise it spans the group's weights.
    """

    bits: int
    symmetric: bool
    min_zero: int = 0
    search: bool = False
    scale_bits: int = SCALE_BITS

    @property
    def max_code(self) -> int:
        return (1 << self.bits) - 1

    @property
    def widest(self) -> int:
        """The widest range that a search by squared error tries, in hundredths of the one that spans the group's weights.

        A symmetric grid has ``2^(bits−1)`` steps on one side of 0 and one fewer on the other. A search puts the longer side where the
        largest weight is; its scale is negative if that weight is positive. At 100, ±reach in ``max_code`` steps, a weight as large on
        the other side is half a step off. It is a point of the widest grid; the largest weight is one at 100 · (1 − 2^−bits).
        """
        return -(-100 * self.max_code // (self.max_code - 1)) if self.symmetric else 100

    @property
    def both_sides(self) -> bool:
        """Whether a search also tries to put the longer side where the largest weight is not. At 2 bits, with one step on the other side,
        KL fell by 2 to 10 % in every run; at 3 and 4 bits the changes had both signs, and the search takes twice as long."""
        return self.symmetric and self.bits == 2

    @property
    def tried(self) -> tuple[int, ...]:
        """The ranges that a search by squared error tries, the widest first; negative ones have the other side longer."""
        parts = tuple(range(self.widest, SMALLEST_TRIED - 1, -1))
        return (*parts, *(-part for part in parts)) if self.both_sides else parts

    @property
    def parts(self) -> tuple[int, ...]:
        """The ranges that a search by the loss in a group tries. Errors of a group's first columns widen its last ones.

        It begins on either side of the likely best one, so that others are soon seen to be worse. Then come those ± each of ``REFINED``
        around the best one of each row.
        """
        return *SOLVED, max(132, self.widest)

    @property
    def solved(self) -> tuple[int, ...]:
        """The same with those that have the other side longer, which are negative."""
        return (*self.parts, *(-part for part in self.parts)) if self.both_sides else self.parts


@dataclass(frozen=True, slots=True)
class GroupGrid:
    """Scales and zero points of the groups of k columns.

    scale, zero: [..., g, m] in the working dtype. group: int32 [..., k], the group of each column.
    find: scale and zero are not known yet. The kernel finds them from the corrected weights when it reaches a group's first
        column; groups must then be consecutive runs of k / g columns.
    """

    spec: GridSpec
    scale: Tensor
    zero: Tensor
    group: Tensor
    find: bool

    def each(self) -> Iterator[GroupGrid]:
        """The grid of each matrix of a batch."""
        for scale, zero, group in zip(self.scale, self.zero, self.group, strict=True):
            yield GroupGrid(self.spec, scale, zero, group, self.find)
