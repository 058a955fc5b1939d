"""Pictures of a report as SVG elements. Only this module imports matplotlib, which is optional.

Text and lines have the colour of the text around them (``currentColor``), so one picture serves light and dark pages. Data has colours
that colour-blind people can tell apart: viridis, and the palette of Okabe and Ito. Texts may hold anything.
"""

from __future__ import annotations

import contextlib
import html
import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bigq.errors import ResourceError

#: A placeholder for ``currentColor`` while matplotlib draws; no data uses this colour.
_INK = "#010203"
_SETTINGS: Mapping[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "bigq",
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "text.parse_math": False,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "hatch.color": _INK,
    "hatch.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
#: Colours of the longest phases; the others share one.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
_REST = "#8a8a8a"
REST, OUTSIDE = "other phases", "outside phases"
#: Width of a picture, in inches.
WIDTH = 11.0
#: The maximum number of squares with written values, and of bars.
MAX_WRITTEN, MAX_BARS = 150, 40

Cell = tuple[int, int]


def heat_map(rows: Sequence[str], columns: int, values: Mapping[Cell, float], marked: Mapping[Cell, str], title: str) -> str:
    """Values by (row, column) on a logarithmic scale of colours; a row per kind of Linear, a column per block.

    values: at least 0. marked: squares without a value that are hatched, with the reason; other squares stay empty.
    title: describes the picture for screen readers. Raises ResourceError where matplotlib is missing.
    """
    with _matplotlib() as (figure_of, patches, colormaps, norms):
        written = len(rows) * columns <= MAX_WRITTEN
        figure = figure_of((min(WIDTH, 3.5 + 0.8 * columns), 0.95 + (0.36 if written else 0.3) * len(rows)))
        axes = figure.add_subplot()
        positive = [value for value in values.values() if value > 0]
        low, high = (min(positive), max(positive)) if positive else (1e-6, 1.0)
        norm = norms.LogNorm(low, high if high > low * 1.01 else low * 10)
        colours = colormaps["viridis"]
        titles = {}
        for (row, column), value in values.items():
            red, green, blue, _ = colour = colours(norm(max(value, low)))
            square = patches.Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=colour, edgecolor="none", gid=f"cell-{row}-{column}")
            _put(axes, square)
            titles[f"cell-{row}-{column}"] = f"block {column}, {rows[row]}: {value:.3g}"
            if written:
                ink = "#ffffff" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.45 else "#000000"
                axes.text(column, row, f"{value:.1e}".replace("e-0", "e-"), ha="center", va="center", fontsize=8, color=ink)
        for (row, column), why in marked.items():
            square = patches.Rectangle(
                (column - 0.5, row - 0.5), 1, 1, facecolor="none", edgecolor=_INK, hatch="////", linewidth=0, gid=f"cell-{row}-{column}"
            )
            _put(axes, square)
            titles[f"cell-{row}-{column}"] = f"block {column}, {rows[row]}: {why}"
        axes.set(xlim=(-0.5, columns - 0.5), ylim=(len(rows) - 0.5, -0.5), xlabel="block")
        step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500) if columns <= 24 * step or step == 500)
        axes.set_xticks(range(0, columns, step))
        axes.set_yticks(range(len(rows)), [_shorten(name) for name in rows])
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        _colour_bar(figure, axes, norm, colours)
        return _svg(figure, "heat", title, titles)


def _put(axes: Any, square: Any) -> None:
    """Add a square that is excluded from the layout: with many squares the layout would take most of the time."""
    square.set_in_layout(False)
    axes.add_patch(square)


