"""An allocator for regions of a fixed buffer. It handles offsets only and owns no memory."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

#: Offsets and sizes of regions are multiples of this, so a region can hold any dtype.
ALIGNMENT = 512


@dataclass(frozen=True, slots=True)
class Region:
    """Bytes [offset, offset + size) of one segment."""

    segment: int
    offset: int
    size: int


class Arena:
    """First-fit allocation in segments of the given sizes in bytes. A region is inside one segment.

    capacity: bytes of all segments. held: allocated bytes, where each region is rounded up to ``ALIGNMENT``.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        assert all(size > 0 and size % ALIGNMENT == 0 for size in sizes), f"segments of {sizes} bytes"
        self.capacity = sum(sizes)
        self.held = 0
        #: For each segment, the free extents (begin, end), ascending and merged.
        self._free = [[(0, size)] for size in sizes]
        self._allocated: set[Region] = set()

    def allocate(self, size: int) -> Region | None:
        """A region of ``size`` bytes, or None if no segment has that much contiguous space."""
        assert size > 0
        whole = _round_up(size)
        for segment, free in enumerate(self._free):
            for i, (begin, end) in enumerate(free):
                if end - begin >= whole:
                    free[i : i + 1] = [(begin + whole, end)] if end - begin > whole else []
                    self.held += whole
                    region = Region(segment, begin, size)
                    self._allocated.add(region)
                    return region
        return None

    def release(self, region: Region) -> None:
        """Free a region."""
        self._allocated.remove(region)
        free = self._free[region.segment]
        begin, end = region.offset, region.offset + _round_up(region.size)
        self.held -= end - begin
        i = bisect.bisect(free, (begin, end))
        first, last = i, i
        if i > 0 and free[i - 1][1] == begin:
            begin, first = free[i - 1][0], i - 1
        if i < len(free) and free[i][0] == end:
            end, last = free[i][1], i + 1
        free[first:last] = [(begin, end)]


def segments(budget: int, least: int, most: int) -> list[int]:
    """Segment sizes for a budget in bytes: powers of two from ``least`` to ``most``, descending, whose sum is at most the budget."""
    sizes = []
    while budget >= least:
        sizes.append(min(most, 1 << (budget.bit_length() - 1)))
        budget -= sizes[-1]
    return sizes


def _round_up(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
