"""The jobs that are watched as one HTML page that asks for itself again: no script, nothing fetched. What records hold is text there."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Iterator, Sequence

from bigq.live.watched import SolvedLinear, WatchedJob
from bigq.progress.sizes import show_duration, show_size
from bigq.progress.terminal import one_line
from bigq.reports.document import document
from bigq.reports.markup import Markup, element, facts, join, table
from bigq.version import __version__

_GOOD, _OPEN = ("done", "finished", "running", "starting"), ("failed", "stopped", "killed", "unknown")


def render(jobs: Sequence[WatchedJob], refresh: int) -> str:
    """The page. refresh: seconds until the browser asks again."""
    counts = Counter(job.state for job in jobs)
    header = element(
        "header",
        element("p", "bigq jobs, live", class_="kicker"),
        element("h1", ", ".join(f"{number} {state}" for state, number in counts.items())),
    )
    headings = ("job", "state", "progress", "left", "blocks/h", "written", "largest error")
    parts = [header]
    if len(jobs) > 1:
        parts.append(element("section", table("Jobs", headings, map(_row, jobs), numbers=(3, 4, 5, 6))))
    parts += [_job(job) for job in jobs]
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(sep=" ", timespec="seconds")
    footer = element("footer", f"bigq {__version__} at {now}, from the records in the jobs' folders; again every {refresh} s.")
    return document("bigq jobs, live", element("main", *parts, footer), refresh)


def _row(job: WatchedJob) -> Sequence[object]:
    eta = None if job.found is None else job.found.eta_seconds
    return (
        one_line(job.out),
        _state(job),
        _progress(job),
        "" if eta is None else show_duration(eta),
        "" if job.blocks_per_hour is None else f"{job.blocks_per_hour:.3g}",
        "" if job.found is None else show_size(job.found.bytes_written),
        _error(job.largest[0]) if job.largest else "",
    )


def _state(job: WatchedJob) -> Markup:
    kind = "good" if job.state in _GOOD else "open" if job.state in _OPEN else ""
    return element("span", job.state, class_=f"state {kind}".strip())


def _progress(job: WatchedJob) -> Markup:
    parts: list[object] = []
    if job.fraction is not None:
        parts.append(element("progress", value=f"{job.fraction:.4f}", max="1", aria_label="blocks done"))
    if job.found is not None and job.found.blocks is not None:
        parts.append(element("span", f" {job.found.blocks_done} of {job.found.blocks} blocks"))
    return join(parts)


def _job(job: WatchedJob) -> Markup:
    parts: list[object] = [element("h2", one_line(job.out)), element("p", _state(job), " ", _progress(job))]
    if job.message is not None and job.state not in ("done", "finished"):
        parts.append(element("p", one_line(job.message)))
    parts.append(facts(_facts(job)))
    headings = ("Linear", "bits", "error", "tokens")
    if job.newest:
        parts.append(table("The newest Linears", headings, map(_linear, job.newest), numbers=(1, 2, 3)))
    if job.largest:
        parts.append(table("The largest errors so far", headings, map(_linear, job.largest), numbers=(1, 2, 3)))
    return element("section", *parts)


def _facts(job: WatchedJob) -> Iterator[tuple[str, object]]:
    found = job.found
    if found is None:
        return
    if found.phase is not None:
        yield "phase", found.phase
    if found.eta_seconds is not None:
        yield "left", f"about {show_duration(found.eta_seconds)}"
    rate = "" if job.bytes_per_second is None else f", {show_size(int(job.bytes_per_second))}/s"
    yield "written", f"{show_size(found.bytes_written)} in {found.shards} shards{rate}"
    if job.blocks_per_hour is not None:
        yield "blocks", f"{job.blocks_per_hour:.3g} an hour"
    yield "Linears", str(job.linears)
    if found.pushed is not None:
        yield "pushed", f"{found.pushed} of {found.shards} shards to {one_line(found.repository or '')}"
    if found.holder is not None:
        age = "" if found.holder.heartbeat_age is None else f", {show_duration(found.holder.heartbeat_age)} ago"
        yield "process", f"{found.holder.pid} on {one_line(found.holder.host)}; heartbeat {found.holder.beats}{age}"
    for warning in found.warnings:
        yield "warning", one_line(warning)
    for damaged in found.damaged:
        yield "damaged", one_line(damaged)


def _linear(linear: SolvedLinear) -> Sequence[object]:
    return (linear.name, "" if linear.bits is None else linear.bits, _error(linear), "" if linear.tokens is None else linear.tokens)


def _error(linear: SolvedLinear) -> str:
    return "–" if linear.error is None else f"{linear.error:.2e}"
