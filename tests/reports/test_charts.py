"""Pictures of a report: well-formed whatever the names, every value in its place, colours that follow the page."""

from __future__ import annotations

import itertools
import math
import re
import xml.etree.ElementTree as ET

import pytest

from bigq.reports.charts import COLOURS, MAX_BARS, OUTSIDE, REST, heat_map, stacked_bars

NASTY = ["<script>alert(1)</script>", "$x^{2$", "a&b\"'", "\\frac", "名前", "x" * 300]


def parsed(svg: str) -> ET.Element:
    return ET.fromstring(svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" ', 1))


def cells(svg: str, kind: str = "heat-cell") -> dict[str, str]:
    """The title of each part of a picture, by its id."""
    found = {}
    for group in parsed(svg).iter("{http://www.w3.org/2000/svg}g"):
        title = group.find("{http://www.w3.org/2000/svg}title")
        if group.get("id", "").startswith(kind) and title is not None:
            found[group.get("id", "").removeprefix(f"{kind}-")] = title.text or ""
    return found


def fills(svg: str) -> dict[str, str]:
    """The colour of each cell, by its id."""
    return dict(re.findall(r'<g id="heat-cell-(\d+-\d+)">.*?fill: (\w+|#[0-9a-f]{6})', svg, re.DOTALL))


@pytest.mark.parametrize("blocks", [1, 2, 126, 300])
def test_every_linear_has_its_square(blocks: int) -> None:
    values = {(row, column): 10.0 ** -(row + column % 3) for row in (0, 2) for column in range(blocks)}
    svg = heat_map(["q", "k", "v"], blocks, values, {(1, 0): "by rule"}, "title")
    found = cells(svg)
    assert len(found) == 2 * blocks + 1
    assert found["0-0"] == "block 0, q: 1" and found["1-0"] == "block 0, k: by rule"
    labels = {text.text for text in parsed(svg).iter("{http://www.w3.org/2000/svg}text")}
    assert {"q", "k", "v", "block", "0"} <= labels
    assert len(labels) < 80, "labels would run into each other"


def test_colours_are_logarithmic_and_grow_brighter() -> None:
    svg = heat_map(["q"], 5, {(0, i): 10.0 ** (i - 7) for i in range(5)}, {}, "title")
    brightness = [sum(int(fill[i : i + 2], 16) * weight for i, weight in ((1, 0.3), (3, 0.59), (5, 0.11))) for fill in fills(svg).values()]
    assert brightness == sorted(brightness)
    steps = [b - a for a, b in itertools.pairwise(brightness)]
    assert max(steps) < 2.5 * min(steps), "decades are about as far from each other in brightness"


def test_errors_that_are_all_alike_or_zero_are_drawn() -> None:
    for values in ({(0, 0): 0.0}, {(0, 0): 1e-3, (0, 1): 1e-3}, {(0, 0): 0.0, (0, 1): 5e-324, (0, 2): 1e300}):
        svg = heat_map(["q"], 3, values, {}, "title")
        assert len(fills(svg)) == len(values)


def test_names_are_text_and_nothing_else() -> None:
    svg = heat_map(NASTY, 2, {(row, 0): 1.0 for row in range(len(NASTY))}, {(0, 1): "</title><b>"}, "<i>")
    assert "<script" not in svg and "<b>" not in svg and "<i>" not in svg
    assert cells(svg)["0-1"].endswith("</title><b>")
    texts = [text.text or "" for text in parsed(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert {*NASTY[:5]} <= {*texts} and max(map(len, texts)) <= 40
    bars = stacked_bars(NASTY, [1.0] * 6, [{name: 0.1} for name in NASTY], "<i>")
    assert parsed(bars) is not None and "<script" not in bars


def test_pictures_follow_the_page_and_one_another() -> None:
    svg = heat_map(["q"], 1, {(0, 0): 1.0}, {(0, 0): "x"}, "t")
    bars = stacked_bars(["run 1"], [3.0], [{"solve": 1.0}], "t")
    for picture in (svg, bars):
        assert "currentColor" in picture and "#010203" not in picture and "#000000" not in re.sub(r"<text.*?</text>", "", picture)
        assert "<style" not in picture and "DejaVu" not in picture and "base64" not in picture and "<image" not in picture
    ids = [set(re.findall(r' id="([^"]+)"', picture)) for picture in (svg, bars)]
    assert ids[0] and ids[1] and not ids[0] & ids[1], "they can stand on one page"
    assert svg == heat_map(["q"], 1, {(0, 0): 1.0}, {(0, 0): "x"}, "t"), "the same every time"


def widths(svg: str) -> dict[str, float]:
    """The widths of the parts of bars, by run and series, in the picture's units."""
    found = {}
    for key, path in re.findall(r'<g id="time-part-(\d+-\d+)">.*?<path d="(.*?)"', svg, re.DOTALL):
        across = [float(x) for x in re.findall(r"[ML] (-?[\d.]+) ", path)]
        found[key] = max(across) - min(across)
    return found


def test_bars_are_as_long_as_phases_took() -> None:
    svg = stacked_bars(["run 1", "run 2"], [10.0, 4.0], [{"solve": 6.0, "load": 2.0}, {"solve": 1.0, "load": 3.0}], "title")
    width = widths(svg)
    assert width["0-0"] == pytest.approx(6 * width["1-0"]) and width["1-1"] == pytest.approx(1.5 * width["0-1"])
    assert width["0-2"] == pytest.approx(width["0-1"], rel=1e-3), "what is left of the whole"
    assert cells(svg, "time-part")["0-2"] == f"run 1: {OUTSIDE} 2.0 s"


def test_phases_beyond_the_colours_are_one() -> None:
    phases = {f"p{i}": float(20 - i) for i in range(12)}
    titles = cells(stacked_bars(["run 1"], [sum(phases.values())], [phases], "title"), "time-part")
    assert len(titles) == len(COLOURS) + 1
    assert titles[f"0-{len(COLOURS)}"] == f"run 1: {REST} {sum(float(20 - i) for i in range(len(COLOURS), 12)):.1f} s"


def test_of_many_runs_the_last_are_drawn() -> None:
    svg = stacked_bars([f"run {i}" for i in range(500)], [1.0] * 500, [{"solve": 1.0}] * 500, "title")
    titles = cells(svg, "time-part")
    assert len(titles) == MAX_BARS and titles["0-0"].startswith(f"run {500 - MAX_BARS}:")
    assert math.isfinite(float(re.search(r'viewBox="0 0 [\d.]+ ([\d.]+)"', svg)[1]))  # type: ignore[index]
