"""Who has which bytes of a bounded buffer: pure bookkeeping, in offsets.

Knows nothing of what the bytes are or how they come to be.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

#: Regions begin at multiples of this and take up whole multiples, so any dtype can lie at their beginning.
ALIGNMENT = 512


@dataclass(frozen=True, slots=True)
class Region:
    """Bytes [offset, offset + size) of one segment."""

    segment: int
    offset: int
    size: int


class Arena:
    """First fit over segments of given sizes in bytes; a region lies within one segment.

    capacity: bytes of all segments. held: bytes of the regions given out, rounded up to ``ALIGNMENT``.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        assert all(size > 0 and size % ALIGNMENT == 0 for size in sizes), f"segments of {sizes} bytes"
        self.capacity = sum(sizes)
        self.held = 0
        #: By segment, the free extents (begin, end), ascending; no two touch.
        self._free = [[(0, size)] for size in sizes]
        self._out: set[Region] = set()

    def allocate(self, size: int) -> Region | None:
        """So many bytes in one piece, or None while there are none."""
        assert size > 0
        whole = _rounded(size)
        for segment, free in enumerate(self._free):
            for i, (begin, end) in enumerate(free):
                if end - begin >= whole:
                    free[i : i + 1] = [(begin + whole, end)] if end - begin > whole else []
                    self.held += whole
                    region = Region(segment, begin, size)
                    self._out.add(region)
                    return region
        return None

    def release(self, region: Region) -> None:
        """The bytes of a region may be given out again."""
        self._out.remove(region)
        free = self._free[region.segment]
        begin, end = region.offset, region.offset + _rounded(region.size)
        self.held -= end - begin
        i = bisect.bisect(free, (begin, end))
        first, last = i, i
        if i > 0 and free[i - 1][1] == begin:
            begin, first = free[i - 1][0], i - 1
        if i < len(free) and free[i][0] == end:
            end, last = free[i][1], i + 1
        free[first:last] = [(begin, end)]


def segments(budget: int, least: int, most: int) -> list[int]:
    """Powers of two between least and most (themselves such), largest first, that together come close to a budget in bytes."""
    sizes = []
    while budget >= least:
        sizes.append(min(most, 1 << (budget.bit_length() - 1)))
        budget -= sizes[-1]
    return sizes


def _rounded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
