"""How processes share the work of a job (ranks). Knows nothing of torch.distributed, which ``bigq.machine.process_group`` uses.

Each rank passes its own share of the calibration rows through the model, and quantizes its share of the rows of each weight. Sums over
calibration rows are added up over ranks (``HessianSum.reduce``), and the rows of weights are joined, so every rank continues with the same
quantized weights. The first rank owns the folder, and writes and commits all shards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from bigq.errors import UsageError

if TYPE_CHECKING:  # the command line reads the environment before torch is imported
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One process among those that a launcher has started. index: from 0, of count. local: the same on this host, of local_count.

    address, port: where the first process listens. agent: whether the launcher listens there instead. attempt: how often it started them.
    """

    index: int
    count: int
    local: int
    local_count: int
    address: str
    port: int
    agent: bool = False
    attempt: int = 0


#: Elements that are added up at a time: buffers take three times as much.
PIECE = 2**24
#: Rows of a triangle that are added up at a time: at least so many, and at least this fraction of all. Of the square, narrower bands leave
#: out more below the diagonal, but need more exchanges.
BAND_ROWS, BANDS = 512, 8

#: By what names launchers tell a process its place: torchrun, and srun with MASTER_ADDR and MASTER_PORT.
_NAMES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
)


def place_of(environment: Mapping[str, str]) -> Place | None:
    """This process's place, from environment variables; None if it runs alone.

    Raises UsageError if they are incomplete or contradict each other.
    """
    names = next((names for names in _NAMES if all(name in environment for name in names[:2])), None)
    if names is None or environment[names[1]] == "1":
        return None

    def number(name: str) -> int:
        text = environment.get(name, "")
        # Slurm writes "1,2(x3)": tasks of each node. All plan as on the node with most.
        parts = [part.partition("(")[0] for part in text.split(",")] if name == "SLURM_STEP_TASKS_PER_NODE" else [text]
        if not all(map(str.isdigit, parts)):
            raise UsageError(
                f"{name}={text!r}: not a number, though {names[1]} is set; start bigq by torchrun or srun, or unset {names[1]}"
            )
        return max(map(int, parts))

    index, count, local, local_count = map(number, names)
    if not 0 <= index < count or not 0 <= local < local_count:
        raise UsageError(f"{names[0]}={index}, {names[1]}={count}: there is no such process; start bigq by torchrun or srun")
    if not environment.get("MASTER_ADDR"):
        raise UsageError(
            "MASTER_ADDR: is not set, so ranks cannot find each other; start bigq by torchrun, or with srun export the first node's name "
            "as MASTER_ADDR and a free port as MASTER_PORT"
        )
    return Place(
        index=index,
        count=count,
        local=local,
        local_count=local_count,
        address=environment["MASTER_ADDR"],
        port=number("MASTER_PORT"),
        agent=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=int(environment.get("TORCHELASTIC_RESTART_COUNT", "0")),
    )


def share(count: int, index: int, ranks: int) -> range:
    """The part of ``range(count)`` of one of several ranks. Parts differ by at most 1 in size."""
    return range(count * index // ranks, count * (index + 1) // ranks)


def bands(n: int, count: int = 1) -> Iterator[tuple[int, int]]:
    """Bands of rows [lo, hi) of so many matrices [n, n] whose upper triangles are added up: of each, the columns from lo on, about half."""
    lo = 0
    while lo < n:
        hi = min(n, lo + max(1, min(max(BAND_ROWS, n // BANDS), PIECE // (count * (n - lo)))))
        yield lo, hi
        lo = hi


class Ranks(Protocol):
    """The processes of a job. It is a ``bigq.solver.hessian.Reduction`` too.

    Every method but ``rows`` and ``writes`` must be called by all ranks, in the same order. They raise RankLostError where one is gone.
    index: of this rank. count: of ranks. local: this rank's number on its host, of local_count.
    """

    @property
    def index(self) -> int: ...

    @property
    def count(self) -> int: ...

    @property
    def local(self) -> int: ...

    @property
    def local_count(self) -> int: ...

    def tensor_(self, share: Tensor) -> None:
        """Replace this rank's share by the sum over all ranks, in place, added in the order of ranks."""

    def triangle_(self, share: Tensor) -> None:
        """``tensor_`` of the upper triangle of a matrix [n, n]. Some or all of what is below the diagonal is added up too."""

    def dealt_triangles_(self, share: Tensor) -> None:
        """Of matrices [k, n, n], ``triangle_`` of those that are this rank's by ``rows(k)``. The others are not used any more."""

    def number(self, share: int) -> int:
        """The sum over all ranks."""

    def numbers(self, shares: Sequence[int]) -> list[int]:
        """The sums over all ranks of several numbers."""

    def everyone(self, value: object) -> list[object]:
        """What each rank has given, in the order of ranks. Small values that JSON can hold; tuples become lists."""

    def joined(self, part: Tensor, count: int) -> Tensor:
        """[count, ...] from each rank's part, which has the rows of ``share(count, index, ranks)``."""

    def gathered(self, rows: Tensor) -> Tensor:
        """The rows [k, …] of all ranks, in the order of ranks, each of which may have any number of them."""

    def largest_(self, share: Tensor) -> None:
        """Replace each element of this rank's share by the largest over all ranks, in place."""

    def rows(self, count: int) -> range:
        """This rank's share of the calibration rows: a range of row numbers."""

    def writes(self, unit: int) -> bool:
        """Whether this rank writes and commits the shard of a unit, by its number."""


class OneProcess:
    """A job in one process."""

    index, count, local, local_count = 0, 1, 0, 1

    def tensor_(self, share: Tensor) -> None:
        """The share is the sum."""

    def triangle_(self, share: Tensor) -> None:
        """The share is the sum."""

    def dealt_triangles_(self, share: Tensor) -> None:
        """The shares are the sums."""

    def number(self, share: int) -> int:
        return share

    def numbers(self, shares: Sequence[int]) -> list[int]:
        return list(shares)

    def everyone(self, value: object) -> list[object]:
        return [value]

    def joined(self, part: Tensor, count: int) -> Tensor:
        return part

    def gathered(self, rows: Tensor) -> Tensor:
        return rows

    def largest_(self, share: Tensor) -> None:
        """The share is the largest."""

    def rows(self, count: int) -> range:
        return range(count)

    def writes(self, unit: int) -> bool:
        return True
