"""Runs that are stopped before they finish anything: how many in a row, and how much time a run needs.

A scheduler that requeues a job whose slots are too short would do so for ever. So the third such run in a row ends with an error that no
scheduler takes for "resumable". What counts as finished is whatever spares a later run work: a committed shard, activations saved at a
later block, chosen bits, an uploaded file. A run counts if it was killed, or asked to stop by anything but Ctrl-C. A run that ends in any
other way, this error included, ends the row: only a person starts the next one, who may have more time for it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bigq.errors import BigqError, ResourceError, Stopped
from bigq.io.checksum import unseal, valid_lines
from bigq.io.folders import STATE_FOLDER
from bigq.job.journal import RUNS_NAME, Journal
from bigq.job.pushed import read_pushed
from bigq.job.stop import BY_HAND, Stop
from bigq.mixed.record import BITS_NAME
from bigq.progress.sizes import show_seconds
from bigq.sched.rows.checkpoint import Checkpoints

#: Runs in a row that may finish nothing.
MOST = 3


@dataclass(slots=True)
class UnitTimes:
    """The times of a run's units, by kind ("solve", "replay", "head", "survey"). started: the run's start, by ``time.monotonic``.

    longest: seconds of the longest finished unit of each kind.
    """

    started: float = field(default_factory=time.monotonic)
    longest: dict[str, float] = field(default_factory=dict)
    _unit: tuple[str, str, float] | None = None

    def begin(self, kind: str, place: str) -> None:
        self._unit = (kind, place, time.monotonic())

    def end(self) -> None:
        if self._unit is not None:
            kind, _, began = self._unit
            self.longest[kind] = max(self.longest.get(kind, 0.0), time.monotonic() - began)
            self._unit = None

    def to_json(self) -> dict[str, Any]:
        """longest; unfinished: the unit in progress, its seconds, and the seconds of the run before it; None between units."""
        unfinished = None
        if self._unit is not None:
            kind, place, began = self._unit
            before, seconds = began - self.started, time.monotonic() - began
            unfinished = {"kind": kind, "place": place, "before": round(before, 3), "seconds": round(seconds, 3)}
        return {"longest": {kind: round(seconds, 3) for kind, seconds in self.longest.items()}, "unfinished": unfinished}


def reached(journal: Journal, checkpoints: Checkpoints) -> list[int]:
    """How far a job has come, as numbers of which each only grows while the job makes progress."""
    uploaded = 0
    with contextlib.suppress(BigqError):
        uploaded = sum(each.confirmed for each in read_pushed(journal.out)[0].values())
    chosen = (journal.out / STATE_FOLDER / BITS_NAME).exists()
    return [len(journal.commits), checkpoints.newest + 1, int(chosen), uploaded]


def recorded_runs(out: Path) -> list[dict[str, Any]]:
    """The records of a job's runs, the oldest first; damaged ones are left out. Raises ResourceError, CheckpointError."""
    found = (unseal(line, line=True) for line in valid_lines(out / STATE_FOLDER / RUNS_NAME))
    return [run for run in found if run is not None]


def short_runs(runs: Sequence[Mapping[str, Any]], now: Sequence[int]) -> list[Mapping[str, Any]]:
    """The runs at the end of ``runs`` that finished nothing, the newest first. now: what the job has reached."""
    row: list[Mapping[str, Any]] = []
    after = list(now)
    for run in reversed(runs):
        before, ended = run.get("reached"), run.get("ended")
        if ended is not None:
            asked = isinstance(ended, dict) and ended.get("outcome") == "stopped" and ended.get("asked_by") not in (None, BY_HAND)
            if not asked:
                break
            after = ended.get("reached")
        if not (_is_mark(before) and _is_mark(after)) or _further(before, after):
            break
        row.append(run)
        after = before
    return row


def _further(before: Sequence[int], after: Sequence[int]) -> bool:
    return any(b > a for a, b in zip(before, after, strict=True))


def _is_mark(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(type(each) is int for each in value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """Judges a run that was asked to stop. earlier: the runs before this one. begun: what was reached when it began."""

    journal: Journal
    checkpoints: Checkpoints
    stop: Stop
    times: UnitTimes
    begun: Sequence[int]
    earlier: Sequence[Mapping[str, Any]]

    def notes(self) -> list[str]:
        """A warning for a run that follows too many. A scheduler that kills sees no exit code, so its log must say it."""
        row = short_runs(self.earlier, self.begun)
        if len(row) < MOST:
            return []
        return [f"the last {len(row)} runs ended before they finished a unit; this one finishes one only if it has more time"]

    def problem(self) -> str | None:
        """What to say instead of "resume" if this is the last of too many runs that finished nothing; None if it is not."""
        if self.stop.asked_by in (None, BY_HAND) or _further(self.begun, reached(self.journal, self.checkpoints)):
            return None
        row = short_runs(self.earlier, self.begun)
        if len(row) + 1 < MOST:
            return None
        return (
            f"{self.journal.out}: the last {len(row) + 1} runs ended before they finished a unit; the job needs {self._need(row)}: run the "
            "same command in a longer slot"
        )

    def _need(self, row: Sequence[Mapping[str, Any]]) -> str:
        """The least time of a run, from what was measured."""
        spent = max([time.monotonic() - self.times.started, *(_seconds(run, "ended", "seconds") for run in row)])
        unit = self.times.to_json()["unfinished"]
        if unit is None:
            return f"runs of more than {show_seconds(spent)}, in which no unit began"
        longest = [_seconds(run, "ended", "units", "longest", unit["kind"]) for run in self.earlier]
        known = max([self.times.longest.get(unit["kind"], 0.0), *longest])
        least = unit["before"] + known + self.stop.grace
        if not known or least <= spent:
            return f"runs of more than {show_seconds(spent)}, in which {unit['place']} was not finished"
        parts = f"{show_seconds(unit['before'])} before {unit['place']}, {show_seconds(known)} for it as for the longest so far"
        return f"runs of at least {show_seconds(least)} ({parts}, {show_seconds(self.stop.grace)} to stop)"

    @contextlib.contextmanager
    def judging(self, leave: Callable[[str], None]) -> Iterator[None]:
        """While the context is open, a stop that ``problem`` objects to is a ResourceError; also where the process ends at its deadline.

        leave: records how the job ended, before the process ends so.
        """

        def last_words() -> str | None:
            found = self.problem()
            if found is not None:
                leave(found)
            return found

        self.stop.last_words = last_words
        try:
            yield
        except Stopped as stopped:
            found = self.problem()
            if found is None:
                raise
            raise ResourceError(found) from stopped
        finally:
            self.stop.last_words = None


def _seconds(value: Any, *path: str) -> float:
    """A number in a record, which may hold anything; 0 if it is not there."""
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return float(value) if type(value) in (int, float) and 0 <= value < 1e9 else 0.0
