"""A timeline of a job, with one lane for each kind of work, in the JSON format of Chrome's trace viewer and Perfetto."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Span:
    """An interval of work. begin, end: seconds since the trace began."""

    lane: str
    name: str
    begin: float
    end: float


class Trace:
    """Collects spans from any thread. keep: False drops them, so that they take no memory in a long job without ``--trace``."""

    def __init__(self, *, keep: bool = True) -> None:
        self.keep = keep
        self._origin = time.perf_counter()
        self.spans: list[Span] = []

    def add(self, lane: str, name: str, begin: float, end: float) -> None:
        """Add a span. begin, end: by ``time.perf_counter``."""
        if self.keep:
            self.spans.append(Span(lane, name, begin - self._origin, end - self._origin))

    @contextlib.contextmanager
    def span(self, lane: str, name: str) -> Iterator[None]:
        """Record the code inside as one span, also if it raises."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.add(lane, name, begin, time.perf_counter())

    def to_json(self) -> bytes:
        """Complete events ("X") in microseconds. Lanes are named threads of one process, in order of first appearance."""
        spans = sorted(self.spans, key=lambda span: (span.begin, -span.end))
        lanes = {lane: number for number, lane in enumerate(dict.fromkeys(span.lane for span in spans), 1)}
        events: list[dict[str, object]] = [
            {"name": "thread_name", "ph": "M", "pid": 1, "tid": number, "args": {"name": lane}} for lane, number in lanes.items()
        ]
        for span in spans:
            events.append(
                {
                    "name": span.name,
                    "cat": span.lane,
                    "ph": "X",
                    "pid": 1,
                    "tid": lanes[span.lane],
                    "ts": round(span.begin * 1e6, 1),
                    "dur": round((span.end - span.begin) * 1e6, 1),
                }
            )
        return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}).encode() + b"\n"
