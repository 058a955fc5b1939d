"""Seconds by phase of a job, measured on the compute device without making it wait.

On a GPU the start and end of a phase are CUDA events that are read later. The stream runs in order, so a phase's seconds are the time
between the device's arrival at its two events. A phase in which the host reads a file lasts as long as the device stood idle for it.
The time that kernels wait in the queue counts for the kernels before them. Knows nothing of models or files.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Protocol

import torch

from bigq.progress.trace import Trace

#: After this many unread laps, those that the device has passed are read, without waiting for the others.
PENDING = 4096

#: Phases in which the compute device waits, and the cause.
CAUSES: Mapping[str, str] = {"load": "reading weights", "write": "writing", "copy": "copying the rest", "transfer": "activations"}
#: On a GPU these too: the host prepares the next steps, and the device has only a few tokens to compute.
CAUSES_ON_GPU: Mapping[str, str] = {**CAUSES, "probe": "probing", "embed": "embedding"}
#: The cause of a GPU's waits outside all phases.
BETWEEN = "between phases"


class Timeline(Protocol):
    """A timeline that laps are measured on. Marks are opaque; each is released once."""

    #: Whether marks may lie in the future, so that reading one may have to wait.
    deferred: bool

    def mark(self) -> Any:
        """A mark after all work that was started before."""

    def has_passed(self, mark: Any) -> bool:
        """Whether the timeline has reached a mark."""

    def wait(self, mark: Any) -> None:
        """Wait until the timeline has reached a mark."""

    def seconds_between(self, first: Any, second: Any) -> float:
        """Seconds from one mark to another; both must have been reached."""

    def release(self, *marks: Any) -> None:
        """Reuse marks that are no longer needed."""


class HostTimeline:
    """The host's ``time.perf_counter``: work is done when its call returns."""

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
    """The part of ``torch.cuda.Event`` that is used here."""

    def record(self) -> None:
        """After all work queued on the current stream."""

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds."""


class StreamTimeline:
    """Timing events on the current CUDA stream; events are reused."""

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
    """The timeline of the work on a device."""
    if device.type == "cuda":
        # A blocking event lets the thread sleep while it waits; reader threads may need its core.
        return StreamTimeline(lambda: torch.cuda.Event(enable_timing=True, blocking=True))
    return HostTimeline()


class Lap:
    """One timed interval, as a context manager."""

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
        """The whole duration, inner phases included. Waits until the device has reached the lap's end."""
        if self._seconds is None:
            self._clock.synchronize()
        assert self._seconds is not None, "a lap has no duration before it ends"
        return self._seconds

    def __float__(self) -> float:
        return self.seconds


class Clock:
    """Seconds by phase. An inner phase does not count for the outer one. Phases are also lanes of the trace.

    Use it from one thread, in which the device is current. subject: what the job works on, for the trace.
    """

    def __init__(self, device: torch.device, trace: Trace | None = None, timeline: Timeline | None = None) -> None:
        self.subject = ""
        self.trace = trace or Trace(keep=False)
        self._on_gpu = device.type == "cuda"
        self._timeline = timeline or timeline_of(device)
        self._seconds: dict[str, float] = {}
        self._open: Lap | None = None
        #: Laps that have ended but are not read yet, in the order of their ends.
        self._ended_laps: list[Lap] = []
        #: A mark and its time by the host's clock. It converts marks to the trace's times.
        self._anchor, self._anchor_time = self._align()
        self._started = self._anchor_time

    def phase(self, name: str) -> Lap:
        """Time the code inside, also if it raises."""
        return Lap(self, name)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by phase, for all laps that have ended. Waits for the device."""
        self.synchronize()
        return dict(self._seconds)

    def seconds_so_far(self) -> dict[str, float]:
        """Seconds by phase, for the laps that were read already. May be called from any thread; does not wait."""
        return dict(self._seconds)

    def wait_seconds(self) -> dict[str, float]:
        """Seconds that the compute device waited for files or the host, by cause. Waits for the device.

        Without a GPU the main thread computes; it counts as waiting while it reads, writes or copies.
        """
        seconds = self.seconds
        causes = CAUSES_ON_GPU if self._on_gpu else CAUSES
        found = {cause: seconds[phase] for phase, cause in causes.items() if phase in seconds}
        if self._on_gpu:
            found[BETWEEN] = max(0.0, time.perf_counter() - self._started - sum(seconds.values()))
        return found

    def synchronize(self) -> None:
        """Read all laps that have ended; waits once for all queued work. Does nothing without such laps."""
        if not self._ended_laps:
            return
        if self._timeline.deferred:
            # A new anchor for the laps that follow, since the clocks of host and device drift apart.
            anchor, anchored = self._align()
            self._read_laps(len(self._ended_laps))
            self._timeline.release(self._anchor)
            self._anchor, self._anchor_time = anchor, anchored
        else:
            self._read_laps(len(self._ended_laps))

    def _align(self) -> tuple[Any, float]:
        mark = self._timeline.mark()
        self._timeline.wait(mark)
        return mark, time.perf_counter()

    def _close_lap(self, lap: Lap) -> None:
        self._ended_laps.append(lap)
        if not self._timeline.deferred:
            self._read_laps(1)
        elif len(self._ended_laps) % PENDING == 0:
            # Laps are in stream order: none after the first unreached one was reached.
            count = next((i for i, each in enumerate(self._ended_laps) if not self._timeline.has_passed(each._end)), len(self._ended_laps))
            self._read_laps(count)

    def _read_laps(self, count: int) -> None:
        """Add the first ``count`` ended laps, which the device has passed. Inner laps come before outer ones."""
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
