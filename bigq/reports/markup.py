"""HTML from texts that may hold anything: whatever is not ``Markup`` is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

#: A table with more rows is folded.
FOLDED = 12


class Markup(str):
    """HTML that is not escaped any more."""

    __slots__ = ()


def escape(value: object) -> Markup:
    """Anything as HTML."""
    return value if isinstance(value, Markup) else Markup(html.escape(str(value)))


def element(name: str, *inner: object, **attributes: str) -> Markup:
    """An element; ``class_`` stands for class."""
    text = "".join(f' {key.rstrip("_").replace("_", "-")}="{html.escape(value)}"' for key, value in attributes.items())
    return Markup(f"<{name}{text}>{join(inner)}</{name}>")


def join(parts: Iterable[object], between: str = "") -> Markup:
    return Markup(escape(between).join(escape(part) for part in parts))


def table(caption: str, headings: Sequence[str], rows: Iterable[Sequence[object]], numbers: Sequence[int] = ()) -> Markup:
    """A table whose first cells are headers of their rows; it scrolls sideways where it is wider than the page.

    numbers: columns that are aligned to the right.
    """

    def cell(name: str, column: int, value: object, **attributes: str) -> Markup:
        return element(name, value, **attributes, **({"class_": "number"} if column in numbers else {}))

    head = element("tr", *(cell("th", i, heading, scope="col") for i, heading in enumerate(headings)))
    body = [
        element("tr", *(cell("th", i, value, scope="row") if i == 0 else cell("td", i, value) for i, value in enumerate(row)))
        for row in rows
    ]
    inner = element("table", element("caption", caption), element("thead", head), element("tbody", *body))
    return element("div", inner, class_="wide", tabindex="0", role="region", aria_label=caption)


def folded_table(caption: str, headings: Sequence[str], rows: Sequence[Sequence[object]], numbers: Sequence[int], *, most: int) -> Markup:
    """A table that is folded where it has many rows, and cut after ``most``."""
    shown = table(caption, headings, rows[:most], numbers)
    if len(rows) > most:
        shown = join((shown, element("p", f"… and {len(rows) - most} more.")))
    return element("details", element("summary", caption), shown) if len(rows) > FOLDED else shown


def facts(pairs: Iterable[tuple[str, object]]) -> Markup:
    """A list of names with their values."""
    return element("dl", *(join((element("dt", name), element("dd", value))) for name, value in pairs))
