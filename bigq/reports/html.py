"""The report of a job as one HTML file: no script, nothing fetched, light or dark as the reader's system is.

Pure: what is known of a job, and pictures of it, to text. ``pictures`` says what is to be drawn.
"""

from __future__ import annotations

import itertools
import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bigq.config import JobConfig
from bigq.inspect.evaluations import Judged, newest
from bigq.inspect.history import History, LinearResult, phases_of
from bigq.job.command import flags
from bigq.progress.sizes import show_duration, show_size
from bigq.reports.markup import Markup, element, facts, joined, table
from bigq.reports.style import STYLE
from bigq.version import __version__

#: Rows of a table that are shown.
WORST, MOST_ROWS = 20, 200
UNKNOWN = "not recorded"
STATES = {
    "finished": "finished",
    "running": "running: what follows is how far it is",
    "unknown": "may be running elsewhere: what follows is how far it was",
    "not begun": "not begun",
}
UNFINISHED = "not finished ({}): what follows is how far it got; the same command goes on with it"


#: What errors are, by method.
ERRORS = {
    "gptq": "The squared error of a Linear's outputs on the calibration rows, relative to the outputs: ‖(W − Q)X‖² / ‖WX‖².",
    "gptaq": (
        "The squared error of a Linear's outputs on the calibration rows as the quantized model has them, relative to the outputs: "
        "‖(W* − Q)X‖² / ‖W*X‖², where W* is the weight as corrected for what the Linears before have done to X (an output head is not "
        "corrected)."
    ),
    "rtn": "The squared rounding error of a Linear's weights, relative to the weights: ‖W − Q‖² / ‖W‖².",
}


@dataclass(frozen=True, slots=True)
class Pictures:
    """SVG elements; None where there is nothing to draw. Made by ``bigq.reports.charts``, and safe to be put into a page.

    cut: whether ``errors`` shows some blocks or Linears only.
    """

    errors: str | None
    time: str | None
    cut: bool = False


