"""The batch size (calibration rows per forward) at each place of a job. It is halved where the device runs out of memory.

Results may round differently with another batch. So a resumed job must use the same batch at the same place, and every halving is
recorded. Knows nothing of devices or files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass


@dataclass(frozen=True, slots=True, order=True)
class Halving:
    """From this place on, at most ``batch`` rows per forward.

    block, step: a pass over the rows. Step 0 computes the block's inputs, by the embedding or by replaying the previous block. Higher
    steps solve the block; their numbers grow but may have gaps. row: the first row of the pass that the new batch applies to.
    """

    block: int
    step: int
    row: int
    batch: int

    def to_json(self) -> tuple[int, ...]:
        """The four numbers; ``Halving(*numbers)`` restores it."""
        return astuple(self)


class Batches:
    """The batch by place. known: halvings of earlier runs. on_halving: called with (old batch, halving) before a halving takes effect."""

    def __init__(self, batch: int, known: Iterable[Halving] = (), on_halving: Callable[[int, Halving], None] | None = None) -> None:
        self._batch = batch
        self._halvings = list(known)
        self._on_halving = on_halving

    def at(self, block: int, step: int, row: int = 0) -> int:
        """The batch at a row of a pass. It never grows from one place to a later place."""
        here = (block, step, row)
        return min([self._batch, *(h.batch for h in self._halvings if (h.block, h.step, h.row) <= here)])

    def halve(self, block: int, step: int, row: int = 0) -> None:
        """Halve the batch from this place on. It must be at least 2."""
        batch = self.at(block, step, row)
        assert batch > 1
        halving = Halving(block, step, row, batch // 2)
        if self._on_halving is not None:
            self._on_halving(batch, halving)
        self._halvings.append(halving)

    @property
    def sizes(self) -> tuple[int, ...]:
        """All batch sizes in use, largest first."""
        return (self._batch, *sorted({h.batch for h in self._halvings if h.batch < self._batch}, reverse=True))


def halving_message(before: int, halving: Halving) -> str:
    """A halving as a line of text. before: the old batch."""
    return f"out of memory: batch {before} → {halving.batch}"
