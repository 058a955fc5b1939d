"""Where a subject's model and text are from, as results say it. Imports neither torch nor bigq."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quality_bench.settings import Subject


def facts(models: Path, subject: Subject) -> dict[str, Any]:
    """From MODELS: the model's origin and hash; the text's name, sizes and hashes."""
    model = json.loads((models / subject.model / "origin.json").read_text())
    return {"model": model, **json.loads((models / "texts" / subject.name / "facts.json").read_text())}
