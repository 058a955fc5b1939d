"""The control of a running job: stop requests, the grace period, progress and the clock."""

from __future__ import annotations

from dataclasses import dataclass, field

from bigq.job.stop import GraceEstimate, Stop
from bigq.machine.ranks import OneProcess, Ranks
from bigq.progress.clock import Clock
from bigq.progress.progress import Progress
from bigq.sched.short_runs import UnitTimes


@dataclass(slots=True, kw_only=True)
class Control:
    """Every step of a job checks this for stop requests and reports to it.

    place: the place in the job as text, for the message of a job that stops. times: of the units, for the record of the run.
    ranks: they stop at the same step.
    """

    stop: Stop
    progress: Progress
    clock: Clock
    place: str = "before the first block"
    times: UnitTimes = field(default_factory=UnitTimes)
    ranks: Ranks = field(default_factory=OneProcess)
    _grace_estimate: GraceEstimate = field(default_factory=GraceEstimate)

    def begin(self, kind: str, place: str) -> None:
        """A unit begins. kind: units of one kind take about the same time, from which its remaining time is estimated."""
        self._grace_estimate.begin(kind)
        self.times.begin(kind, place)
        self.place = place
        self.pause()

    def end(self) -> None:
        """The unit is done: its time counts for the next one of its kind."""
        self._grace_estimate.end()
        self.times.end()

    def pause(self) -> None:
        """Between steps: raise Stopped if the job was asked to stop, unless the unit can be finished within the grace period.

        Ranks decide together, whichever of them was asked.
        """
        if any(self.ranks.everyone(self._must_stop())):
            self.stop.request("another rank was asked to stop")
            raise self.stop.error(f"at {self.place}")

    def pause_in_pass(self) -> None:
        """Between the batches of a pass over calibration rows. Ranks have different numbers of them, so several do not stop here."""
        if self.ranks.count == 1:
            self.pause()

    def agreed(self, wanted: bool) -> bool:
        """Whether the ranks do something: only if all of them want to."""
        return all(self.ranks.everyone(wanted))

    def _must_stop(self) -> bool:
        return self.stop.requested and self._grace_estimate.must_stop(self.stop.seconds_left)
