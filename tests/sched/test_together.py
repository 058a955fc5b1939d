"""Which jobs several processes share: all parts that they do not share are refused by name. Whole jobs: tests/e2e/test_ranks.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from bigq.config import JobConfig
from bigq.errors import UsageError
from bigq.methods import method_of
from bigq.sched.together import require_shareable


def job(banks: object = (), remote: object = None, **config: Any) -> Any:
    """What the function looks at. banks: of experts; remote: the server that the model stays on."""
    made = JobConfig(**config)
    pager = SimpleNamespace(banks=banks, remote=remote)
    return SimpleNamespace(config=made, method=method_of(made), pager=pager, rows=range(8), ranks=SimpleNamespace(count=2))


def test_gptq_and_gptaq_are_shared() -> None:
    for method in ("gptq", "gptaq"):
        require_shareable(job(method=method))


@pytest.mark.parametrize(
    ("what", "parts"),
    [
        ("--method rtn", {"method": "rtn"}),
        ("--method awq", {"method": "awq"}),
        ("--fold awq", {"fold": "awq"}),
        ("--fold smoothquant", {"fold": "smoothquant"}),
        ("--tune-steps", {"tune_steps": 4}),
        ("--bits-per-weight", {"bits_per_weight": 4.5}),
        ("a model with experts", {"banks": ("bank",)}),
        ("a model that stays on a server", {"remote": object()}),
    ],
)
def test_what_is_not_shared_is_refused_by_name(what: str, parts: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"^{what}: 2 processes cannot share such a job; start it in one process$"):
        require_shareable(job(**parts))
