"""Keeps other libraries from writing to stderr, for ``--json`` and ``--quiet``."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """In this context logging, Python's warnings and tqdm's bars print nothing. bigq's own live line, which uses tqdm too, stays."""
    import tqdm

    bars: Any = tqdm.tqdm

    disabled, show, begin = logging.root.manager.disable, warnings.showwarning, bars.__init__

    def begin_disabled(bar: Any, *args: Any, **how: Any) -> None:
        if not type(bar).__module__.startswith("bigq."):
            how["disable"] = True
        begin(bar, *args, **how)

    logging.disable(logging.CRITICAL)
    warnings.showwarning = _show_nothing
    bars.__init__ = begin_disabled
    try:
        yield
    finally:
        logging.disable(disabled)
        warnings.showwarning = show
        bars.__init__ = begin


def _show_nothing(*_: Any, **__: Any) -> None:
    """In place of ``warnings.showwarning``."""
