"""Pinned host memory in segments, since torch rounds every pinned allocation up to a power of two bytes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

#: Pinned memory is a multiple of this, in bytes. A power of two.
GRANULE = 2**20


class PinnedMemory:
    """``elements`` elements of pinned memory, uninitialized, in segments whose sizes in bytes are powers of two.

    In one piece, 7 GiB would take 8 GiB. Here less than GRANULE bytes are lost. torch keeps freed pinned memory for later allocations of
    the same size, and memory of any size has segments of the same few sizes.
    """

    def __init__(self, elements: int, dtype: torch.dtype) -> None:
        self._segments = [torch.empty(size // dtype.itemsize, dtype=dtype, pin_memory=True) for size in segments(elements * dtype.itemsize)]

    def pieces(self, lo: int, hi: int) -> Iterator[Tensor]:
        """Elements [lo, hi) in order, as one-dimensional views of segments."""
        start = 0
        for segment in self._segments:
            first, last = max(0, lo - start), min(len(segment), hi - start)
            if first < last:
                yield segment[first:last]
            start += len(segment)

    def whole_rows(self, width: int) -> Iterator[tuple[int, Tensor]]:
        """The memory as rows of ``width`` elements: (number of the first row, view [rows, width]) for those that lie in one segment."""
        start = 0
        for segment in self._segments:
            first, last = -(-start // width), (start + len(segment)) // width
            if first < last:
                yield first, segment[first * width - start : last * width - start].view(-1, width)
            start += len(segment)


def segments(size: int) -> list[int]:
    """Powers of two, largest first, whose sum is ``size`` bytes rounded up to a multiple of GRANULE."""
    granules = -(-size // GRANULE)
    return [GRANULE << bit for bit in reversed(range(granules.bit_length())) if granules >> bit & 1]