def _colour_bar(figure: Any, axes: Any, norm: Any, colours: Any) -> None:
    """A colour bar next to the map, made of rectangles, since matplotlib's own is a bitmap."""
    bar = axes.inset_axes((1.015, 0.0, 0.016, 1.0))
    low, high = math.log10(norm.vmin), math.log10(norm.vmax)
    steps = 64
    for i in range(steps):
        bar.axhspan(low + (high - low) * i / steps, low + (high - low) * (i + 1) / steps, facecolor=colours(i / (steps - 1)))
    bar.set(xlim=(0, 1), ylim=(low, high), xticks=[])
    decades = list(range(math.ceil(low), math.floor(high) + 1))
    places = decades[:: max(1, len(decades) // 6)] if len(decades) > 1 else [low, high]
    bar.set_yticks(places, [f"{10**place:.0e}".replace("e-0", "e-") for place in places])
    bar.yaxis.tick_right()
    bar.tick_params(length=2, labelsize=9)
    bar.set_title("error", fontsize=9, loc="left")
    for spine in bar.spines.values():
        spine.set_visible(False)


def stacked_bars(labels: Sequence[str], totals: Sequence[float], parts: Sequence[Mapping[str, float]], title: str) -> str:
    """Seconds by phase, a bar per run, for the last ``MAX_BARS`` runs; time outside all phases is a separate part.

    All but the longest phases share one part. title: as for ``heat_map``. Raises ResourceError where matplotlib is missing.
    """
    labels, totals, parts = labels[-MAX_BARS:], totals[-MAX_BARS:], parts[-MAX_BARS:]
    sums: dict[str, float] = {}
    for part in parts:
        for name, seconds in part.items():
            sums[name] = sums.get(name, 0.0) + seconds
    largest = sorted(sums, key=lambda name: -sums[name])[: len(COLOURS)]
    shown = {name: [part.get(name, 0.0) for part in parts] for name in largest}
    rest = [sum(seconds for name, seconds in part.items() if name not in largest) for part in parts]
    outside = [max(0.0, total - sum(part.values())) for total, part in zip(totals, parts, strict=True)]
    series = [(name, shown[name], colour) for name, colour in zip(largest, COLOURS, strict=False)]
    series += [(REST, rest, _REST)] if any(rest) else []
    series += [(OUTSIDE, outside, "none")] if any(outside) else []
    unit, scale = _unit(max(totals, default=0.0))
    with _matplotlib() as (figure_of, _, _, _):
        figure = figure_of((WIDTH, 1.35 + 0.42 * len(labels)))
        axes = figure.add_subplot()
        left = [0.0] * len(labels)
        titles = {}
        for number, (name, values, colour) in enumerate(series):
            scaled = [value / scale for value in values]
            edge = {"edgecolor": _INK, "hatch": "...", "linewidth": 0.5} if colour == "none" else {"linewidth": 0}
            bars = axes.barh(range(len(labels)), scaled, left=left, height=0.62, color=colour, label=_shorten(name), **edge)
            for run, bar in enumerate(bars):
                bar.set_gid(f"part-{run}-{number}")
                titles[f"part-{run}-{number}"] = f"{labels[run]}: {name} {values[run]:.1f} s"
            left = [before + value for before, value in zip(left, scaled, strict=True)]
        axes.set(ylim=(len(labels) - 0.5, -0.5), xlim=(0, max([*left, 1e-9]) * 1.01), xlabel=unit)
        axes.set_yticks(range(len(labels)), [_shorten(label) for label in labels])
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        if series:
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=9, frameon=False, handlelength=1.1, columnspacing=1.2, fontsize=9)
        return _svg(figure, "time", title, titles)


def _unit(seconds: float) -> tuple[str, float]:
    return ("hours", 3600.0) if seconds >= 7200 else ("minutes", 60.0) if seconds >= 300 else ("seconds", 1.0)


def _shorten(text: str, most: int = 40) -> str:
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-most // 2 + 1 :]}"


@contextlib.contextmanager
def _matplotlib() -> Iterator[tuple[Any, Any, Any, Any]]:
    """(a function from a size in inches to a figure, patches, colour maps, norms). Raises ResourceError where it is not installed."""
    try:
        import matplotlib
        from matplotlib import colors, patches
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ResourceError(
            f"bigq report draws with matplotlib, which cannot be imported ({str(error)[:100]}); pip install bigq[report]"
        ) from None

    def figure_of(size: tuple[float, float]) -> Any:
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        return figure

    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **_SETTINGS}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings about characters that a font lacks; the page uses the reader's fonts
        yield figure_of, patches, matplotlib.colormaps, colors


def _svg(figure: Any, name: str, title: str, titles: Mapping[str, str]) -> str:
    """The picture as an element for a page. name: the prefix of its ids. titles: tooltips of elements, by id."""
    buffer = io.StringIO()
    figure.patch.set_visible(False)
    for axes in figure.axes:
        axes.patch.set_visible(False)
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    head, _, body = svg.partition(">")
    box = re.search(r'viewBox="0 0 ([\d.]+) [\d.]+"', head)
    assert box is not None, "matplotlib writes a viewBox"
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, count=1, flags=re.DOTALL)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, count=1, flags=re.DOTALL)
    body = body.replace(_INK, "currentColor").replace("'DejaVu Sans'", "sans-serif")
    body = re.sub(r'(?<= id=")|(?<=url\(#)|(?<=href="#)', f"{name}-", body)
    body = re.sub(
        rf'<g id="{name}-((?:cell|part)-\d+-\d+)">', lambda found: f"{found[0]}<title>{html.escape(titles[found[1]])}</title>", body
    )
    label = html.escape(title)
    size = f'class="picture" style="max-width:{float(box[1]):.0f}pt"'
    return f'<svg {box[0]} {size} role="img" aria-label="{label}"><title>{label}</title>{body}'
