"""How several processes share a job, as a plan sees it, and which jobs they cannot share."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from bigq.config import JobConfig
from bigq.errors import UsageError
from bigq.machine.ceilings import Links
from bigq.machine.ranks import Ranks
from bigq.methods.base import CalibratedMethod, Method


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharing:
    """ranks: processes that share a job, of which ``local`` are on one host."""

    ranks: int = 1
    local: int = 1

    @property
    def hosts(self) -> int:
        return -(-self.ranks // self.local)

    def part(self, count: int) -> int:
        """The largest share that one of them has of ``count`` things."""
        return -(-count // self.ranks)


    @classmethod
    def of(cls, ranks: Ranks) -> Sharing:
        """Of a job that runs."""
        return cls(ranks=ranks.count, local=ranks.local_count)


ALONE = Sharing()


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a process has to do with the others: bytes that it receives from them, and collective operations. It sends as many bytes."""

    received: int = 0
    operations: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.received + other.received, self.operations + other.operations)

    def times(self, count: int) -> Traffic:
        return Traffic(count * self.received, count * self.operations)

    def seconds(self, sharing: Sharing, links: Links) -> float:
        """As if each process sent its part to every other one: those of its host and those of others at the same time."""
        each = self.received / max(1, sharing.ranks - 1)
        inside = each * (sharing.local - 1) / links.peers
        outside = each * (sharing.ranks - sharing.local) / links.hosts
        return max(inside, outside) + self.operations * (links.hosts_wait if sharing.hosts > 1 else links.peers_wait)


def summed(elements: int, sharing: Sharing, piece: int) -> Traffic:
    """Of adding up fp32 numbers (``Ranks.tensor_``), ``piece`` at a time: each process receives its part from all, then all sums."""
    whole, rest = divmod(elements, piece)

    def of(count: int) -> Traffic:
        return Traffic(2 * (sharing.ranks - 1) * sharing.part(count) * 4, 2)

    return of(piece).times(whole) + (of(rest) if rest else Traffic())


def joined(rows: int, row_bytes: int, tensors: int, sharing: Sharing) -> Traffic:
    """Of joining rows of so many tensors (``Ranks.joined``). row_bytes: of one row of all these tensors."""
    return Traffic((sharing.ranks - 1) * sharing.part(rows) * row_bytes, tensors)


def factored(n: int, panel: int, sharing: Sharing) -> Traffic:
    """Of a factorization whose panels are shared: one triangle in fp32, of which each process has its part."""
    return Traffic(n * n // 2 * 4 * (sharing.ranks - 1) // sharing.ranks, math.ceil(n / panel))


def for_ranks(config: JobConfig, ranks: int, device_type: str) -> JobConfig:
    """A job's settings with what depends on the number of processes: on a CPU one expert for each is solved side by side."""
    if ranks == 1 or device_type != "cpu" or config.experts_at_once is not None:
        return config
    return dataclasses.replace(config, experts_at_once=ranks)


def require_shareable(config: JobConfig, method: Method, *, remote: bool, rows: int, ranks: int) -> None:
    """Raise UsageError if the job has a part that several processes do not share. remote: whether the model stays on a server.

    rows: of calibration.
    """
    alone = {
        f"--method {config.method}": not isinstance(method, CalibratedMethod) or not method.hessians,
        f"--fold {config.fold}": method.scaling is not None,
        "--tune-steps": bool(config.tune_steps),
        "--bits-per-weight": config.bits_per_weight is not None,
        "a model that stays on a server": remote,
    }
    for what, there in alone.items():
        if there:
            raise UsageError(f"{what}: {ranks} processes cannot share such a job; start it in one process")
    if rows < ranks:
        raise UsageError(
            f"--samples {rows}: {ranks} processes share the calibration rows, and each needs at least one; "
            f"give at least {ranks}, or start fewer processes"
        )
