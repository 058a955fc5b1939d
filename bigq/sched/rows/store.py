"""The hidden states of all calibration rows between two blocks, and passes over them.

A pass takes the rows in batches. Where the device runs out of memory the batch is halved and the pass goes on: from its beginning
if it leaves the rows as they are, and from the batch that failed if it overwrites them, so that no row is overwritten twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from bigq import faults
from bigq.job.batches import Batches
from bigq.machine.device import free_memory, out_of_memory
from bigq.model.capture import BlockCall
from bigq.sched.rows.tiers import RowBuffer, Tier

T = TypeVar("T")


class ActivationStore:
    """Hidden states [N, T, d] in one buffer of a tier that outputs overwrite in place.

    batches: how many rows are replayed at once, by place; the last batch of a pass may be smaller. batch: that of the pass under
    way. at: the rows [lo, hi) of the batch that is being replayed.
    record: batch size → how each block is called; asked once per size, as masks and ALiBi depend on it.
    pause: called before every batch; may raise to end the pass. passing: told how far a pass is, as ("rows", done, of).
    """

    def __init__(
        self, shape: tuple[int, int, int], dtype: torch.dtype, batches: Batches, tier: Tier, record: Callable[[int], list[BlockCall]]
    ) -> None:
        self._tier, self._batches, self._record = tier, batches, record
        self.shape, self.dtype = shape, dtype
        self._count, *row = shape
        self._row = tuple(row)
        self._buffer = self.buffer(row[0] * row[1], dtype)
        self.before_batch: Callable[[], None] = lambda: None
        self.on_progress: Callable[[str, int, int], None] = lambda what, done, of: None
        self.batch = batches.at(0, 0)
        self.at = (0, 0)
        self.calls: dict[int, list[BlockCall]] = {}

    @property
    def device(self) -> torch.device:
        """Where batches are computed with."""
        return self._tier.device

    def empty_like(self) -> ActivationStore:
        """Room for other hidden states of the same rows; what blocks are called with is recorded once for both."""
        store = ActivationStore(self.shape, self.dtype, self._batches, self._tier, self._record)
        store.calls = self.calls
        return store

    def align_with(self, other: ActivationStore) -> None:
        """Be at the batch that another store of as many rows is at."""
        self._set_batch(other.batch)
        self.at = other.at

    def copy_from(self, other: ActivationStore) -> None:
        """Hold what another store of this shape holds."""
        for lo, hi in other.spans():
            self.put(lo, other.rows(lo, hi))

    def buffer(self, elements: int, dtype: torch.dtype) -> RowBuffer:
        """Room for something else that has so many elements for every row, in the same tier."""
        return self._tier.buffer(self._count, elements, dtype)

    def read_pass(self, block: int, step: int, run: Callable[[], T]) -> T:
        """What ``run`` returns, which makes a pass that leaves the rows as they are; run again with half the batch where memory ends.

        block, step: see ``Halving``.
        """
        while True:
            self._set_batch(self._batches.at(block, step))
            try:
                return run()
            except RuntimeError as error:
                if self.batch == 1 or not out_of_memory(error):
                    raise
            self._halve(block, step, 0)

    def update_pass(self, block: int, step: int, run: Callable[[int, int], None]) -> None:
        """Call ``run(lo, hi)`` for one batch after the other; with half of a batch where memory ends, and with smaller ones from there.

        ``run`` may overwrite its rows, and must do so last. block, step: see ``Halving``.
        """
        lo = 0
        while lo < self._count:
            self._set_batch(self._batches.at(block, step, lo))
            self.at = lo, min(lo + self.batch, self._count)
            try:
                self._begin_batch()
                run(*self.at)
            except RuntimeError as error:
                if self.batch == 1 or not out_of_memory(error):
                    raise
            else:
                lo = self.at[1]
                continue
            self._halve(block, step, lo)
        self.on_progress("rows", self._count, self._count)

    def _set_batch(self, batch: int) -> None:
        if batch != self.batch:
            self.batch = batch
            for size in [size for size in self.calls if size > batch]:
                del self.calls[size]

    def _halve(self, block: int, step: int, row: int) -> None:
        """To be called when the error is forgotten: what its traceback holds would stay in memory."""
        free_memory(self._tier.device)
        self._batches.halve(block, step, row)

    def spans(self) -> list[tuple[int, int]]:
        """The batches of a pass, as ranges of rows."""
        return [(lo, min(lo + self.batch, self._count)) for lo in range(0, self._count, self.batch)]

    def batches(self, block: int) -> Iterator[tuple[Tensor, BlockCall]]:
        """(hidden states, the block's call) for every batch of a pass."""
        for lo, hi in self.spans():
            self.at = lo, hi
            self._begin_batch()
            yield self.fetch(lo, hi), self.call(block, hi - lo)
        self.on_progress("rows", self._count, self._count)

    def _begin_batch(self) -> None:
        self.before_batch()
        self.on_progress("rows", self.at[0], self._count)
        faults.point("batch.begun")

    def call(self, block: int, size: int) -> BlockCall:
        """How a block is called with a batch of so many rows."""
        if size not in self.calls:
            self.calls[size] = self._record(size)
        return self.calls[size][block]

    def fetch(self, lo: int, hi: int) -> Tensor:
        """Hidden states of a batch; the next one is read meanwhile."""
        hidden = self.rows(lo, hi)
        if hi < self._count:
            self._buffer.prefetch(hi, min(hi + self.batch, self._count))
        return hidden

    def put(self, lo: int, hidden: Tensor) -> None:
        """Overwrite the rows from ``lo`` on."""
        self._buffer.put(lo, hidden)

    def rows(self, lo: int, hi: int) -> Tensor:
        """Hidden states [hi − lo, T, d] on the tier's device."""
        return self._buffer.get(lo, hi).view(hi - lo, *self._row)

    def close(self) -> None:
        """Give up the buffer."""
        self._buffer.close()
