"""What the grid of a group may be, as numbers for compiled code."""

from __future__ import annotations

from typing import NamedTuple

from bigq.kernels.grid_spec import SCALE_BITS, GridSpec


class Spec(NamedTuple):
    """A ``GridSpec``. drop: bits by which scales are narrower than fp16. parts: without those of the other side, so that their number, for
    which code is compiled, does not depend on the bits. book, bounds: empty for integers."""

    top: int
    half: int
    symmetric: bool
    min_zero: int
    drop: int
    search: bool
    widest: int
    both_sides: bool
    parts: tuple[int, ...]
    book: tuple[float, ...]
    bounds: tuple[float, ...]
    settles: bool


def spec_of(spec: GridSpec) -> Spec:
    drop, half = SCALE_BITS - spec.scale_bits, 1 << (spec.bits - 1)
    of_search = spec.search, spec.widest, spec.both_sides, spec.parts
    return Spec(spec.max_code, half, spec.symmetric, spec.min_zero, drop, *of_search, spec.book, spec.bounds, spec.settles)
