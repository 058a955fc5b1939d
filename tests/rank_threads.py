"""Ranks as threads of one process: collective operations meet at a barrier, which breaks where one of them does not come."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from bigq.machine.ranks import share

T = TypeVar("T")
#: Seconds that ranks wait for each other.
LIMIT = 10.0


class Meeting:
    def __init__(self, count: int) -> None:
        self.barrier = threading.Barrier(count, timeout=LIMIT)
        self.given: list[object] = [None] * count


@dataclass
class ThreadRanks:
    """One of several threads, as ``bigq.machine.ranks.Ranks``."""

    index: int
    count: int
    meeting: Meeting

    @property
    def local(self) -> int:
        return self.index

    @property
    def local_count(self) -> int:
        return self.count

    def everyone(self, value: object) -> list[object]:
        return [json.loads(each) for each in self.exchanged(json.dumps(value))]

    def exchanged(self, value: T) -> list[T]:
        self.meeting.given[self.index] = value
        self.meeting.barrier.wait()
        found: list[T] = list(self.meeting.given)  # type: ignore[arg-type]
        self.meeting.barrier.wait()
        return found

    def number(self, share: int) -> int:
        return sum(number for number in self.everyone(share) if isinstance(number, int))

    def tensor_(self, share: Tensor) -> None:
        parts = [part.clone() for part in self.exchanged(share)]
        self.meeting.barrier.wait()
        share.copy_(torch.stack(parts).sum(0))

    def triangle_(self, share: Tensor) -> None:
        self.tensor_(share)

    def dealt_triangles_(self, share: Tensor) -> None:
        self.tensor_(share)
        mine = self.rows(len(share))
        for i in range(len(share)):
            if i not in mine:
                share[i] = torch.nan  # is not to be used

    def numbers(self, shares: Sequence[int]) -> list[int]:
        return [self.number(each) for each in shares]

    def gathered(self, rows: Tensor) -> Tensor:
        return torch.cat(self.exchanged(rows))

    def largest_(self, share: Tensor) -> None:
        parts = [part.clone() for part in self.exchanged(share)]
        self.meeting.barrier.wait()
        share.copy_(torch.stack(parts).amax(0))

    def joined(self, part: Tensor, count: int) -> Tensor:
        return torch.cat(self.exchanged(part))

    def rows(self, count: int) -> range:
        return share(count, self.index, self.count)

    def writes(self, unit: int) -> bool:
        return self.index == 0


def together(count: int, run: Callable[[ThreadRanks], T]) -> list[T | Exception]:
    """What ``run`` returns or raises in each of so many ranks."""
    meeting = Meeting(count)

    def caught(rank: int) -> T | Exception:
        try:
            return run(ThreadRanks(rank, count, meeting))
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(caught, range(count)))
