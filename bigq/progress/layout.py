"""Text for people in lines of at most 60 columns: labelled entries, wrapped with their label once."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator

#: Columns of every line. Half a screen, or a phone.
WIDTH = 60
#: Columns before the text of an entry: two spaces, the label with its colon, a space.
INDENT = 11


def entry(label: str, parts: str | Iterable[str], indent: int = INDENT) -> list[str]:
    """Lines ``  label:   text``; further lines are indented to the text.

    label: may be empty. parts: one text, wrapped between words; or several, separated by commas and wrapped between them if each fits on
    a line.
    """
    room = WIDTH - indent
    lines = wrapped(parts, room) if isinstance(parts, str) else list(_packed(list(parts), room))
    heads = [(f"  {label}:" if label else "").ljust(indent)] + [" " * indent] * len(lines)
    if len(heads[0]) > indent:
        raise ValueError(f"{label}: is too long a label for {indent} columns")
    return [(head + line).rstrip() for head, line in zip(heads, lines or [""], strict=False)]


def wrapped(text: str, width: int) -> list[str]:
    """A text in lines of at most ``width`` columns, wrapped between words, and within words that are longer than a line."""
    return textwrap.wrap(text, width, break_long_words=True, break_on_hyphens=False)


def rewrapped(lines: Iterable[str], indent: int) -> list[str]:
    """Lines of labelled text, whose text begins at column ``indent``, wrapped if they are too wide; headings are wrapped by words."""
    found = []
    for line in lines:
        if len(line) <= WIDTH:
            found.append(line)
        elif line.startswith("  "):
            first, *rest = wrapped(line[indent:], WIDTH - indent)
            found += [line[:indent] + first, *(" " * indent + each for each in rest)]
        else:
            first, *rest = textwrap.wrap(line, WIDTH, subsequent_indent="  ", break_on_hyphens=False)
            found += [first, *rest]
    return found


def shortened(name: str, room: int) -> str:
    """A name of at most ``room`` columns: the middle of a longer one is left out."""
    if len(name) <= room:
        return name
    head = max(0, (room - 1) // 3)
    return f"{name[:head]}…{name[len(name) - (room - 1 - head) :]}"


def _packed(parts: list[str], room: int) -> Iterator[str]:
    line = ""
    for i, part in enumerate(parts):
        part += "," if i + 1 < len(parts) else ""
        if line and len(line) + 1 + len(part) <= room:
            line += f" {part}"
            continue
        if line:
            yield line
        *whole, line = wrapped(part, room) or [""]
        yield from whole
    if line:
        yield line
