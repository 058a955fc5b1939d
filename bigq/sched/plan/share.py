"""What share of the weights in blocks stays unquantized, and why. Pure functions.

Vectors do not count, such as biases and the weights of norms. What the user's rules skip counts as quantized: only what bigq itself leaves
out is said, and refused if it is too much.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from bigq.errors import UsageError
from bigq.job.adapt import Adapted
from bigq.sched.plan.shape import BlockShape, LeftShape, LinearShape, ModelShape

#: The share that may stay unquantized without --allow-partial.
MOST = 0.5
#: How many names a reason lists.
NAMED = 2
BY_FORMAT = "does not fit the format"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Weights that bigq leaves unquantized. total: elements of all weights in blocks. left: those that stay, summed over blocks by name."""

    total: int = 0
    left: tuple[LeftShape, ...] = ()

    @property
    def share(self) -> float:
        return sum(each.size for each in self.left) / max(1, self.total)

    def text(self) -> str:
        """The share and the reasons, each with its own share and names; empty if nothing is left out."""
        if not self.left:
            return ""
        reasons = []
        for why in dict.fromkeys(each.why for each in self.left):
            of_reason = sorted((each for each in self.left if each.why == why), key=lambda each: -each.size)
            names = ", ".join(each.name for each in of_reason[:NAMED])
            more = f" and {len(of_reason) - NAMED} more" if len(of_reason) > NAMED else ""
            reasons.append(f"{names}{more}: {why} ({percent(sum(each.size for each in of_reason) / self.total)})")
        return f"{percent(self.share)} of the weights in blocks unquantized; {'; '.join(reasons)}"

    def to_json(self) -> dict[str, Any]:
        return {"share": self.share, "weights": [{"name": each.name, "elements": each.size, "why": each.why} for each in self.left]}


NOTHING_KEPT = Kept()


def percent(share: float) -> str:
    """Such as "12 %", "0.4 %" and "less than 0.1 %"."""
    if share < 0.001:
        return "less than 0.1 %"
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.1f} %"


def kept_weights(shape: ModelShape, adapted: Adapted) -> Kept:
    """What a job on a model leaves unquantized."""
    left: dict[tuple[str, str, bool], int] = {}
    total = 0
    for i, block in enumerate(shape.blocks):
        prefix = f"{shape.path}.{i}."
        for size, each in _weights(block):
            total += size
            if isinstance(each, LeftShape):
                skipped = each.linear and adapted.skipped_by_user(prefix + each.name)
                why = None if skipped else each.why
            else:
                why = BY_FORMAT if adapted.leaves_out(prefix + each.name) else None
            if why is not None:
                key = (each.name, why, isinstance(each, LinearShape) or each.linear)
                left[key] = left.get(key, 0) + size
    return Kept(total=total, left=tuple(LeftShape(name, size, why, linear) for (name, why, linear), size in left.items()))


def _weights(block: BlockShape) -> Iterable[tuple[int, LinearShape | LeftShape]]:
    """The weights of a block with their elements; of all experts of a bank those of the first."""
    yield from ((linear.m * linear.n, linear) for linear in block.linears)
    yield from ((bank.experts * linear.m * linear.n, linear) for bank in block.banks for linear in bank.linears)
    yield from ((left.size, left) for left in block.left)


def require_share(shape: ModelShape, adapted: Adapted) -> Kept:
    """What stays unquantized. Raises UsageError if it is too much and the job does not allow it."""
    kept = kept_weights(shape, adapted)
    if kept.share > MOST and not adapted.config.allow_partial:
        other = f"--format {adapted.instead}, which holds all Linears, or " if adapted.instead is not None else ""
        before = "".join(f"{each}; " for each in adapted.said)
        raise UsageError(f"{before}this job would leave {kept.text()}; use {other}--allow-partial to go on with the rest")
    return kept
