"""The hidden states of all calibration rows between two blocks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bigq.sched.capture import BlockCall
from bigq.sched.tiers import RowBuffer, Tier


class ActivationStore:
    """Hidden states [N, T, d] in one buffer of a tier that outputs overwrite in place.

    Rows are replayed in batches of ``batch``, the last one possibly smaller; ``calls`` holds, by batch size, how each
    block is called. ``at`` are the rows [lo, hi) of the batch that is being replayed.
    """

    def __init__(self, rows: int, seqlen: int, width: int, dtype: torch.dtype, batch: int, tier: Tier) -> None:
        self._tier = tier
        self._count = rows
        self._buffer = self.buffer(seqlen * width, dtype)
        self._shape = (seqlen, width)
        self._batch = batch
        self.at = (0, 0)
        self.calls: dict[int, list[BlockCall]] = {}

    def buffer(self, elements: int, dtype: torch.dtype) -> RowBuffer:
        """Room for something else that has so many elements for every row, in the same tier."""
        return self._tier.buffer(self._count, elements, dtype)

    def spans(self) -> list[tuple[int, int]]:
        """The batches, as ranges of rows."""
        return [(lo, min(lo + self._batch, self._count)) for lo in range(0, self._count, self._batch)]

    def batches(self, block: int) -> Iterator[tuple[int, Tensor, BlockCall]]:
        """(first row, hidden states on the tier's device, the block's call) for every batch."""
        spans = self.spans()
        for i, (lo, hi) in enumerate(spans):
            self.at = lo, hi
            hidden = self.rows(lo, hi)
            if i + 1 < len(spans):
                self._buffer.ahead(*spans[i + 1])
            yield lo, hidden, self.calls[hi - lo][block]

    def put(self, lo: int, hidden: Tensor) -> None:
        """Overwrite the rows from ``lo`` on."""
        self._buffer.put(lo, hidden)

    def rows(self, lo: int, hi: int) -> Tensor:
        """Hidden states [hi − lo, T, d] on the tier's device."""
        return self._buffer.get(lo, hi).view(hi - lo, *self._shape)

    def close(self) -> None:
        """Give up the buffer."""
        self._buffer.close()
