"""What measurements aim at. A missed aim is not a failure of its step: ``--second`` looks for the cause."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

#: The finding of a step that holds its aims.
AIMS = "aims"


@dataclass(frozen=True, slots=True, kw_only=True)
class Aim:
    """A value that should be at least ``low`` and at most ``high``."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None

    @property
    def row(self) -> dict[str, Any]:
        bounds = [f"{sign} {bound:g}" for sign, bound in (("≥", self.low), ("≤", self.high)) if bound is not None]
        met = (self.low is None or self.value >= self.low) and (self.high is None or self.value <= self.high)
        return {"value": self.value, "aim": ", ".join(bounds), "met": met}


def as_finding(aims: Sequence[Aim]) -> dict[str, Any]:
    return {aim.name: aim.row for aim in aims}


def missed(step: Mapping[str, Any]) -> list[str]:
    """Names of the aims that a step's measurements missed."""
    return [name for name, row in step.get("found", {}).get(AIMS, {}).items() if not row["met"]]
