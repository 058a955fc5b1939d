"""What blocks take for every row besides hidden states (see ``forward.block_call``), in buffers of the tier of the hidden states."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bigq.sched.rows.tiers import RowBuffer, Tier


@dataclass(frozen=True, slots=True)
class RowTensor:
    """A tensor [N, ...] in a buffer. shape: of one row."""

    buffer: RowBuffer
    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def like(cls, tier: Tier, count: int, rows: Tensor) -> RowTensor:
        """An uninitialized one for ``count`` rows such as ``rows`` [k, ...]."""
        shape = tuple(rows.shape[1:])
        return cls(tier.buffer(count, math.prod(shape), rows.dtype), shape, rows.dtype)

    def fits(self, rows: Tensor) -> bool:
        return (tuple(rows.shape[1:]), rows.dtype) == (self.shape, self.dtype)

    def get(self, lo: int, hi: int) -> Tensor:
        """Rows [lo, hi), [hi − lo, ...]."""
        return self.buffer.get(lo, hi).view(hi - lo, *self.shape)


@dataclass(slots=True)
class TokenArguments:
    """The arguments of the block at hand that are computed from tokens: computed again for each block, so only one block's are held.

    batch: returns the rows that are computed at once, whatever the batch of a pass: those of the embedding, so that the bits do not
    depend on later halvings. compute: for ranges of rows, the arguments of a block by their place.
    """

    tier: Tier
    count: int
    batch: Callable[[], int]
    compute: Callable[[Sequence[tuple[int, int]], int], Iterator[Mapping[int, Tensor]]]
    _block: int | None = None
    _held: dict[int, RowTensor] = field(default_factory=dict)

    def get(self, block: int, place: int, lo: int, hi: int) -> Tensor:
        """Rows [lo, hi) of an argument of a block."""
        if block != self._block:
            self._fill(block)
        return self._held[place].get(lo, hi)

    def _fill(self, block: int) -> None:
        self._block = None
        batch = self.batch()
        spans = [(lo, min(lo + batch, self.count)) for lo in range(0, self.count, batch)]
        wanted: set[int] = set()
        for (lo, _), values in zip(spans, self.compute(spans, block), strict=True):
            for place, rows in values.items():
                if place not in self._held or not self._held[place].fits(rows):
                    self._drop(place)
                    self._held[place] = RowTensor.like(self.tier, self.count, rows)
                self._held[place].buffer.put(lo, rows)
                wanted.add(place)
        for place in set(self._held) - wanted:
            self._drop(place)
        self._block = block

    def _drop(self, place: int) -> None:
        if place in self._held:
            self._held.pop(place).buffer.close()

    def close(self) -> None:
        """Free the buffers."""
        self._block = None
        for place in list(self._held):
            self._drop(place)


@dataclass(slots=True)
class HandedOnRows:
    """The extra outputs that the last replayed block hands on, by their index. The next block's overwrite them, batch by batch."""

    tier: Tier
    count: int
    held: dict[int, RowTensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(self.count * math.prod(rows.shape) * rows.dtype.itemsize for rows in self.held.values())

    def put(self, lo: int, indices: Sequence[int], extras: Sequence[Tensor]) -> None:
        """Overwrite rows, starting at ``lo``: one tensor [k, ...] for each index.

        Raises ValueError where a shape is not that of the block before: in a pass that overwrites rows batch by batch, there is no place
        for both.
        """
        for index, rows in zip(indices, extras, strict=True):
            if index not in self.held:
                self.held[index] = RowTensor.like(self.tier, self.count, rows)
            if not self.held[index].fits(rows):
                raise ValueError(f"{list(rows.shape[1:])} {rows.dtype} instead of {list(self.held[index].shape)} {self.held[index].dtype}")
            self.held[index].buffer.put(lo, rows)

    def close(self) -> None:
        """Free the buffers."""
        for rows in self.held.values():
            rows.buffer.close()
        self.held.clear()
