"""The sections of a report about quality: evaluations, and the error of each Linear."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from bigq.inspect.evaluations import EvaluationResult
from bigq.inspect.history import History
from bigq.inspect.linear_results import LinearResult
from bigq.reports.figures import block_number, count_of, error_text, perplexity, when
from bigq.reports.markup import Markup, element, folded_table, join, table
from bigq.reports.method import method_text

#: Rows of tables that are shown.
WORST, MOST_ROWS = 20, 200


@dataclass(frozen=True, slots=True)
class Pictures:
    """SVG elements; None where there is nothing to draw. Made by ``bigq.reports.charts``, and safe to put into a page.

    cut: whether ``errors`` shows only some blocks or Linears.
    """

    errors: str | None
    time: str | None
    cut: bool = False


def quality(history: History) -> Iterator[Markup]:
    """The results of ``bigq eval``."""
    if history.evaluations:
        headings = ("data", "tokens", "baseline", "its perplexity", "perplexity", "change", "KL per token", "same top token", "when")
        rows = [_evaluation(each) for each in history.evaluations[::-1][:MOST_ROWS]]
        yield table("Evaluations, the newest first", headings, rows, (1, *range(3, 8)))
    else:
        example = "bigq eval OUT --data FILE --baseline MODEL"
        yield element("p", "Not evaluated. ", element("code", example), " adds its result here.")
    if history.outdated:
        yield element("p", f"Not shown: {count_of(history.outdated, 'evaluation')} of weights that have changed since.")


def _evaluation(result: EvaluationResult) -> list[object]:
    before, after = result.baseline_perplexity, result.perplexity
    kl = "–" if result.kl is None else f"{result.kl:.4g}" + ("" if result.kl_stderr is None else f" ± {result.kl_stderr:.1g}")
    return [
        f"{result.data}, {result.samples} × {result.seqlen}" + ("" if result.dtype == "auto" else f", {result.dtype}"),
        result.tokens,
        "–" if result.baseline is None else "source model" if result.of_source else result.baseline,
        "–" if before is None else perplexity(before),
        perplexity(after),
        f"{100 * (after / before - 1):+.2f} %" if before and after < math.inf else "–",
        kl,
        "–" if result.top1_agreement is None else f"{100 * result.top1_agreement:.1f} %",
        when(result.at),
    ]


def errors(history: History, pictures: Pictures) -> Iterator[Markup]:
    """The error of each Linear, the damping that was raised, and the Linears that stay unquantized."""
    worst = history.largest_errors(WORST)
    if not history.linears:
        yield element("p", "No Linear is quantized yet.")
        return
    if not worst:
        yield element("p", "The errors are unknown: another tool quantized the model, and its checkpoint does not hold them.")
        return
    yield element(
        "p",
        method_text(history.config).error_meaning,
        " The loss of the model also depends on how much each Linear matters, which these errors do not measure.",
    )
    if pictures.errors is not None:
        legend = "Hatched: unquantized. Empty: not done yet, or the block has no such Linear. Colours are logarithmic."
        legend += " Not all blocks and Linears are shown." if pictures.cut else ""
        head = history.head
        legend += "" if head is None or head.error is None else f" The output head, {head.name}, has an error of {head.error:.2e}."
        yield element("figure", element("div", Markup(pictures.errors), class_="wide", tabindex="0"), element("figcaption", legend))
    headings = ("Linear", "block", "error", "shape", "bits", "group", "damping")
    yield table(f"The {len(worst)} largest errors", headings, map(_linear, worst), range(1, 7))
    yield from _damping(history)
    yield from _dead_inputs(history)
    yield from _experts(history)
    if history.left_out:
        rows = [[left.name, block_number(left.block), left.reason] for left in sorted(history.left_out, key=lambda left: left.wanted)]
        yield folded_table(f"Unquantized: {count_of(len(rows), 'Linear')}", ("Linear", "block", "reason"), rows, (1,), most=MOST_ROWS)


def _damping(history: History) -> Iterator[Markup]:
    raised = [linear for linear in history.linears if linear.has_raised_damping]
    if raised:
        yield element("p", "The Hessian could not be factored with the requested damping, so the damping was raised:")
        rows = [[each.name, block_number(each.block), f"{each.asked:g}", f"{each.damping:g}", error_text(each.error)] for each in raised]
        caption = f"Damping raised: {count_of(len(raised), 'Linear')}"
        yield folded_table(caption, ("Linear", "block", "asked for", "used", "error"), rows, range(1, 5), most=MOST_ROWS)
    elif method_text(history.config).calibrated:
        yield element("p", "No Linear needed more damping than asked for.")


def _dead_inputs(history: History) -> Iterator[Markup]:
    many = [linear for linear in history.linears if linear.has_many_dead_inputs]
    if many:
        many.sort(key=lambda linear: -linear.dead_inputs / linear.shape[1])
        yield element(
            "p",
            "More than a tenth of the inputs of these Linears were 0 in every calibration token. The weights of such inputs are only "
            "rounded to nearest. More or other calibration text may reach them.",
        )
        rows = [[each.name, block_number(each.block), f"{each.dead_inputs} of {each.shape[1]}", error_text(each.error)] for each in many]
        caption = f"Dead inputs: {count_of(len(many), 'Linear')}"
        yield folded_table(caption, ("Linear", "block", "dead inputs", "error"), rows, range(1, 4), most=MOST_ROWS)


def _experts(history: History) -> Iterator[Markup]:
    """The calibration tokens of each layer's experts."""
    layers: dict[int | None, list[LinearResult]] = {}
    for linear in history.linears:
        if linear.tokens:
            layers.setdefault(linear.block, []).append(linear)
    if layers:
        yield element(
            "p",
            "An expert is solved with the calibration tokens that are routed to it. One that gets none is rounded to nearest. More "
            "calibration text gives each more.",
        )
        headings = ("block", "experts", "fewest tokens", "median", "most", "matrices rounded to nearest")
        rows: list[list[object]] = []
        for block, matrices in sorted(layers.items(), key=lambda item: item[0] or 0):
            tokens, rounded = matrices[0].tokens, sum(each.rounded for each in matrices)
            of = f"{rounded} of {sum(each.count for each in matrices)}"
            rows.append([block_number(block), len(tokens), min(tokens), f"{statistics.median(tokens):g}", max(tokens), of])
        yield folded_table(f"Experts: {count_of(len(rows), 'layer')}", headings, rows, range(1, 6), most=MOST_ROWS)


def _linear(linear: LinearResult) -> list[object]:
    m, n = linear.shape
    group = "row" if linear.group_size == -1 else linear.group_size
    damping = join(("–" if linear.damping is None else f"{linear.damping:g}", element("b", " raised") if linear.has_raised_damping else ""))
    return [linear.name, block_number(linear.block), error_text(linear.error), f"{m} × {n}", linear.bits, group, damping]
