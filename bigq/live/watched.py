"""What is known of jobs while they run, from the records in their folders. Nothing is changed. Imports no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigq.batch.overview import overview
from bigq.errors import BigqError
from bigq.inspect.bounds import count, number, text
from bigq.inspect.status import Status, status
from bigq.job.journal import Commit, read_commits

#: Commits that rates are measured over, and Linears that are listed.
RATE_COMMITS, NEWEST, LARGEST = 9, 12, 8
_BLOCK = re.compile(r"block-\d+")


@dataclass(frozen=True, slots=True, kw_only=True)
class SolvedLinear:
    """A Linear that is quantized. error: relative, of its outputs; None where unknown. tokens: of an expert."""

    name: str
    bits: int | None
    error: float | None
    tokens: int | None = None

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> SolvedLinear:
        """From a record, which may hold anything."""
        return cls(
            name=text(record.get("name", "")),
            bits=count(record.get("bits")),
            error=number(record.get("relative_error")),
            tokens=count(record.get("tokens")),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchedJob:
    """One job. state: of ``bigq.inspect.status`` or, for a job of a file, of ``bigq.batch.overview``.

    message: its error, or what is wrong with its folder; None without. found: what its folder says; None where it holds no job.
    linears: how many Linears are quantized; newest, largest: the last ones and those of the largest errors. bytes_per_second,
    blocks_per_hour: of the last commits; None with too few.
    """

    out: str
    state: str
    message: str | None = None
    found: Status | None = None
    linears: int = 0
    newest: Sequence[SolvedLinear] = ()
    largest: Sequence[SolvedLinear] = ()
    bytes_per_second: float | None = None
    blocks_per_hour: float | None = None

    @property
    def fraction(self) -> float | None:
        """The fraction of the blocks that are done; None where their number is unknown."""
        if self.found is None or not self.found.blocks:
            return None
        return min(1.0, self.found.blocks_done / self.found.blocks)

    def to_json(self) -> dict[str, Any]:
        def listed(linears: Sequence[SolvedLinear]) -> list[dict[str, Any]]:
            return [{"name": one.name, "bits": one.bits, "relative_error": one.error, "tokens": one.tokens} for one in linears]

        return {
            "out": self.out,
            "state": self.state,
            "message": self.message,
            "linears": self.linears,
            "newest": listed(self.newest),
            "largest_errors": listed(self.largest),
            "bytes_per_second": self.bytes_per_second,
            "blocks_per_hour": self.blocks_per_hour,
            "status": None if self.found is None else self.found.to_json(),
        }


def watched(places: Sequence[Path]) -> list[WatchedJob]:
    """The jobs in these folders, and those of these files of jobs, in this order. A place that cannot be read is a job that failed."""
    return [job for place in places for job in _jobs(Path(os.path.expanduser(place)))]


def require_places(places: Sequence[Path]) -> None:
    """Raise UsageError for a folder that holds something else than a job, and for a file that holds no jobs. One may not be there yet."""
    for place in places:
        if place.is_file():
            overview(place)
        elif os.path.lexists(place):
            status(place)


def _jobs(place: Path) -> Iterator[WatchedJob]:
    try:
        if not os.path.lexists(place):
            yield WatchedJob(out=str(place), state="not begun")
            return
        if not place.is_file():
            yield _watched(str(place), status(place))
            return
        jobs = overview(place).jobs
    except BigqError as error:
        yield WatchedJob(out=str(place), state="failed", message=str(error))
        return
    for job in jobs:
        if job.found is None:
            yield WatchedJob(out=job.job.out, state=job.state, message=job.message)
        else:
            yield _watched(job.job.out, job.found, job.state, job.message)


def _watched(out: str, found: Status, state: str | None = None, message: str | None = None) -> WatchedJob:
    try:
        commits, _ = read_commits(Path(os.path.expanduser(out)))
    except BigqError:  # the status names what is damaged
        commits = []
    records = [record for commit in commits for record in commit.linears]
    solved = [SolvedLinear.of(record) for record in records]
    known = [one for one in solved if one.error is not None]
    return WatchedJob(
        out=out,
        state=state or found.state,
        message=message if state is not None else found.said,
        found=found,
        linears=len(solved),
        newest=solved[: -NEWEST - 1 : -1],
        largest=sorted(known, key=lambda one: -(one.error or 0.0))[:LARGEST],
        bytes_per_second=_rate([(commit, commit.shard.size) for commit in commits]),
        blocks_per_hour=_per_hour(_rate([(commit, 1) for commit in commits if _BLOCK.fullmatch(commit.unit)])),
    )


def _rate(done: Sequence[tuple[Commit, int]]) -> float | None:
    """Amounts a second, over the last commits, by the times at which their files were written."""
    last = done[-RATE_COMMITS:]
    if len(last) < 2:
        return None
    seconds = (last[-1][0].modified - last[0][0].modified) / 1e9
    return sum(amount for _, amount in last[1:]) / seconds if seconds > 0 else None


def _per_hour(rate: float | None) -> float | None:
    return None if rate is None else 3600 * rate
