"""The result file and the page, from records of runs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from quality_bench.settings import Run


def records(work: Path, runs: Iterable[Run]) -> list[dict[str, Any]]:
    """Those that are there."""
    return [json.loads(path.read_text()) for run in runs if (path := work / "runs" / f"{run.name}.json").exists()]


def write_result(work: Path, models: Path, runs: Iterable[Run], out: Path) -> None:
    raise NotImplementedError


def write_page(out: Path) -> None:
    raise NotImplementedError
