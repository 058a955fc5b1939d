"""Streams, events and the vector clocks that order them.

A clock maps a stream's number to how much of its work is known to come before. Number 0 is the default stream; its work is done when
the call returns. Other streams only copy; see ``copies``.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from fake_cuda.findings import LOCK, waited

if TYPE_CHECKING:
    from fake_cuda.copies import Copy

Clock = dict[int, int]

DEVICE = torch.device("cuda:0")
STREAMS: list[Stream] = []
_local = threading.local()


def merge(clock: Clock, other: Clock) -> None:
    """Add what another clock knows."""
    for number, count in other.items():
        if clock.get(number, 0) < count:
            clock[number] = count


class Stream:
    """A CUDA stream. clock: what its next work comes after. queue: copies that are not made yet, in order.

    unconfirmed: copies from pinned memory that are made, but of which the host does not know it.
    """

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        with LOCK:
            self.number = len(STREAMS)
            STREAMS.append(self)
        self.device = DEVICE
        self.clock: Clock = {self.number: 0}
        self.queue: deque[Copy] = deque()
        self.unconfirmed: list[Copy] = []

    def advance(self) -> int:
        """Number one more piece of work, launched by this thread. Returns its number."""
        merge(self.clock, host_clock())
        self.clock[self.number] += 1
        return self.clock[self.number]

    def drain(self, upto: int) -> None:
        """Make all copies up to a number."""
        while self.queue and self.queue[0].number <= upto:
            self.queue.popleft().make()

    def wait_event(self, event: Event) -> None:
        with LOCK:
            merge(self.clock, event.clock)

    def wait_stream(self, other: Stream) -> None:
        with LOCK:
            merge(other.clock, host_clock())
            merge(self.clock, other.clock)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def query(self) -> bool:
        return not self.queue

    def synchronize(self) -> None:
        waited("stream")
        host_waits(self.clock)


MAIN = Stream()
#: What some thread of the host knows to be done.
HOST: Clock = {}


def host_clock() -> Clock:
    """What this thread of the host knows to be done."""
    if not hasattr(_local, "clock"):
        _local.clock = {}
    clock: Clock = _local.clock
    return clock


def host_waits(clock: Clock) -> None:
    """This thread waits until the work of a clock is done."""
    with LOCK:
        clock = dict(clock)
        for number, count in clock.items():
            stream = STREAMS[number]
            stream.drain(count)
            for copy in [copy for copy in stream.unconfirmed if copy.number <= count]:
                copy.confirm()
        merge(host_clock(), clock)
        merge(HOST, clock)


def current_stream(device: Any = None) -> Stream:
    return getattr(_local, "stream", None) or MAIN


@contextlib.contextmanager
def on_stream(stream: Stream | None) -> Iterator[None]:
    """``torch.cuda.stream``."""
    before = getattr(_local, "stream", None)
    _local.stream = stream
    try:
        yield
    finally:
        _local.stream = before


def synchronize(device: Any = None) -> None:
    """``torch.cuda.synchronize``."""
    waited("device")
    for stream in list(STREAMS):
        host_waits(stream.clock)


class Event:
    """A CUDA event; before it is recorded, it is done."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self.clock: Clock = {}
        self._timing = enable_timing
        self._seconds = 0.0

    def record(self, stream: Stream | None = None) -> None:
        with LOCK:
            stream = stream or current_stream()
            merge(stream.clock, host_clock())
            self.clock = dict(stream.clock)
            self._seconds = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        (stream or current_stream()).wait_event(self)

    def synchronize(self) -> None:
        waited("event")
        host_waits(self.clock)

    def query(self) -> bool:
        """As late as allowed: not before somebody waited."""
        with LOCK:
            return all(not STREAMS[n].queue or STREAMS[n].queue[0].number > count for n, count in self.clock.items())

    def elapsed_time(self, end_event: Event) -> float:
        assert self._timing and end_event._timing, "events without timing"
        assert self.clock and end_event.clock, "an event that was not recorded"
        if not (self.query() and end_event.query()):
            raise RuntimeError("CUDA error: device not ready")
        return (end_event._seconds - self._seconds) * 1000
