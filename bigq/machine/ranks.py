"""How processes share the work of a job: the interface for ``torch.distributed``.

Each rank replays its own share of the calibration rows. Sums over rows are added up over ranks (``HessianSum.reduce``), so every
rank solves with the same sums. Each shard is written by one rank. Today there is one process, which has all rows and writes all shards.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Ranks(Protocol):
    """The processes of a job. It is a ``bigq.solver.hessian.Reduction`` too."""

    def tensor_(self, share: Tensor) -> None:
        """Replace this rank's share by the sum over all ranks, in place and in a fixed order."""

    def number(self, share: int) -> int:
        """The sum over all ranks."""

    def largest_(self, share: Tensor) -> None:
        """Replace each element of this rank's share by the largest over all ranks, in place."""

    def rows(self, count: int) -> range:
        """This rank's share of the calibration rows: a range of row numbers."""

    def writes(self, unit: int) -> bool:
        """Whether this rank writes and commits the shard of a unit, by its number."""


class OneProcess:
    """A job in one process."""

    def tensor_(self, share: Tensor) -> None:
        """The share is the sum."""

    def number(self, share: int) -> int:
        return share

    def largest_(self, share: Tensor) -> None:
        """The share is the largest."""

    def rows(self, count: int) -> range:
        return range(count)

    def writes(self, unit: int) -> bool:
        return True