def render(history: History, pictures: Pictures) -> str:
    """The whole page."""
    name = history.out.rstrip("/").rpartition("/")[2] or history.out
    parts = [
        _header(history, name),
        _section("What was done", _done(history)),
        _section("Quality", *_quality(history)),
        _section("Error of each Linear", *_errors(history, pictures)),
        _section("Time", *_time(history, pictures.time)),
        _section("Memory and size", *_memory(history)),
        _section("Runs", *_runs(history)),
    ]
    if history.damaged:
        parts.append(_section("Damaged records", element("ul", *(element("li", each) for each in history.damaged))))
    footer = element("footer", f"Written by bigq {__version__} from the job's own record, {history.out}/.bigq.")
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    head = joined(
        (
            Markup('<meta charset="utf-8">'),
            Markup(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
            Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
            Markup('<meta name="color-scheme" content="light dark">'),
            element("title", f"bigq report: {name}"),
            element("style", Markup(STYLE)),
        ),
        "\n",
    )
    body = element("main", *parts, footer)
    return f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def _section(title: str, *inner: object) -> Markup:
    return element("section", element("h2", title), *inner)


def _header(history: History, name: str) -> Markup:
    state = STATES.get(history.state, UNFINISHED.format(history.state))
    tiles = [
        element("div", element("span", label), element("strong", value), element("span", below)) for label, value, below in _tiles(history)
    ]
    return element(
        "header",
        element("p", "bigq report", class_="kicker"),
        element("h1", name),
        element("p", state, class_="state " + ("good" if history.finished else "open")),
        element("div", *tiles, class_="tiles"),
    )


def _tiles(history: History) -> Iterator[tuple[str, str, str]]:
    """(what, figure, small print) of the figures that matter most."""
    if history.source_bytes and history.finished:
        part = f"{100 * history.output_bytes / history.source_bytes:.0f} % of {show_size(history.source_bytes)}"
        if history.gguf_bytes is not None:
            part += f"; {show_size(history.gguf_bytes)} of it model.gguf"
        yield "size", show_size(history.output_bytes), part
    else:
        yield "written", show_size(history.output_bytes), _blocks(history)
    if history.linear_bits is not None:
        of = "the whole checkpoint" if history.gguf_bytes is None else "all shards"
        whole = "" if history.all_bits is None else f"{history.all_bits:.2f} over {of}"
        yield "bits per weight", f"{history.linear_bits:.2f}", whole or "with scales and zero points"
    if history.evaluations:
        last = sorted(newest(history.evaluations), key=lambda each: each.of_source)[-1]
        before = "no baseline" if last.baseline_perplexity is None else f"{_figure(last.baseline_perplexity)} {_of(last)}"
        yield "perplexity", _figure(last.perplexity), before
    worst = history.worst(1)
    if worst:
        yield "worst Linear", f"{worst[0].error:.1e}", f"{_where(worst[0].block)}, {worst[0].name}"
    seconds = [run.seconds for run in history.runs if run.seconds is not None]
    if seconds:
        untold = len(history.runs) - len(seconds)
        yield "time", _duration(sum(seconds)), _counted(len(history.runs), "run") + (f", {untold} of unknown length" if untold else "")


def _done(history: History) -> Markup:
    last = history.runs[-1] if history.runs else None
    pairs: list[tuple[str, object]] = []
    if last is not None:
        pairs.append(("model", element("code", last.model or UNKNOWN)))
        if last.folder is not None and last.folder != last.model:
            pairs.append(("read from", element("code", last.folder)))
    pairs.append(("output", element("code", history.out)))
    if history.config is not None:
        pairs += settings(history.config)
        pairs.append(("output head", _head(history, history.config)))
    if last is not None:
        first = history.runs[0]
        given = next((run for run in history.runs if run.command), None)
        pairs.append(("command", UNKNOWN if given is None else element("code", shlex.join(["bigq", *given.command]))))
        pairs.append(("begun", _when(first.at)))
        if last is not first:
            pairs.append(("last run", f"{_when(last.at)}; {len(history.runs)} in all"))
        pairs.append(("machine", last.machine))
        pairs.append(("versions", ", ".join(f"{name} {version}" for name, version in last.versions.items()) or UNKNOWN))
    pairs.append(("blocks", _blocks(history)))
    return facts(pairs)


def settings(config: JobConfig) -> list[tuple[str, object]]:
    """How weights were quantized, in words."""
    scheme = config.scheme
    groups = "one group per row" if scheme.group_size == -1 else f"groups of {scheme.group_size}"
    zeros = "symmetric" if scheme.symmetric else "asymmetric"
    extra = [word for word, on in (("act-order", scheme.act_order), ("scales by grid search", scheme.mse)) if on]
    extra += [f"scales of {scheme.scale_bits} significant bits"] if scheme.scale_bits is not None else []
    pairs: list[tuple[str, object]] = [("weights", ", ".join([f"{scheme.bits} bits", groups, zeros, *extra]))]
    order = "true-sequential" if config.true_sequential else "all Linears of a block at once"
    how = config.method if config.method == "rtn" else f"{config.method}, {order}, damping {scheme.damping}"
    how += f", correction of strength alpha {config.alpha}" if config.method == "gptaq" else ""
    pairs.append(("method", how))
    if config.rules:
        pairs.append(("rules", joined((element("code", rule) for rule in _rules(config)), " ")))
    shards = ": model.gguf, and shards in gptq_v2" if config.format == "gguf" else ""
    pairs.append(("format", config.format + shards))
    if config.method != "rtn":
        rows = f"{config.samples} × {config.seqlen} tokens of {config.calibration}, seed {config.seed}"
        pairs.append(("calibration", rows))
        pairs.append(("forward passes", f"{config.dtype} precision, {config.batch or 'as many as fit'} rows at once"))
    return pairs


def _head(history: History, config: JobConfig) -> str:
    if history.head is not None:
        return f"{history.head.name}, quantized"
    if not config.lm_head or any(left.block is None for left in history.left_out):
        return "as it was"
    return "as it was, by a rule" if history.finished else "to be quantized"


def _rules(config: JobConfig) -> list[str]:
    words = flags(config)
    return [f"{flag} {shlex.quote(value)}" for flag, value in itertools.pairwise(words) if flag in ("--rule", "--skip")]


def _quality(history: History) -> Iterator[Markup]:
    if history.evaluations:
        headings = ("data", "tokens", "baseline", "its perplexity", "perplexity", "change", "KL per token", "same top token", "when")
        yield table(
            "Evaluations, the newest first",
            headings,
            [_evaluation(each) for each in history.evaluations[::-1][:MOST_ROWS]],
            (1, *range(3, 8)),
        )
    else:
        example = "bigq eval OUT --data FILE --baseline MODEL"
        yield element("p", "Not evaluated. ", element("code", example), " adds its result here.")
    if history.outdated:
        yield element("p", f"{_counted(history.outdated, 'evaluation')} of weights that are not there any more: left out.")


def _evaluation(judged: Judged) -> list[object]:
    before, after = judged.baseline_perplexity, judged.perplexity
    kl = "–" if judged.kl is None else f"{judged.kl:.4g}" + ("" if judged.kl_stderr is None else f" ± {judged.kl_stderr:.1g}")
    return [
        f"{judged.data}, {judged.samples} × {judged.seqlen}" + ("" if judged.dtype == "auto" else f", {judged.dtype}"),
        judged.tokens,
        "–" if judged.baseline is None else "source model" if judged.of_source else judged.baseline,
        "–" if before is None else _figure(before),
        _figure(after),
        f"{100 * (after / before - 1):+.2f} %" if before and after < math.inf else "–",
        kl,
        "–" if judged.top1_agreement is None else f"{100 * judged.top1_agreement:.1f} %",
        _when(judged.at),
    ]


def _errors(history: History, pictures: Pictures) -> Iterator[Markup]:
    what = ERRORS["gptq" if history.config is None else history.config.method]
    if not history.linears:
        yield element("p", "No Linear is quantized yet.")
        return
    yield element("p", f"{what} A small error is not a small loss: Linears whose outputs matter more forgive less.")
    if pictures.errors is not None:
        legend = "Hatched: left as it is. Empty: not done, or the block has no such Linear. Colours are logarithmic."
        legend += " Not all blocks and Linears are shown." if pictures.cut else ""
        legend += "" if history.head is None else f" The output head, {history.head.name}, has an error of {history.head.error:.2e}."
        yield element("figure", element("div", Markup(pictures.errors), class_="wide", tabindex="0"), element("figcaption", legend))
    headings = ("Linear", "block", "error", "shape", "bits", "group", "damping")
    yield table(f"The {min(WORST, len(history.linears))} largest errors", headings, map(_linear, history.worst(WORST)), range(1, 7))
    raised = [linear for linear in history.linears if linear.raised]
    if raised:
        yield element("p", "The Hessian could not be factored with the damping asked for, so more was used:")
        rows = [[linear.name, _block(linear.block), f"{linear.asked:g}", f"{linear.damping:g}", f"{linear.error:.2e}"] for linear in raised]
        yield _bounded(
            f"Damping raised: {_counted(len(raised), 'Linear')}", ("Linear", "block", "asked for", "used", "error"), rows, range(1, 5)
        )
    elif history.config is None or history.config.method != "rtn":
        yield element("p", "No Linear needed more damping than asked for.")
    if history.left_out:
        rows = [[left.name, _block(left.block), left.reason] for left in sorted(history.left_out, key=lambda left: left.wanted)]
        yield _bounded(f"Left unquantized: {_counted(len(rows), 'Linear')}", ("Linear", "block", "why"), rows, (1,))


def _linear(linear: LinearResult) -> list[object]:
    m, n = linear.shape
    group = "row" if linear.group_size == -1 else linear.group_size
    damping = joined((f"{linear.damping:g}", element("b", " raised") if linear.raised else ""))
    return [linear.name, _block(linear.block), f"{linear.error:.2e}", f"{m} × {n}", linear.bits, group, damping]


def _bounded(caption: str, headings: Sequence[str], rows: Sequence[Sequence[object]], numbers: Sequence[int]) -> Markup:
    """A table that is folded where it is long, and cut where it is very long."""
    shown = table(caption, headings, rows[:MOST_ROWS], numbers)
    if len(rows) > MOST_ROWS:
        shown = joined((shown, element("p", f"… and {len(rows) - MOST_ROWS} more.")))
    return element("details", element("summary", caption), shown) if len(rows) > 12 else shown


def _time(history: History, picture: str | None) -> Iterator[Markup]:
    timed = [(number, run) for number, run in enumerate(history.runs, 1) if run.seconds is not None]
    if not timed:
        yield element("p", "No run has ended with a word on its time.")
        return
    if picture is not None:
        yield element("figure", element("div", Markup(picture), class_="wide", tabindex="0"))
    if len(timed) < len(history.runs):
        untold = _counted(len(history.runs) - len(timed), "run")
        yield element("p", f"Not in this: {untold} without a word on the time, because of a kill or because it still goes on.")
    waiting = sum(sum(run.waiting.values()) for _, run in timed)
    total = sum(run.seconds or 0.0 for _, run in timed)
    yield element(
        "p",
        f"{_duration(total)} in all. What computes waited for files or the host for {waiting:.1f} s of it ({_percent(waiting, total)}).",
    )
    phases = phases_of([run for _, run in timed])
    rows: list[list[object]] = []
    for name in phases:
        seconds = sum(run.by_phase.get(name, 0.0) for _, run in timed)
        rows.append([name, f"{seconds:.1f}", _percent(seconds, total)])
    outside = max(0.0, total - sum(sum(run.by_phase.values()) for _, run in timed))
    rows.append(["outside phases (starting, planning, between)", f"{outside:.1f}", _percent(outside, total)])
    yield _bounded("Seconds by phase, all runs", ("phase", "seconds", "part"), rows, (1, 2))


def _memory(history: History) -> Iterator[Markup]:
    rows: list[list[object]] = []
    for number, run in enumerate(history.runs, 1):
        for where, planned, peak in (("host", run.planned_host, run.host_peak), ("device", run.planned_device, run.device_peak)):
            if planned is not None or peak is not None:
                off = "–" if not planned or peak is None else f"{100 * (peak / planned - 1):+.1f} %"
                rows.append([f"run {number}, {where}", _size(planned), _size(peak), off])
    if rows:
        yield _bounded("Peak memory, predicted and measured", ("run", "predicted", "measured", "difference"), rows, (1, 2, 3))
    else:
        yield element("p", "What memory the runs took is not recorded.")
    parameters = "" if history.parameters is None else f", {history.parameters:,} parameters"
    pairs: list[tuple[str, object]] = [
        ("source", UNKNOWN if history.source_bytes is None else show_size(history.source_bytes) + parameters),
        ("output", show_size(history.output_bytes) + ("" if history.finished else " so far")),
    ]
    if history.gguf_bytes is not None:
        shards = show_size(history.output_bytes - history.gguf_bytes)
        pairs.append(("of that", f"model.gguf {show_size(history.gguf_bytes)}, shards {shards}: the model twice"))
    if history.linear_bits is not None:
        pairs.append(
            ("quantized Linears", f"{history.linear_bits:.3f} bits per weight: codes, scales and all that the format stores beside them")
        )
    if history.all_bits is not None:
        of = "whole checkpoint" if history.gguf_bytes is None else "all shards"
        pairs.append((of, f"{history.all_bits:.3f} bits per parameter"))
    yield facts(pairs)


def _runs(history: History) -> Iterator[Markup]:
    headings = ("run", "begun", "ended", "time", "blocks there before", "read", "written", "machine")
    rows = [
        [
            number,
            _when(run.at),
            run.outcome,
            "–" if run.seconds is None else _duration(run.seconds),
            "–" if run.resumed is None else run.resumed,
            _size(run.bytes_read),
            _size(run.bytes_written),
            run.machine,
        ]
        for number, run in enumerate(history.runs, 1)
    ]
    yield _bounded(_counted(len(rows), "run"), headings, rows, (3, 4, 5, 6)) if rows else element("p", "No run is recorded.")
    told = [
        f"run {number}: {said}" for number, run in enumerate(history.runs, 1) for said in (*run.notes, *([run.said] if run.said else []))
    ]
    if told:
        yield element("h3", "What was unusual")
        yield element("ul", *(element("li", said) for said in told[:MOST_ROWS]))


def _blocks(history: History) -> str:
    return f"{history.blocks_done} of {history.blocks or 'an unknown number'} done"


def _block(block: int | None) -> object:
    return "–" if block is None else block


def _where(block: int | None) -> str:
    return "output head" if block is None else f"block {block}"


def _of(judged: Judged) -> str:
    """Whose perplexity the baseline's is, behind the figure."""
    return "before" if judged.of_source else f"is {judged.baseline_name}'s"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _when(at: str) -> str:
    """A time as records have it, for people: to the minute where it is one."""
    return f"{at[:10]} {at[11:16]} UTC" if at.endswith("+00:00") and len(at) == 25 else at


def _size(count: int | None) -> str:
    return "–" if count is None else show_size(count)


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else show_duration(seconds)


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole > 0 else "–"


def _figure(value: Any) -> str:
    return f"{value:.3f}" if value < 1000 else f"{value:.3g}" if value < math.inf else "over 1e12"
