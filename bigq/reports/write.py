"""``bigq report``: from the records in an output folder to an HTML report or a model card."""

from __future__ import annotations

import os
from pathlib import Path

from bigq.errors import UsageError
from bigq.inspect.history import History, read_history
from bigq.io.atomic import write_bytes
from bigq.io.folders import STATE_FOLDER
from bigq.job.owner import refuse_if_held
from bigq.progress.terminal import tell
from bigq.reports import charts
from bigq.reports.card import put_card
from bigq.reports.html import render
from bigq.reports.html_quality import Pictures
from bigq.reports.model_card import model_card, source_readme

#: Kinds of Linears and squares in the map of errors. Models have some hundreds; a record may say anything.
MAX_ROWS, MAX_SQUARES = 100, 3_000


def write_report(out: Path, file: Path | None = None) -> Path:
    """Write the report of the folder ``out`` to ``file``, by default to OUT-report.html beside OUT; returns its path.

    Raises UsageError where neither ``quantize`` nor ``convert`` wrote ``out`` or ``file`` cannot be written, ResourceError where
    writing fails or matplotlib is missing.
    """
    folder = Path(os.path.realpath(out))
    history = read_history(folder)
    if not folder.name:
        raise UsageError(
            f"{folder}: is the root of the file system, so the report would lie inside it, where bigq verify would reject it; "
            "move the model to another folder"
        )
    file = folder.with_name(f"{folder.name}-report.html") if file is None else file
    require_file(file, folder)
    write_bytes(file, render(history, pictures_of(history)).encode("utf-8", "replace"))
    return file


def require_file(file: Path, folder: Path, option: str = "--out") -> None:
    """Raise UsageError, naming the option, where a report on ``folder`` cannot be written to ``file``."""
    if os.path.isdir(file):
        raise UsageError(f"{option} {file}: is a folder; name a file, such as {file / 'report.html'}")
    if os.path.lexists(file) and not os.path.isfile(file):
        raise UsageError(f"{option} {file}: is not a regular file; name another")
    if not os.path.isdir(file.parent):
        raise UsageError(f"{option} {file}: its folder does not exist; make it first, or name a file elsewhere")
    if folder in Path(os.path.realpath(file)).parents:
        raise UsageError(f"{option} {file}: lies in OUT, where bigq verify would reject it; name a file elsewhere")


def pictures_of(history: History) -> Pictures:
    """The pictures of a history. Raises ResourceError where matplotlib is missing."""
    names = history.names[:MAX_ROWS]
    rows = {name: row for row, name in enumerate(names)}
    # The output head is in no block.
    values = {
        (rows[each.name], i): each.error
        for each in history.linears
        if (i := each.block) is not None and each.name in rows and each.error is not None
    }
    marked = {(rows[each.name], i): each.reason for each in history.left_out if (i := each.block) is not None and each.name in rows}
    blocks = max([history.blocks or 0, *(column + 1 for _, column in (*values, *marked))])
    columns = min(blocks, MAX_SQUARES // max(1, len(names)))
    values = {place: value for place, value in values.items() if place[1] < columns}
    marked = {place: why for place, why in marked.items() if place[1] < columns}
    errors = None
    if values:
        title = f"Error of {len(values)} quantized Linears by block and kind, from {min(values.values()):.1e} to {max(values.values()):.1e}"
        errors = charts.heat_map(names, columns, values, marked, title)
    timed = [(f"run {number}", run) for number, run in enumerate(history.runs, 1) if run.seconds is not None and run.by_phase]
    time = None
    if timed:
        seconds = [run.seconds or 0.0 for _, run in timed]
        title = f"Seconds by phase of {len(timed)} runs, {sum(seconds):.1f} s in all; the table below has the numbers"
        time = charts.stacked_bars([label for label, _ in timed], seconds, [run.by_phase for _, run in timed], title)
    return Pictures(errors, time, columns < blocks or len(names) < len(history.names))


def write_model_card(out: Path) -> Path:
    """Write OUT/README.md as a model card; returns its path.

    Raises UsageError where the job in ``out`` is not finished, or its GGUF file is missing, BusyError where a job is running in it.
    """
    refuse_if_held(out / STATE_FOLDER)
    history = read_history(out)
    if not history.is_finished:
        raise UsageError(f"{out}: the job is not finished ({history.state}), so there is nothing to publish; finish it first")
    card = model_card(history, source_readme(out, history))
    return put_card(out, card.encode("utf-8", "replace"), tell)
