"""The folds of a plan in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from bigq.methods.base import Scaling
from bigq.sched.plan.shape import BlockShape, FoldShape
from bigq.solver.scaling import LEAST_TOKENS


def fold_text(blocks: Sequence[BlockShape], scaling: Scaling) -> str:
    """Which modules and matrices divide, and which inputs nothing divides: by their names in the blocks."""
    used = [fold for block in blocks for fold in _used(block, scaling)]
    producers = dict.fromkeys(fold.producer for fold in used if fold.divider != "expert")
    inside = dict.fromkeys(fold.producer for fold in used if fold.divider == "expert")
    without = dict.fromkeys(name for block in blocks for name in _unfolded(block, scaling))
    text = f"into {', '.join(producers)}" if producers else "nowhere"
    text += f"; inside each expert of {LEAST_TOKENS} tokens or more into {', '.join(inside)}" if inside else ""
    return text + (f"; no module divides the inputs of {', '.join(without)}" if without else "")


def fold_records(blocks: Sequence[BlockShape], scaling: Scaling) -> list[dict[str, Any]]:
    """The same for every block."""
    return [
        {
            "block": i,
            "folds": [{"producer": fold.producer, "readers": list(fold.readers)} for fold in _used(block, scaling)],
            "without": list(_unfolded(block, scaling)),
        }
        for i, block in enumerate(blocks)
    ]


def _used(block: BlockShape, scaling: Scaling) -> Iterator[FoldShape]:
    return (fold for fold in block.folds if scaling.takes(fold.divider))


def _unfolded(block: BlockShape, scaling: Scaling) -> Iterator[str]:
    """What has no fold, or one that the method does not use."""
    yield from block.unfolded
    for fold in block.folds:
        if not scaling.takes(fold.divider):
            yield from fold.readers
