"""Whether a job goes on, and what it shows of itself: stop requests, the grace, progress and the clock."""

from __future__ import annotations

from dataclasses import dataclass, field

from bigq.job.stop import GraceEstimate, Stop
from bigq.progress.clock import Clock
from bigq.progress.progress import Progress


@dataclass(slots=True, kw_only=True)
class Control:
    """What every step of a job asks and reports to.

    place: where the job is, in words, for the message of a job that stops.
    """

    stop: Stop
    progress: Progress
    clock: Clock
    place: str = "before the first block"
    _grace_estimate: GraceEstimate = field(default_factory=GraceEstimate)

    def begin(self, kind: str, place: str) -> None:
        """A unit begins. kind: units of one kind take about the same time, by which the grace is judged."""
        self._grace_estimate.begin(kind)
        self.place = place
        self.pause()

    def end(self) -> None:
        """The unit is done: its time counts for the next one of its kind."""
        self._grace_estimate.end()

    def pause(self) -> None:
        """Between steps: raise Stopped if the job was asked to stop, unless the unit can be finished within the grace."""
        if self.stop.requested and self._grace_estimate.must_stop(self.stop.seconds_left):
            raise self.stop.error(f"at {self.place}")
