"""The overview of a file of jobs as one HTML page: no script, nothing fetched. Whatever a name or a record holds is text there."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from pathlib import Path

from bigq.batch.overview import STATES, JobState, Overview
from bigq.errors import UsageError
from bigq.io.atomic import write_bytes
from bigq.progress.sizes import show_duration, show_size
from bigq.progress.terminal import one_line
from bigq.reports.document import document
from bigq.reports.markup import Markup, element, join, table
from bigq.reports.write import require_file
from bigq.version import __version__

_GOOD, _OPEN = ("done", "running", "starting"), ("failed", "stopped", "unknown")


def write_page(found: Overview, file: Path) -> Path:
    """Write the page; returns its path. Raises UsageError where it would lie in an output folder, ResourceError."""
    if file.resolve() == found.file.resolve():
        raise UsageError(f"--html {file}: is the file of jobs itself; name another")
    for each in found.jobs:
        require_file(file, each.job.folder, "--html")
    write_bytes(file, render(found).encode("utf-8", "replace"))
    return file


def render(found: Overview) -> str:
    """The page."""
    name = one_line(found.file.name)
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(sep=" ", timespec="seconds")
    tiles = [element("div", element("span", state), element("strong", count)) for state, count in found.counts.items()]
    header = element(
        "header",
        element("p", "bigq jobs", class_="kicker"),
        element("h1", name),
        element("div", *tiles, class_="tiles"),
    )
    headings = ("job", "out", "model", "state", "progress", "left", "written", "last error")
    jobs = table("Jobs", headings, (_row(each) for each in found.jobs), numbers=(0, 5, 6))
    meanings = element("ul", *(element("li", join((element("b", state), f": {STATES[state]}"))) for state in found.counts))
    footer = element("footer", f"Written by bigq {__version__} at {now} from the records in the jobs' folders.")
    return document(f"{name}: bigq jobs", element("main", header, element("section", jobs), element("section", meanings), footer))


def _row(each: JobState) -> Sequence[object]:
    kind = "good" if each.state in _GOOD else "open" if each.state in _OPEN else ""
    written = "" if each.found is None else show_size(each.found.bytes_written)
    return (
        each.job.index,
        one_line(each.job.out),
        one_line(each.job.model),
        element("span", each.state, class_=f"state {kind}".strip()),
        join(_progress(each)),
        "" if each.eta is None else show_duration(each.eta),
        written,
        "" if each.message is None or each.state == "done" else one_line(each.message),
    )


def _progress(each: JobState) -> Iterator[Markup]:
    if each.fraction is not None:
        yield element("progress", value=f"{each.fraction:.4f}", max="1", aria_label="blocks done")
    if each.found is not None and each.found.blocks is not None:
        yield element("span", f" {each.found.blocks_done} of {each.found.blocks} blocks")
