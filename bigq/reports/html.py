"""The report of a job or a conversion as one HTML file: no script, nothing fetched, light or dark as the reader's system is.

Pure: a history and pictures of it become text. ``bigq.reports.write`` draws the pictures.
"""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterator

from bigq.config import JobConfig
from bigq.data.given import GIVEN
from bigq.inspect.evaluations import EvaluationResult, current_results
from bigq.inspect.history import History
from bigq.job.command import flags
from bigq.progress.sizes import show_size
from bigq.reports import html_quality, html_resources
from bigq.reports.document import document
from bigq.reports.figures import count_of, duration, perplexity, place, when
from bigq.reports.html_quality import Pictures
from bigq.reports.html_resources import UNKNOWN
from bigq.reports.markup import Markup, element, facts, join
from bigq.reports.method import method_text
from bigq.version import __version__

STATES = {
    "finished": "finished",
    "running": "running: this report shows its state so far",
    "unknown": "may be running on another machine: this report shows its last known state",
    "not begun": "not begun",
}
UNFINISHED = "not finished ({}): this report shows its state so far; run the same command again to resume it"


def render(history: History, pictures: Pictures) -> str:
    """The page."""
    parts = [
        _header(history),
        _section("Job" if history.conversion is None else "Conversion", _facts(history)),
        _section("Quality", *html_quality.quality(history)),
        _section("Error of each Linear", *html_quality.errors(history, pictures)),
    ]
    if history.conversion is None:
        parts.append(_section("Time", *html_resources.time(history, pictures.time)))
        parts.append(_section("Memory and size", *html_resources.memory(history), html_resources.sizes(history)))
        parts.append(_section("Runs", *html_resources.runs(history)))
    else:  # the job's resources do not describe a folder that was converted from its output
        parts.append(_section("Size", html_resources.sizes(history)))
    if history.damaged:
        parts.append(_section("Damaged records", element("ul", *(element("li", each) for each in history.damaged))))
    footer = element("footer", f"Written by bigq {__version__} from the records in {history.out}/.bigq.")
    return document(f"{history.name}: bigq report", element("main", *parts, footer))


def _section(title: str, *inner: object) -> Markup:
    return element("section", element("h2", title), *inner)


def _header(history: History) -> Markup:
    state = STATES.get(history.state, UNFINISHED.format(history.state))
    if history.conversion is not None and history.is_finished:
        state = f"converted from {history.conversion.format_before} to {history.conversion.format}"
    tiles = [
        element("div", element("span", label), element("strong", value), element("span", below)) for label, value, below in _tiles(history)
    ]
    return element(
        "header",
        element("p", "bigq report", class_="kicker"),
        element("h1", history.name),
        element("p", state, class_="state " + ("good" if history.is_finished else "open")),
        element("div", *tiles, class_="tiles"),
    )


def _tiles(history: History) -> Iterator[tuple[str, str, str]]:
    """(label, figure, small print) of the most important figures."""
    if history.source_bytes and history.is_finished:
        part = f"{100 * history.output_bytes / history.source_bytes:.0f} % of {show_size(history.source_bytes)}"
        if history.gguf_bytes is not None:
            part += f"; {show_size(history.gguf_bytes)} of it model.gguf"
        yield "size", show_size(history.output_bytes), part
    elif history.conversion is not None:
        yield "size", show_size(history.output_bytes), f"{show_size(history.conversion.source_bytes)} before the conversion"
    else:
        yield "written", show_size(history.output_bytes), _blocks(history)
    if history.linear_bits is not None:
        of = "the whole checkpoint" if history.gguf_bytes is None else "all shards"
        average = "" if history.all_bits is None else f"{history.all_bits:.2f} over {of}"
        yield "bits per weight", f"{history.linear_bits:.2f}", average or "with scales and zero points"
    if history.evaluations:
        last = sorted(current_results(history.evaluations), key=lambda each: each.of_source)[-1]
        before = "no baseline" if last.baseline_perplexity is None else f"{perplexity(last.baseline_perplexity)} {_baseline(last)}"
        yield "perplexity", perplexity(last.perplexity), before
    worst = history.largest_errors(1)
    if worst:
        yield "worst Linear", f"{worst[0].error:.1e}", f"{place(worst[0].block)}, {worst[0].name}"
    seconds = [run.seconds for run in history.runs if run.seconds is not None]
    if seconds:
        others = len(history.runs) - len(seconds)
        yield "time", duration(sum(seconds)), count_of(len(history.runs), "run") + (f", {others} of unknown length" if others else "")


