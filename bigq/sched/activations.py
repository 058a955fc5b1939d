"""The hidden states of all calibration rows between two blocks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bigq.sched.capture import BlockCall


class ActivationStore:
    """Hidden states [N, T, d] in one buffer that outputs overwrite in place.

    Rows are replayed in batches of ``batch``, the last one possibly smaller; ``calls`` holds, by batch size, how each
    block is called. ``at`` is the first row of the batch that is being replayed.
    """

    def __init__(self, rows: int, seqlen: int, width: int, dtype: torch.dtype, batch: int, device: torch.device) -> None:
        self._buffer = torch.empty(rows, seqlen, width, dtype=dtype, device=device)
        self._batch = batch
        self.at = 0
        self.calls: dict[int, list[BlockCall]] = {}

    def spans(self) -> list[tuple[int, int]]:
        """The batches, as ranges of rows."""
        rows = self._buffer.shape[0]
        return [(lo, min(lo + self._batch, rows)) for lo in range(0, rows, self._batch)]

    def batches(self, block: int, device: torch.device) -> Iterator[tuple[int, Tensor, BlockCall]]:
        """(first row, hidden states on ``device``, the block's call) for every batch."""
        for lo, hi in self.spans():
            self.at = lo
            yield lo, self._buffer[lo:hi].to(device), self.calls[hi - lo][block]

    def put(self, lo: int, hidden: Tensor) -> None:
        """Overwrite the rows from ``lo`` on."""
        self._buffer[lo : lo + hidden.shape[0]] = hidden

    def rows(self, lo: int, hi: int) -> Tensor:
        return self._buffer[lo:hi]
