"""A page around any content: the style sheet of reports, no script, nothing fetched. Imports no torch."""

from __future__ import annotations

from bigq.reports.markup import Markup, element, join
from bigq.reports.style import STYLE

#: What a page may do: nothing but show its own style.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def document(title: str, body: Markup, refresh: int | None = None) -> str:
    """A page that can load nothing and run nothing. refresh: seconds after which the browser asks for it again."""
    head = join(
        (
            Markup('<meta charset="utf-8">'),
            Markup(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'),
            *([] if refresh is None else [Markup(f'<meta http-equiv="refresh" content="{refresh}">')]),
            Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
            Markup('<meta name="color-scheme" content="light dark">'),
            element("title", title),
            element("style", Markup(STYLE)),
        ),
        "\n",
    )
    return f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'
