"""HTML from texts that may hold anything: whatever is not ``Markup`` is escaped on its way in."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence


class Markup(str):
    """HTML as it is to appear."""

    __slots__ = ()


def escaped(value: object) -> Markup:
    """Anything as HTML."""
    return value if isinstance(value, Markup) else Markup(html.escape(str(value)))


def element(name: str, *inner: object, **attributes: str) -> Markup:
    """An element; ``class_`` stands for class."""
    said = "".join(f' {key.rstrip("_").replace("_", "-")}="{html.escape(value)}"' for key, value in attributes.items())
    return Markup(f"<{name}{said}>{joined(inner)}</{name}>")


def joined(parts: Iterable[object], between: str = "") -> Markup:
    return Markup(escaped(between).join(escaped(part) for part in parts))


def table(caption: str, headings: Sequence[str], rows: Iterable[Sequence[object]], numbers: Sequence[int] = ()) -> Markup:
    """A table whose rows are headed by their first cells. numbers: columns that are aligned as numbers are."""

    def cell(name: str, column: int, value: object, **attributes: str) -> Markup:
        return element(name, value, **attributes, **({"class_": "number"} if column in numbers else {}))

    head = element("tr", *(cell("th", i, heading, scope="col") for i, heading in enumerate(headings)))
    body = [
        element("tr", *(cell("th", i, value, scope="row") if i == 0 else cell("td", i, value) for i, value in enumerate(row)))
        for row in rows
    ]
    whole = element("table", element("caption", caption), element("thead", head), element("tbody", *body))
    return element("div", whole, class_="wide", tabindex="0", role="region", aria_label=caption)


def facts(pairs: Iterable[tuple[str, object]]) -> Markup:
    """Names and what they stand for."""
    return element("dl", *(joined((element("dt", name), element("dd", value))) for name, value in pairs))
