"""The folds of a plan in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bigq.sched.plan.shape import BlockShape


def fold_text(blocks: Sequence[BlockShape]) -> str:
    """Which modules divide, and which inputs none divides: by their names in the blocks."""
    producers = dict.fromkeys(fold.producer for block in blocks for fold in block.folds)
    without = dict.fromkeys(name for block in blocks for name in block.unfolded)
    text = f"into {', '.join(producers)}" if producers else "nowhere"
    return text + (f"; no module divides the inputs of {', '.join(without)}" if without else "")


def fold_records(blocks: Sequence[BlockShape]) -> list[dict[str, Any]]:
    """The same for every block."""
    return [
        {
            "block": i,
            "folds": [{"producer": fold.producer, "readers": list(fold.readers)} for fold in block.folds],
            "without": list(block.unfolded),
        }
        for i, block in enumerate(blocks)
    ]