def _facts(history: History) -> Markup:
    last = history.runs[-1] if history.runs else None
    pairs: list[tuple[str, object]] = []
    if history.conversion is not None:
        pairs += _conversion(history)
    if last is not None:
        pairs.append(("model", element("code", last.model or UNKNOWN)))
        if last.folder is not None and last.folder != last.model:
            pairs.append(("read from", element("code", last.folder)))
    if history.conversion is None:
        pairs.append(("output", element("code", history.out)))
    if history.config is not None:
        pairs += settings(history.config)
        pairs.append(("output head", _head(history, history.config)))
    if last is not None:
        first = history.runs[0]
        given = next((run for run in history.runs if run.command), None)
        pairs.append(("command", UNKNOWN if given is None else element("code", shlex.join(["bigq", *given.command]))))
        pairs.append(("begun", when(first.at)))
        if last is not first:
            pairs.append(("last run", f"{when(last.at)}; {len(history.runs)} in all"))
        pairs.append(("machine", last.machine))
        pairs.append(("versions", ", ".join(f"{name} {version}" for name, version in last.versions.items()) or UNKNOWN))
    pairs.append(("blocks", _blocks(history)))
    return facts(pairs)


def _conversion(history: History) -> Iterator[tuple[str, object]]:
    """How a folder was converted; what follows it describes the job that quantized the model."""
    converted = history.conversion
    assert converted is not None
    yield "converted", f"{when(converted.at)} by bigq {converted.bigq}"
    yield "format before", converted.format_before
    yield "format", converted.format
    yield "converted from", element("code", converted.source)
    yield "output", element("code", history.out)
    if history.config is None and not history.runs:
        yield "quantized by", "another tool, or a job whose record was not there"


def settings(config: JobConfig) -> list[tuple[str, object]]:
    """The settings of a job."""
    scheme = config.scheme
    groups = "one group per row" if scheme.group_size == -1 else f"groups of {scheme.group_size}"
    zeros = "symmetric" if scheme.symmetric else "asymmetric"
    extra = [] if scheme.order == "natural" else [f"{scheme.order} order"]
    extra += [] if scheme.scales == "minmax" else ["scales by search"]
    extra += [f"{scheme.sweeps} sweep{'s' * (scheme.sweeps > 1)}"] if scheme.sweeps else []
    extra += [f"scales of {scheme.scale_bits} significant bits"] if scheme.scale_bits is not None else []
    bits = f"{scheme.bits} bits" if config.bits_per_weight is None else f"at most {config.bits_per_weight:g} bits per weight"
    pairs: list[tuple[str, object]] = [("weights", ", ".join([bits, groups, zeros, *extra]))]
    order = "true-sequential" if config.true_sequential else "all Linears of a block at once"
    calibrated = method_text(config).calibrated
    how = f"{config.method}, {order}, damping {scheme.damping}" if calibrated else config.method
    how += f", upstream error corrected with alpha {config.alpha}" if config.method == "gptaq" else ""
    pairs.append(("method", how))
    if config.rotate:
        pairs.append(("rotation", "folded into the weights: the residual stream, and the values of attention heads"))
    if config.rules:
        pairs.append(("rules", join((element("code", rule) for rule in _rules(config)), " ")))
    shards = ": model.gguf, and shards in gptq_v2" if config.format == "gguf" else ""
    pairs.append(("format", config.output_format + shards))
    if calibrated:
        text = "data given in Python" if config.calibration == GIVEN else config.calibration
        rows = f"{config.samples} × {config.seqlen} tokens of {text}, seed {config.seed}"
        pairs.append(("calibration", rows))
        attention = ", fused attention" if config.attention == "fused" else ""
        pairs.append(("forward passes", f"{config.dtype} precision, {config.batch or 'as many as fit'} rows at once{attention}"))
    return pairs


def _head(history: History, config: JobConfig) -> str:
    if history.head is not None:
        return f"{history.head.name}, quantized"
    if not config.lm_head or any(left.block is None for left in history.left_out):
        return "unquantized"
    return "unquantized, by a rule" if history.is_finished else "to be quantized"


def _rules(config: JobConfig) -> list[str]:
    words = flags(config)
    return [f"{flag} {shlex.quote(value)}" for flag, value in itertools.pairwise(words) if flag in ("--rule", "--skip")]


def _blocks(history: History) -> str:
    return f"{history.blocks_done} of {history.blocks or 'an unknown number'} done"


def _baseline(result: EvaluationResult) -> str:
    """The small print after a baseline's perplexity: which model the baseline is."""
    return "before" if result.of_source else f"is that of {result.baseline_name}"
