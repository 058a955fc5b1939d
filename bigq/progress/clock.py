"""Seconds by phase of a job, on the timeline of the device that computes, without making it wait.

On a GPU the ends of a phase are marks in its stream, read later. The stream runs in order, so a phase's seconds are those
between the device's arrival at its two marks: a phase in which the host reads a file takes as long as the device stood idle
for it, and one whose kernels are queued behind others takes none of the host's time. Knows nothing of models or files.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Protocol

import torch

from bigq.progress.trace import Trace

#: Laps that wait to be read off, at most, before those that the device has passed are read off without waiting for the others.
PENDING = 4096

#: Phases in which the device that computes waits, and what for.
CAUSES: Mapping[str, str] = {"load": "reading weights", "write": "writing", "copy": "copying the rest", "transfer": "activations"}
#: On a GPU these too: the host prepares what comes next, and the device has a few tokens to compute.
CAUSES_ON_GPU: Mapping[str, str] = {**CAUSES, "probe": "probing", "embed": "embedding"}
#: What a GPU waits for outside all phases.
BETWEEN = "between phases"


class Timeline(Protocol):
    """Where laps are measured. Marks are opaque; each is released once."""

    #: Whether marks may lie in the future, so that reading them means waiting.
    deferred: bool

    def mark(self) -> Any:
        """Here and now, behind all work that was begun before."""

    def has_passed(self, mark: Any) -> bool:
        """Whether the timeline has come to a mark."""

    def wait(self, mark: Any) -> None:
        """Until the timeline has come to a mark."""

    def seconds_between(self, first: Any, second: Any) -> float:
        """Seconds from one mark to another; both have been passed."""

    def release(self, *marks: Any) -> None:
        """These are not needed any more."""


class HostTimeline:
    """``time.perf_counter``: work is done when the call returns."""

    deferred = False

    def mark(self) -> float:
        return time.perf_counter()

    def has_passed(self, mark: float) -> bool:
        return True

    def wait(self, mark: float) -> None:
        pass

    def seconds_between(self, first: float, second: float) -> float:
        return second - first

    def release(self, *marks: float) -> None:
        pass


class Event(Protocol):
    """What is used of ``torch.cuda.Event``."""

    def record(self) -> None:
        """Behind what is queued on the current stream."""

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds."""


class StreamTimeline:
    """Events on the current stream, which are used again and again."""

    deferred = True

    def __init__(self, new_event: Callable[[], Event]) -> None:
        self._new_event = new_event
        self._free: list[Event] = []

    def mark(self) -> Event:
        event = self._free.pop() if self._free else self._new_event()
        event.record()
        return event

    def has_passed(self, mark: Event) -> bool:
        return mark.query()

    def wait(self, mark: Event) -> None:
        mark.synchronize()

    def seconds_between(self, first: Event, second: Event) -> float:
        return first.elapsed_time(second) / 1000

    def release(self, *marks: Event) -> None:
        self._free.extend(marks)


def timeline_of(device: torch.device) -> Timeline:
    """The timeline of what is computed on a device."""
    if device.type == "cuda":
        # A blocking event lets the thread sleep while it waits; the readers' threads may need its core.
        return StreamTimeline(lambda: torch.cuda.Event(enable_timing=True, blocking=True))
    return HostTimeline()


class Lap:
    """One timed stretch, as a context manager."""

    __slots__ = ("_begin", "_clock", "_end", "_inner", "_name", "_outer", "_seconds", "_subject")
    _begin: Any
    _end: Any
    _outer: Lap | None
    _subject: str

    def __init__(self, clock: Clock, name: str) -> None:
        self._clock, self._name = clock, name
        self._seconds: float | None = None
        self._inner = 0.0

    def __enter__(self) -> Lap:
        clock = self._clock
        self._outer = clock._open
        clock._open = self
        self._begin = clock._timeline.mark()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        clock = self._clock
        clock._open = self._outer
        self._subject = clock.subject or self._name
        self._end = clock._timeline.mark()
        clock._close_lap(self)

    @property
    def seconds(self) -> float:
        """The whole stretch, with the phases inside it. Waits for the device where it has not come to the lap's end."""
        if self._seconds is None:
            self._clock.synchronize()
        assert self._seconds is not None, "a lap has no length before it ends"
        return self._seconds

    def __float__(self) -> float:
        return self.seconds


