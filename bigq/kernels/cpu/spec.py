"""What the grid of a group may be, as numbers for compiled code."""

from __future__ import annotations

from typing import NamedTuple

from bigq.kernels.grid_spec import SCALE_BITS, GridSpec, smallest_scale


class Spec(NamedTuple):
    """A ``GridSpec``. drop: bits by which scales are narrower than fp16. parts: without those of the other side, so that their number, for
    which code is compiled, does not depend on the bits. book, bounds: empty for integers; of numbers that are rounded to floats,
    only the largest point and no bounds. smallest: what a scale becomes that is rounded to 0."""

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
    smallest: float


def spec_of(spec: GridSpec) -> Spec:
    drop, half = SCALE_BITS - spec.scale_bits, 1 << (spec.bits - 1)
    of_search = spec.search, spec.widest, spec.both_sides, spec.parts
    book, bounds = ((spec.largest,), ()) if spec.is_float else (spec.book, spec.bounds)
    smallest = smallest_scale(spec.scale_bits)
    return Spec(spec.max_code, half, spec.symmetric, spec.min_zero, drop, *of_search, book, bounds, spec.settles, smallest)
