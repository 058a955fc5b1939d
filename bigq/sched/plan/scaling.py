"""How long one of several processes takes, against a job of one: which part of the time they share, and what bounds it. Pure functions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bigq.machine.ceilings import Ceilings, Links
from bigq.progress.layout import entry
from bigq.progress.sizes import show_seconds, show_size
from bigq.sched.plan.shape import ModelShape
from bigq.sched.plan.sharing import Sharing, Traffic
from bigq.sched.plan.work import Choice

#: What takes the time of a job besides its phases.
DISK, BUS = "the disk", "the bus to the device"


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Seconds of a job at the least: phases by name, with what processes exchange in them; disk: reading and writing; bus: what is read,
    on its way to the device. beside: whether these two run in parallel with the phases."""

    phases: Mapping[str, float]
    disk: float
    bus: float
    beside: bool

    @property
    def computing(self) -> float:
        return sum(self.phases.values())

    @property
    def total(self) -> float:
        return max(self.disk, self.bus, self.computing) if self.beside else max(self.disk, self.bus) + self.computing

    def excess(self, alone: Times, ranks: int) -> tuple[str, float]:
        """Of what bounds the time: what takes most in excess of its share of a job of one process, and these seconds."""
        parts = {name: seconds - alone.phases.get(name, 0.0) / ranks for name, seconds in self.phases.items()}
        moving = {DISK: self.disk - alone.disk / ranks, BUS: self.bus - alone.bus / ranks}
        if self.beside and self.computing < max(self.disk, self.bus):
            parts = {DISK: moving[DISK]} if self.disk >= self.bus else {BUS: moving[BUS]}
        elif not self.beside:
            parts |= {DISK: moving[DISK]} if self.disk >= self.bus else {BUS: moving[BUS]}
        return max(parts.items(), key=lambda part: part[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """A job of several processes. rows: of calibration, of the whole job. traffic: of one process, by phase.

    reads: how often a host reads the checkpoint from its disk. times: of one process, the first; alone: of a job of one process, None if
    rates are not known. links: rates of the traffic, which is then in the times; None if they are not known.
    """

    sharing: Sharing
    rows: int
    traffic: Mapping[str, Traffic]
    reads: int
    times: Times | None = None
    alone: Times | None = None
    links: Links | None = None

    @property
    def total(self) -> Traffic:
        return sum(self.traffic.values(), start=Traffic())

    def efficiency(self, *, computing: bool = False) -> float | None:
        """The rate of this job, as a fraction of that of one process times their number. computing: without the disk and the bus."""
        if self.times is None or self.alone is None:
            return None
        one, several = (times.computing if computing else times.total for times in (self.alone, self.times))
        return one / (self.sharing.ranks * several) if several else None

    def to_json(self) -> dict[str, Any]:
        bound = None if self.times is None or self.alone is None else self.times.excess(self.alone, self.sharing.ranks)
        return {
            "count": self.sharing.ranks,
            "hosts": self.sharing.hosts,
            "rows": self.sharing.part(self.rows),
            "received_bytes": self.total.received,
            "operations": self.total.operations,
            "traffic": {
                name: {"received_bytes": each.received, "operations": each.operations, "seconds": self._seconds(each)}
                for name, each in sorted(self.traffic.items())
            },
            "links": None if self.links is None else dataclasses.asdict(self.links),
            "reads": self.reads,
            "seconds_alone": None if self.alone is None else self.alone.total,
            "scaling": self.efficiency(),
            "scaling_computing": self.efficiency(computing=True),
            "bound_by": None if bound is None else bound[0],
            "excess_seconds": None if bound is None else bound[1],
        }

    def _seconds(self, traffic: Traffic) -> float | None:
        return None if self.links is None else traffic.seconds(self.sharing, self.links)

    def brief(self) -> list[str]:
        """How many there are, in lines of at most 60 columns."""
        sharing, rows = self.sharing, self.sharing.part(self.rows)
        hosts = f"{sharing.hosts} host{'s' * (sharing.hosts > 1)}"
        return entry("ranks", f"{sharing.ranks} on {hosts}, {rows} row{'s' * (rows > 1)} each; the plan is of one of them")

    def table(self) -> list[str]:
        """What they exchange, and what they gain."""
        parts = [f"{name} {show_size(each.received)}" for name, each in sorted(self.traffic.items()) if each.received]
        lines = entry("traffic", [*parts, f"{self.total.operations} operations"])
        if self.links is None:
            lines += entry("links", "their rates are not known, so the times are without the traffic")
        else:
            several = self.sharing.hosts > 1
            rate, wait = (self.links.hosts, self.links.hosts_wait) if several else (self.links.peers, self.links.peers_wait)
            between = f"{rate / 1e9:g} GB/s between {'hosts' if several else 'devices'} (data sheet)"
            lines += entry("links", [between, f"{1e6 * wait:g} µs for each operation (assumed)"])
        if self.reads > 1:
            lines += entry("disk", f"each host reads MODEL {self.reads} times: a block does not fit into its memory beside the processes")
        efficiency, computing = self.efficiency(), self.efficiency(computing=True)
        if self.times is not None and self.alone is not None and efficiency is not None and computing is not None:
            name, seconds = self.times.excess(self.alone, self.sharing.ranks)
            bound = f"bound by {name}, {show_seconds(seconds)} more than its share" if seconds > 0 else ""
            text = f"{efficiency:.0%} of {self.sharing.ranks} × one process".replace("%", " %")
            lines += entry("scaling", [text, f"computing alone {computing:.0%}".replace("%", " %"), *([bound] if bound else [])])
        return lines


def reads_of_host(shape: ModelShape, choice: Choice, sharing: Sharing, host: int, budget: int) -> int:
    """How often a host reads the checkpoint: once, if what its processes read at a time fits into the memory that they leave to its files.

    Processes meet in every block, and in every batch of experts. host: bytes of a process; budget: those that it may have.
    """
    at_a_time = max(2 * block.stored for block in shape.blocks)
    at_once = (choice.experts_at_once or 1) + 2
    for bank in (bank for block in shape.blocks for bank in block.banks):
        at_a_time = max(at_a_time, at_once * sum(linear.stored for linear in bank.linears))
    return 1 if sharing.local * (budget - host) >= at_a_time else sharing.local


def with_traffic(
    seconds: Mapping[str, float], traffic: Mapping[str, Traffic], sharing: Sharing, ceilings: Ceilings | None
) -> dict[str, float]:
    """Seconds of phases, with those in which processes exchange something, where rates are known."""
    if ceilings is None or ceilings.links is None:
        return dict(seconds)
    links = ceilings.links
    return {name: spent + traffic.get(name, Traffic()).seconds(sharing, links) for name, spent in seconds.items()}