class Clock:
    """Seconds by phase. A phase inside another is not counted in the outer one. Phases are also lanes of the trace.

    To be used from one thread, where the device is current. subject: what the job is working on, for the trace.
    """

    def __init__(self, device: torch.device, trace: Trace | None = None, timeline: Timeline | None = None) -> None:
        self.subject = ""
        self.trace = trace or Trace(keep=False)
        self._on_gpu = device.type == "cuda"
        self._timeline = timeline or timeline_of(device)
        self._seconds: dict[str, float] = {}
        self._open: Lap | None = None
        #: Laps that have ended and were not read off, in the order in which they ended.
        self._ended_laps: list[Lap] = []
        #: A mark that was passed, and when that was by the host's clock: what the trace is told goes by it.
        self._anchor, self._anchor_time = self._align()
        self._started = self._anchor_time

    def phase(self, name: str) -> Lap:
        """Time what runs inside, also where it fails."""
        return Lap(self, name)

    @property
    def seconds(self) -> dict[str, float]:
        """By phase, for all that have ended. Waits for the device."""
        self.synchronize()
        return dict(self._seconds)

    def seconds_so_far(self) -> dict[str, float]:
        """By phase, for those that have been read off already. From any thread; waits for nothing."""
        return dict(self._seconds)

    def wait_seconds(self) -> dict[str, float]:
        """Seconds that the compute device waited for files or the host, by cause. Waits for the device.

        Without a GPU it is the main thread that computes: then it is told to wait where it reads, writes or copies.
        """
        seconds = self.seconds
        causes = CAUSES_ON_GPU if self._on_gpu else CAUSES
        found = {cause: seconds[phase] for phase, cause in causes.items() if phase in seconds}
        if self._on_gpu:
            found[BETWEEN] = max(0.0, time.perf_counter() - self._started - sum(seconds.values()))
        return found

    def synchronize(self) -> None:
        """Read off all laps that have ended; waits once for all work that is queued. Does nothing where none has."""
        if not self._ended_laps:
            return
        if self._timeline.deferred:
            # The new anchor serves what follows: two clocks that drift apart are set by each other again and again.
            anchor, anchored = self._align()
            self._read_off(len(self._ended_laps))
            self._timeline.release(self._anchor)
            self._anchor, self._anchor_time = anchor, anchored
        else:
            self._read_off(len(self._ended_laps))

    def _align(self) -> tuple[Any, float]:
        mark = self._timeline.mark()
        self._timeline.wait(mark)
        return mark, time.perf_counter()

    def _close_lap(self, lap: Lap) -> None:
        self._ended_laps.append(lap)
        if not self._timeline.deferred:
            self._read_off(1)
        elif len(self._ended_laps) % PENDING == 0:
            # In the stream's order: none behind the first that is pending was passed.
            count = next((i for i, each in enumerate(self._ended_laps) if not self._timeline.has_passed(each._end)), len(self._ended_laps))
            self._read_off(count)

    def _read_off(self, count: int) -> None:
        """Take the first so many ended laps into account; the device has passed them. Inner laps come before outer ones."""
        timeline = self._timeline
        laps, self._ended_laps = self._ended_laps[:count], self._ended_laps[count:]
        for lap in laps:
            whole = lap._seconds = timeline.seconds_between(lap._begin, lap._end)
            self._seconds[lap._name] = self._seconds.get(lap._name, 0.0) + whole - lap._inner
            if lap._outer is not None:
                lap._outer._inner += whole
            if self.trace.keep:
                begin = self._anchor_time + timeline.seconds_between(self._anchor, lap._begin)
                self.trace.add(lap._name, lap._subject, begin, begin + whole)
            timeline.release(lap._begin, lap._end)
            lap._begin = lap._end = lap._outer = None
