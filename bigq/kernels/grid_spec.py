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

#: The grid search sums errors to this power, as the paper's own code does.
MSE_POWER = 2.4

#: The grid search of the GPTQ paper's code: the full range is shrunk by 1 % per step, down to 21 %.
MSE_STEPS = 80

#: The smallest fp16 number above 0.
FP16_TINY = 2.0**-24


@dataclass(frozen=True, slots=True, kw_only=True)
class GridSpec:
    """What the points ``scale · (code − zero)`` of a group may be; the fields mean what they mean in ``QuantScheme``."""

    bits: int
    symmetric: bool
    min_zero: int = 0
    mse: bool = False
    mse_power: float = MSE_POWER
    scale_bits: int = SCALE_BITS

    @property
    def max_code(self) -> int:
        return (1 << self.bits) - 1


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
