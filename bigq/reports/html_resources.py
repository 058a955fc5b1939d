"""The sections of a report about resources: time, memory and size, and the runs of the job."""

from __future__ import annotations

from collections.abc import Iterator

from bigq.inspect.history import History, phases_of
from bigq.progress.sizes import show_size
from bigq.reports.figures import count_of, duration, percent, size, when
from bigq.reports.html_quality import MOST_ROWS
from bigq.reports.markup import Markup, element, facts, folded_table

UNKNOWN = "not recorded"


def time(history: History, picture: str | None) -> Iterator[Markup]:
    """Seconds by phase of all runs."""
    timed = [(number, run) for number, run in enumerate(history.runs, 1) if run.seconds is not None]
    if not timed:
        yield element("p", "No run has recorded its time yet.")
        return
    if picture is not None:
        yield element("figure", element("div", Markup(picture), class_="wide", tabindex="0"))
    if len(timed) < len(history.runs):
        others = count_of(len(history.runs) - len(timed), "run")
        yield element("p", f"Not included: {others} whose time is not recorded, because it was killed or is still running.")
    waiting = sum(sum(run.waiting.values()) for _, run in timed)
    total = sum(run.seconds or 0.0 for _, run in timed)
    yield element(
        "p",
        f"{duration(total)} in all. For {waiting:.1f} s of that ({percent(waiting, total)}), the device waited for files or the host.",
    )
    rows: list[list[object]] = []
    for name in phases_of([run for _, run in timed]):
        seconds = sum(run.by_phase.get(name, 0.0) for _, run in timed)
        rows.append([name, f"{seconds:.1f}", percent(seconds, total)])
    outside = max(0.0, total - sum(sum(run.by_phase.values()) for _, run in timed))
    rows.append(["outside phases (starting, planning, between)", f"{outside:.1f}", percent(outside, total)])
    yield folded_table("Seconds by phase, all runs", ("phase", "seconds", "part"), rows, (1, 2), most=MOST_ROWS)


def memory(history: History) -> Iterator[Markup]:
    """Peak memory of the runs."""
    rows: list[list[object]] = []
    for number, run in enumerate(history.runs, 1):
        for where, planned, peak in (("host", run.planned_host, run.host_peak), ("device", run.planned_device, run.device_peak)):
            if planned is not None or peak is not None:
                off = "–" if not planned or peak is None else f"{100 * (peak / planned - 1):+.1f} %"
                rows.append([f"run {number}, {where}", size(planned), size(peak), off])
    if rows:
        headings = ("run", "predicted", "measured", "difference")
        yield folded_table("Peak memory, predicted and measured", headings, rows, (1, 2, 3), most=MOST_ROWS)
    else:
        yield element("p", "The memory of the runs is not recorded.")


def sizes(history: History) -> Markup:
    """The size of the model before and after."""
    parameters = "" if history.parameters is None else f", {history.parameters:,} parameters"
    pairs: list[tuple[str, object]] = []
    if history.source_bytes is not None or history.conversion is None:
        pairs.append(("source", UNKNOWN if history.source_bytes is None else show_size(history.source_bytes) + parameters))
    if history.conversion is not None:
        pairs.append((f"as {history.conversion.format_before}", show_size(history.conversion.source_bytes)))
    pairs.append(("output", show_size(history.output_bytes) + ("" if history.is_finished else " so far")))
    if history.gguf_bytes is not None:
        shards = show_size(history.output_bytes - history.gguf_bytes)
        pairs.append(("of that", f"model.gguf {show_size(history.gguf_bytes)}, shards {shards}: the model twice"))
    if history.linear_bits is not None:
        pairs.append(("quantized Linears", f"{history.linear_bits:.3f} bits per weight: codes, scales and everything else that is stored"))
    if history.all_bits is not None:
        of = "whole checkpoint" if history.gguf_bytes is None else "all shards"
        pairs.append((of, f"{history.all_bits:.3f} bits per parameter"))
    return facts(pairs)


def runs(history: History) -> Iterator[Markup]:
    """The runs of the job, and their warnings and errors."""
    headings = ("run", "begun", "ended", "time", "blocks done before", "read", "written", "machine")
    rows = [
        [
            number,
            when(run.at),
            run.outcome,
            "–" if run.seconds is None else duration(run.seconds),
            "–" if run.resumed is None else run.resumed,
            size(run.bytes_read),
            size(run.bytes_written),
            run.machine,
        ]
        for number, run in enumerate(history.runs, 1)
    ]
    if rows:
        yield folded_table(count_of(len(rows), "run"), headings, rows, (3, 4, 5, 6), most=MOST_ROWS)
    else:
        yield element("p", "No run is recorded.")
    messages = [
        f"run {number}: {message}"
        for number, run in enumerate(history.runs, 1)
        for message in (*run.notes, *([run.message] if run.message else []))
    ]
    if messages:
        yield element("h3", "Warnings and errors")
        yield element("ul", *(element("li", message) for message in messages[:MOST_ROWS]))
