"""How several processes share a job, as a plan sees it, and what is assumed of them. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bigq.common_options import BUDGETS, RUN
from bigq.errors import UsageError
from bigq.machine.ranks import PIECE, Ranks, bands
from bigq.options import Converted, at_least, option, settle
from bigq.size_options import size_given

if TYPE_CHECKING:
    from bigq.machine.ceilings import Links


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumed:
    """What ``bigq plan`` assumes besides the job and this machine, as options. They are no settings of a job: a launcher says how many
    processes there are, and a job takes as long as its disk does.

    Raises UsageError if hosts would have different numbers of processes.
    """

    ranks: int = option(1, help="plan for one of so many processes that share the job", group=RUN, placeholder="N", range=at_least(1))
    hosts: int = option(1, help="machines that they run on, as many on each", group=RUN, placeholder="N", range=at_least(1))
    disk_rate: Converted[int | None, int | str | None] = option(
        None,
        help="what a machine reads and writes per second, for the plan's time, such as 40GB",
        group=BUDGETS,
        placeholder="SIZE",
        unset="3 GB",
        convert=size_given,
        range=at_least(1),
    )

    def __post_init__(self) -> None:
        settle(self)
        if self.ranks % self.hosts:
            raise UsageError(f"--hosts {self.hosts}: must divide --ranks {self.ranks}, since each has the same number of processes")


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


def summed(elements: int, sharing: Sharing, piece: int = PIECE) -> Traffic:
    """Of adding up fp32 numbers (``Ranks.tensor_``), ``piece`` at a time: each process receives its part from all, then all sums."""
    whole, rest = divmod(elements, piece)

    def of(count: int) -> Traffic:
        return Traffic(2 * (sharing.ranks - 1) * sharing.part(count) * 4, 2)

    return of(piece).times(whole) + (of(rest) if rest else Traffic())


def summed_triangle(n: int, sharing: Sharing) -> Traffic:
    """Of adding up the upper triangle of a matrix [n, n] (``Ranks.triangle_``), band by band."""
    return sum((summed((hi - lo) * (n - lo), sharing) for lo, hi in bands(n)), Traffic())


def dealt_triangles(count: int, n: int, sharing: Sharing) -> Traffic:
    """Of adding up so many matrices [n, n], each for the process that goes on with it (``Ranks.dealt_triangles_``)."""
    found = list(bands(n, count))
    return Traffic((sharing.ranks - 1) * sharing.part(count) * 4 * sum((hi - lo) * (n - lo) for lo, hi in found), len(found))


def joined(rows: int, row_bytes: int, tensors: int, sharing: Sharing) -> Traffic:
    """Of joining rows of so many tensors (``Ranks.joined``). row_bytes: of one row of all these tensors."""
    return Traffic((sharing.ranks - 1) * sharing.part(rows) * row_bytes, tensors)


def factored(n: int, panel: int, sharing: Sharing) -> Traffic:
    """Of a factorization whose panels are shared: of each, the fp32 rows above its corner are joined."""
    total = Traffic()
    for hi in range(n, panel, -panel):
        total += joined(hi - panel, panel * 4, 1, sharing)
    return total
