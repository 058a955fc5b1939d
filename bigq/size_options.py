"""Options that are sizes, such as budgets. Imports no torch."""

from __future__ import annotations

from typing import Any

from bigq.common_options import BUDGETS
from bigq.options import at_least, option
from bigq.progress.sizes import parse_size


def size_given(given: Any, label: str) -> Any:
    """Bytes of a size such as "72GiB"; other values unchanged. Raises UsageError, naming ``label``."""
    return parse_size(given, label) if isinstance(given, str) else given


def budget_option(help: str, **more: Any) -> Any:
    unset = "what is free"
    return option(
        None, help=help, group=BUDGETS, unit="bytes", placeholder="SIZE", unset=unset, convert=size_given, range=at_least(0), **more
    )
