"""The hidden states of all calibration rows between two blocks, and passes over them.

A pass takes the rows in batches. Where the device runs out of memory, what can be computed again is dropped, or else the batch is
halved. A read pass then restarts. An update pass, which overwrites the rows, continues with the batch that failed, so that no row goes
through a block twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from bigq import faults
from bigq.job.batches import Batches
from bigq.machine.device import free_memory, out_of_memory
from bigq.model.forward.block_call import BlockCall, HandedOn, OfTokens
from bigq.sched.rows.row_values import HandedOnRows, TokenArguments
from bigq.sched.rows.tiers import RowBuffer, Tier

T = TypeVar("T")


class Spare(Protocol):
    """Memory that is held only to save time."""

    @property
    def held(self) -> bool:
        """Whether there is any to free."""

    def drop(self) -> None:
        """Free it, and hold no more."""


class ActivationStore:
    """Hidden states [N, T, d], or [N, T, s, d] with s vectors a token, in one buffer of a tier. A block's outputs overwrite its inputs.

    batches: the batch size by place; the last batch of a pass may be smaller. batch: the batch size of the current pass.
    at: the rows [lo, hi) of the current batch.
    record: batch size → the call of each block; called once per size, since masks and ALiBi depend on it. arguments: what it leaves open,
    because it is computed from each row's tokens. handed_on: what the last block hands on besides hidden states.
    before_batch: called before every batch; may raise to end the pass. on_progress: called with ("rows", done, total).
    spare: is dropped before a batch is halved, since it does not change any result.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        batches: Batches,
        tier: Tier,
        record: Callable[[int], list[BlockCall]],
        arguments: TokenArguments | None = None,
    ) -> None:
        self._tier, self._batches, self._record, self._arguments = tier, batches, record, arguments
        self.shape, self.dtype = shape, dtype
        self._count, *row = shape
        self._row = tuple(row)
        self._buffer = self.buffer(math.prod(row), dtype)
        self.handed_on = HandedOnRows(tier, self._count)
        self.before_batch: Callable[[], None] = lambda: None
        self.on_progress: Callable[[str, int, int], None] = lambda what, done, of: None
        self.spare: Spare | None = None
        self.batch = batches.at(0, 0)
        self.at = (0, 0)
        self.calls: dict[int, list[BlockCall]] = {}

    @property
    def device(self) -> torch.device:
        """The device that computes batches."""
        return self._tier.device

    @property
    def nbytes(self) -> int:
        """Bytes of what a checkpoint holds: the hidden states and what is handed on besides."""
        return math.prod(self.shape) * self.dtype.itemsize + self.handed_on.nbytes

    def empty_like(self) -> ActivationStore:
        """An uninitialized store for other hidden states of the same rows. Both share the recorded block calls."""
        store = ActivationStore(self.shape, self.dtype, self._batches, self._tier, self._record, self._arguments)
        store.calls = self.calls
        return store

    def align_with(self, other: ActivationStore) -> None:
        """Move to the batch of rows that another store with the same number of rows is at."""
        self._set_batch(other.batch)
        self.at = other.at

    def copy_from(self, other: ActivationStore) -> None:
        """Overwrite all rows with those of another store of this shape."""
        for lo, hi in other.spans():
            self.put(lo, other.rows(lo, hi))

    def buffer(self, elements: int, dtype: torch.dtype) -> RowBuffer:
        """A buffer of ``elements`` per row in the same tier."""
        return self._tier.buffer(self._count, elements, dtype)

    def token_buffer(self, tokens: int, elements: int, dtype: torch.dtype) -> RowBuffer:
        """A buffer of ``elements`` per token in the same tier."""
        return self._tier.buffer(tokens, elements, dtype)

    def read_pass(self, block: int, step: int, run: Callable[[], T]) -> T:
        """Call ``run``, which makes a whole pass without changing the rows, and return its result.

        Where the device runs out of memory, ``run`` is called again, perhaps with half the batch. block, step: see ``Halving``.
        """
        while True:
            self._set_batch(self._batches.at(block, step))
            try:
                return run()
            except RuntimeError as error:
                if not self._can_make_room(error):
                    raise
            self._make_room(block, step, 0)

    def update_pass(self, block: int, step: int, run: Callable[[int, int], None]) -> None:
        """Call ``run(lo, hi)`` for each batch; where the device runs out of memory, again for it or its first half, and so on from there.

        ``run`` may overwrite its rows, as its last step. block, step: see ``Halving``.
        """
        lo = 0
        while lo < self._count:
            self._set_batch(self._batches.at(block, step, lo))
            self.at = lo, min(lo + self.batch, self._count)
            try:
                self._begin_batch()
                run(*self.at)
            except RuntimeError as error:
                if not self._can_make_room(error):
                    raise
            else:
                lo = self.at[1]
                continue
            self._make_room(block, step, lo)
        self.on_progress("rows", self._count, self._count)

    def _set_batch(self, batch: int) -> None:
        if batch != self.batch:
            self.batch = batch
            for size in [size for size in self.calls if size > batch]:
                del self.calls[size]

    def _can_make_room(self, error: RuntimeError) -> bool:
        return out_of_memory(error) and (self.batch > 1 or (self.spare is not None and self.spare.held))

    def _make_room(self, block: int, step: int, row: int) -> None:
        """Call it outside the except clause: the error's traceback keeps tensors in memory."""
        if self.spare is not None and self.spare.held:
            self.spare.drop()
            free_memory(self._tier.device)
            return
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
            yield self.fetch(lo, hi), self.call(block, lo, hi)
        self.on_progress("rows", self._count, self._count)

    def _begin_batch(self) -> None:
        self.before_batch()
        self.on_progress("rows", self.at[0], self._count)
        faults.point("batch.begun")

    def call(self, block: int, lo: int, hi: int) -> BlockCall:
        """The block's call for the batch of rows [lo, hi)."""
        if hi - lo not in self.calls:
            self.calls[hi - lo] = self._record(hi - lo)

        def value(leaf: HandedOn | OfTokens) -> Tensor:
            if isinstance(leaf, HandedOn):
                return self.handed_on.held[leaf.index].get(lo, hi)
            assert self._arguments is not None
            return self._arguments.get(block, leaf.place, lo, hi)

        return self.calls[hi - lo][block].filled(value)

    def fetch(self, lo: int, hi: int) -> Tensor:
        """Hidden states [hi − lo, T, d] of a batch. Prefetches the next one."""
        hidden = self.rows(lo, hi)
        if hi < self._count:
            self._buffer.prefetch(hi, min(hi + self.batch, self._count))
        return hidden

    def put(self, lo: int, hidden: Tensor) -> None:
        """Overwrite rows, starting at ``lo``, with hidden states [k, T, d]."""
        self._buffer.put(lo, hidden)

    def rows(self, lo: int, hi: int) -> Tensor:
        """Hidden states [hi − lo, T, d] on the compute device."""
        return self._buffer.get(lo, hi).view(hi - lo, *self._row)

    def close(self) -> None:
        """Free the buffers."""
        self._buffer.close()
        self.handed_on.close()
        if self._arguments is not None:
            self._arguments.close()
