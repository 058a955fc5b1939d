"""How many calibration rows go through a block at once, at every place of a job: fewer from where the device ran out of memory.

Results may round differently with another batch, so a job that is taken up again must use at each place the batch that was used
there: where it was halved is remembered. Knows nothing of devices or files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass


@dataclass(frozen=True, slots=True, order=True)
class Halving:
    """From here on no more than ``batch`` rows at once.

    block, step: a pass over the rows. Step 0 brings them to the block's entrance (by the embedding, or through the block before);
    higher steps, of which not all need be there, solve it. row: the first row of the pass that it holds for.
    """

    block: int
    step: int
    row: int
    batch: int

    def to_json(self) -> tuple[int, ...]:
        """As a list of numbers; ``Halving(*numbers)`` is the way back."""
        return astuple(self)


class Batches:
    """The batch by place. on_halving: is given (the batch that was too large, what follows) before the job goes on."""

    def __init__(self, batch: int, known: Iterable[Halving] = (), on_halving: Callable[[int, Halving], None] | None = None) -> None:
        self._batch = batch
        self._halvings = list(known)
        self._on_halving = on_halving

    def at(self, block: int, step: int, row: int = 0) -> int:
        """The batch at a row of a pass. It never grows from one place to a later one."""
        here = (block, step, row)
        return min([self._batch, *(h.batch for h in self._halvings if (h.block, h.step, h.row) <= here)])

    def halve(self, block: int, step: int, row: int = 0) -> None:
        """The batch at this place, of at least 2 rows, is too large."""
        batch = self.at(block, step, row)
        assert batch > 1
        halving = Halving(block, step, row, batch // 2)
        if self._on_halving is not None:
            self._on_halving(batch, halving)
        self._halvings.append(halving)

    @property
    def sizes(self) -> tuple[int, ...]:
        """All batches, the largest first."""
        return (self._batch, *sorted({h.batch for h in self._halvings if h.batch < self._batch}, reverse=True))


def halving_message(before: int, halving: Halving) -> str:
    """A halving in words."""
    return f"out of memory: batch {before} → {halving.batch}"
