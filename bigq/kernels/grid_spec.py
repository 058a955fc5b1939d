"""What the grid of a group may be. Apart from ``grid``, which computes it, so that it can be named without torch."""

from __future__ import annotations

from dataclasses import dataclass

#: Significant bits of fp16, and the fewest that a scale may be rounded to.
SCALE_BITS = 11
FEWEST_SCALE_BITS = 7

#: The grid search sums errors to this power, as the paper's own code does.
MSE_POWER = 2.4


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
