"""A knapsack of groups: one choice of each, the sum of sizes bounded, the sum of losses least. Pure functions.

Two ways are tried, and the better result is taken: dynamic programming over sizes, exact as long as its table holds all of them, and steps
along the convex hulls of the groups (Lagrange), which need no table. Sizes are integers, so the bound holds exactly.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: Cells of the table of the dynamic program, times groups: bounds its memory and time.
CELLS = 20_000_000
#: The most cells of one group.
COLUMNS = 4096


@dataclass(frozen=True, slots=True)
class Item:
    """A choice of a group. size: of what it stores, in any unit. loss: what it costs."""

    size: int
    loss: float


def least_size(groups: Sequence[Sequence[Item]]) -> int:
    """The least sum of sizes."""
    return sum(min(item.size for item in group) for group in groups)


def choose(groups: Sequence[Sequence[Item]], capacity: int) -> list[int]:
    """The index of the choice of each group: the sum of sizes is at most ``capacity``, the sum of losses the least that was found.

    Exact where the table of the dynamic program holds every size (``COLUMNS``). Elsewhere sizes are rounded up in the table, which never
    exceeds the capacity and loses at most one cell a group. Ties go to the smaller size, then to the earlier choice.
    Raises ValueError if the capacity is below ``least_size``.
    """
    room = capacity - least_size(groups)
    if room < 0:
        raise ValueError(f"capacity {capacity} is below the least size {least_size(groups)}")
    useful = [_useful(group) for group in groups]
    found = [_filled(groups, way(groups, useful, room), capacity) for way in (_by_hull, _by_table)]
    return min(found, key=lambda chosen: _total(groups, chosen))


def _total(groups: Sequence[Sequence[Item]], chosen: Sequence[int]) -> tuple[float, int]:
    items = [group[i] for group, i in zip(groups, chosen, strict=True)]
    return sum(item.loss for item in items), sum(item.size for item in items)


def _useful(group: Sequence[Item]) -> list[int]:
    """The choices that no other one beats in size and loss, by growing size. The first one has the least size."""
    found: list[int] = []
    for i in sorted(range(len(group)), key=lambda i: (group[i].size, group[i].loss, i)):
        if not found or group[i].loss < group[found[-1]].loss:
            found.append(i)
    return found


def _hull(group: Sequence[Item], useful: Sequence[int]) -> list[int]:
    """Of these choices, those on the lower convex hull: each step gains less per size than the one before."""
    found: list[int] = []
    for i in useful:
        while len(found) > 1 and _rate(group, found[-2], found[-1]) <= _rate(group, found[-1], i):
            found.pop()
        found.append(i)
    return found


def _rate(group: Sequence[Item], first: int, second: int) -> float:
    """What a step gains per size."""
    return (group[first].loss - group[second].loss) / (group[second].size - group[first].size)


def _by_hull(groups: Sequence[Sequence[Item]], useful: Sequence[Sequence[int]], room: int) -> list[int]:
    """Steps along the hulls, the one that gains most per size first; a step that does not fit is left out with what follows it."""
    hulls = [_hull(group, kept) for group, kept in zip(groups, useful, strict=True)]
    at = [0] * len(groups)

    def step(g: int) -> tuple[float, int]:
        return -_rate(groups[g], hulls[g][at[g]], hulls[g][at[g] + 1]), g

    steps = [step(g) for g in range(len(groups)) if len(hulls[g]) > 1]
    heapq.heapify(steps)
    while steps:
        _, g = heapq.heappop(steps)
        more = groups[g][hulls[g][at[g] + 1]].size - groups[g][hulls[g][at[g]]].size
        if more > room:
            continue
        room -= more
        at[g] += 1
        if at[g] + 1 < len(hulls[g]):
            heapq.heappush(steps, step(g))
    return [hull[i] for hull, i in zip(hulls, at, strict=True)]


def _by_table(groups: Sequence[Sequence[Item]], useful: Sequence[Sequence[int]], room: int) -> list[int]:
    """Dynamic programming over what the choices take beyond each group's smallest, in cells of a common size."""
    extra = [[groups[g][i].size - groups[g][kept[0]].size for i in kept] for g, kept in enumerate(useful)]
    room = min(room, sum(each[-1] for each in extra))
    common = math.gcd(*(size for each in extra for size in each)) or 1
    most = max(1, min(COLUMNS, CELLS // max(1, len(groups))))
    cell = common if room // common < most else -(-room // most)
    best = torch.zeros(room // cell + 1, dtype=torch.float64)
    taken: list[Tensor] = []
    for g, kept in enumerate(useful):
        now = best + groups[g][kept[0]].loss
        choice = torch.zeros(len(best), dtype=torch.uint8)
        for k in range(1, len(kept)):
            if (size := -(-extra[g][k] // cell)) < len(best):
                found = best[: len(best) - size] + groups[g][kept[k]].loss
                better = found < now[size:]
                now[size:] = torch.where(better, found, now[size:])
                choice[size:].masked_fill_(better, k)
        best = now
        taken.append(choice)
    at = int(torch.argmin(best))
    chosen = [0] * len(groups)
    for g in reversed(range(len(groups))):
        k = int(taken[g][at])
        chosen[g] = useful[g][k]
        at -= -(-extra[g][k] // cell)
    return chosen


def _filled(groups: Sequence[Sequence[Item]], chosen: list[int], capacity: int) -> list[int]:
    """The same with single choices changed as long as one that fits loses less."""
    room = capacity - _total(groups, chosen)[1]
    while True:
        gains = [
            (group[chosen[g]].loss - item.loss, g, i)
            for g, group in enumerate(groups)
            for i, item in enumerate(group)
            if item.size - group[chosen[g]].size <= room and item.loss < group[chosen[g]].loss
        ]
        if not gains:
            return chosen
        _, g, i = max(gains, key=lambda gain: (gain[0], -gain[1], -gain[2]))
        room -= groups[g][i].size - groups[g][chosen[g]].size
        chosen[g] = i
