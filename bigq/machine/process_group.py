"""Several processes of a job, by torch.distributed. The only module that imports it.

Sums are added in the order of ranks, whatever the network does, so the bytes of a job depend on the number of ranks alone. A collective
operation waits for ever; that a rank is gone is noticed by ``bigq.machine.rank_watch``.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, TCPStore  # torch.distributed does not name them for type checkers

from bigq.errors import RESUME, ResourceError
from bigq.machine.rank_watch import RankWatch
from bigq.machine.ranks import PIECE, Place, bands, share

#: Processes that a scheduler starts may be minutes apart.
MEETING = datetime.timedelta(minutes=10)
#: A collective operation lasts as long as the slowest rank computes. That a rank is gone is noticed without it.
COMPUTING = datetime.timedelta(days=30)
#: Bytes of a small value as JSON, with its size, that ranks exchange in one operation.
SMALL, _SIZE = 1024, 8

T = TypeVar("T")


class ProcessGroup:
    """This process as one of the ranks, between ``joined_group`` and its end."""

    def __init__(self, place: Place, watch: RankWatch) -> None:
        self._place, self._watch = place, watch

    @property
    def index(self) -> int:
        return self._place.index

    @property
    def count(self) -> int:
        return self._place.count

    @property
    def local(self) -> int:
        return self._place.local

    @property
    def local_count(self) -> int:
        return self._place.local_count

    def tensor_(self, share: Tensor) -> None:
        flat = share.view(-1)
        for piece in flat.split(PIECE):
            self._sum_(piece)

    def triangle_(self, share: Tensor) -> None:
        for lo, hi in bands(len(share)):
            self._sum_(share[lo:hi, lo:])

    def dealt_triangles_(self, share: Tensor) -> None:
        for lo, hi in bands(share.shape[1], len(share)):
            self._deal_(share[:, lo:hi, lo:])

    def _deal_(self, piece: Tensor) -> None:
        """Every rank receives its share of [k, …] from all, and adds it in the order of ranks."""
        mine, width = self.rows(len(piece)), piece[0].numel()
        sizes = [width * len(share(len(piece), i, self.count)) for i in range(self.count)]
        own = sizes[self.index]
        received = piece.new_empty(self.count * own)
        self._together(lambda: dist.all_to_all_single(received, piece.reshape(-1), [own] * self.count, sizes))
        parts = received.view(self.count, own)
        total = parts[0].clone()
        for other in parts[1:]:
            total += other
        to = piece[mine.start : mine.stop]
        to.copy_(total.view(to.shape))

    def _sum_(self, piece: Tensor) -> None:
        """Every rank receives one part from all, adds them in the order of ranks, and sends the sum to all."""
        count = self.count
        width = -(-piece.numel() // count)
        padded = piece.new_zeros(count * width)
        padded[: piece.numel()].view(piece.shape).copy_(piece)
        parts = torch.empty_like(padded)
        self._together(lambda: dist.all_to_all_single(parts, padded))
        total = parts[:width].clone()
        for other in parts.split(width)[1:]:
            total += other
        self._together(lambda: dist.all_gather(list(padded.split(width)), total))
        piece.copy_(padded[: piece.numel()].view(piece.shape))

    def number(self, share: int) -> int:
        return sum(number for number in self.everyone(share) if isinstance(number, int))

    def numbers(self, shares: Sequence[int]) -> list[int]:
        of_all: Any = self.everyone(list(shares))
        return [sum(each) for each in zip(*of_all, strict=True)]

    def largest_(self, share: Tensor) -> None:
        parts = [torch.empty_like(share) for _ in range(self.count)]
        self._together(lambda: dist.all_gather(parts, share.contiguous()))
        share.copy_(torch.stack(parts).amax(0))

    def everyone(self, value: object) -> list[object]:
        """In one operation if all values are small, which takes a fifth of the time of torch's two for objects."""
        data = json.dumps(value).encode()
        sizes_and_values = self._gathered(len(data).to_bytes(_SIZE, "big") + data[: SMALL - _SIZE], SMALL)
        sizes = [int.from_bytes(part[:_SIZE], "big") for part in sizes_and_values]
        if max(sizes) <= SMALL - _SIZE:
            return [json.loads(part[_SIZE : _SIZE + size]) for part, size in zip(sizes_and_values, sizes, strict=True)]
        return [json.loads(part[:size]) for part, size in zip(self._gathered(data, max(sizes)), sizes, strict=True)]

    def _gathered(self, data: bytes, width: int) -> list[bytes]:
        """The bytes of each rank, filled up with zeros to ``width``."""
        mine = torch.frombuffer(bytearray(data.ljust(width, b"\0")), dtype=torch.uint8)
        parts = list(torch.empty(self.count, width, dtype=torch.uint8))
        self._together(lambda: dist.all_gather(parts, mine))
        return [part.numpy().tobytes() for part in parts]

    def joined(self, part: Tensor, count: int) -> Tensor:
        width = -(-count // self.count)
        padded = part.new_zeros(width, *part.shape[1:])
        padded[: len(part)] = part
        parts = list(part.new_empty(self.count * width, *part.shape[1:]).split(width))
        self._together(lambda: dist.all_gather(parts, padded))
        return torch.cat([parts[i][: len(share(count, i, self.count))] for i in range(self.count)])

    def gathered(self, rows: Tensor) -> Tensor:
        of_all: Any = self.everyone(len(rows))
        padded = rows.new_zeros(max(of_all), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = list(rows.new_empty(self.count * max(of_all), *rows.shape[1:]).split(max(of_all))) if max(of_all) else []
        if not parts:
            return rows
        self._together(lambda: dist.all_gather(parts, padded))
        return torch.cat([part[:length] for part, length in zip(parts, of_all, strict=True)])

    def rows(self, count: int) -> range:
        return share(count, self.index, self.count)

    def writes(self, unit: int) -> bool:
        return self.index == 0

    def _together(self, operation: Callable[[], T]) -> T:
        try:
            return operation()
        except RuntimeError as error:
            raise self._watch.lost(str(error)) from error


@contextlib.contextmanager
def joined_group(
    place: Place, say: Callable[[str], None], check: Callable[[], None], code: int, advice: str = RESUME
) -> Iterator[ProcessGroup]:
    """Meet the other ranks, and be one of them while the context is open. If it ends with an error, the other ranks end too.

    say: receives the line that says why this process ends, if its main thread cannot say it. check: called while this process waits for
    the others to come; may raise. code, advice: with which this process ends if another one is gone.
    Raises ResourceError if they cannot be found, RankLostError if one is gone.
    """
    until = time.monotonic() + MEETING.total_seconds()
    try:
        listens = place.index == 0 and not place.agent
        if not listens:
            _await_listener(place, check, until)
        store = TCPStore(place.address, place.port, place.count, listens, timeout=MEETING, wait_for_workers=False)
        # One connection for each thread: a request that waits holds up the others of its connection.
        beside = TCPStore(place.address, place.port, place.count, is_master=False, timeout=MEETING, wait_for_workers=False)
        prefix = f"bigq-{place.attempt}"
        watch = RankWatch(PrefixStore(prefix, beside), place.index, place.count, socket.gethostname(), say, code, advice)
    except (RuntimeError, ValueError, OSError) as error:
        raise _not_met(place, error) from error
    with watch.watching():
        try:
            watch.meet(check, until)
        except TimeoutError as error:
            raise _not_met(place, error) from error
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        group: Any = PrefixStore(f"{prefix}/group", store)
        try:
            dist.init_process_group(backend, store=group, rank=place.index, world_size=place.count, timeout=MEETING)
        except RuntimeError as error:
            raise watch.lost(str(error)) from error
        dist.distributed_c10d._set_pg_timeout(COMPUTING, dist.group.WORLD)
        yield ProcessGroup(place, watch)
        watch.leaving()
    watch.left()
    dist.destroy_process_group()


def _await_listener(place: Place, check: Callable[[], None], until: float) -> None:
    """Wait until the first rank, or the launcher, listens. Raises OSError."""
    while True:
        check()
        try:
            socket.create_connection((place.address, place.port), timeout=5).close()
            return
        except OSError:
            if time.monotonic() > until:
                raise
        time.sleep(0.1)


def _not_met(place: Place, error: Exception) -> ResourceError:
    return ResourceError(
        f"rank {place.index} of {place.count}: cannot meet the other ranks at {place.address}:{place.port}: {_first_line(error)}; see that "
        "all of them were started, and that the address and the port can be reached"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
