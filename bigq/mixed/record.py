"""The record of chosen bits, OUT/.bigq/bits.json. Once it is there, the rules in it belong to the job as if they had been given."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigq import faults
from bigq.errors import CheckpointError, UsageError
from bigq.io.checksum import load_record, save_record
from bigq.io.folders import STATE_FOLDER
from bigq.scheme import Rule, frozen_rules

BITS_NAME = "bits.json"
_REMEDY = "restore it from a copy, or begin the job again in an empty folder"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenBits:
    """rules: in the order in which they follow those of the user. budget, reached: bits per weight. weights: how many got which bits.

    loss: what was measured, by name: of each kind of Linear and of each run of blocks, see ``bigq.mixed.loss``.
    """

    rules: tuple[Rule, ...]
    budget: float
    reached: float
    weights: Mapping[int, int]
    loss: Mapping[str, float]

    def text(self, linears: Mapping[int, int]) -> str:
        """The choice as text. linears: how many Linears got which bits."""
        counts = ", ".join(f"{count} Linears at {bits}" for bits, count in sorted(linears.items()))
        return f"{self.reached:.4g} per weight of {self.budget:g}: {counts}"

    def save(self, out: Path) -> None:
        """Freeze the choice. Raises ResourceError."""
        value = dataclasses.asdict(self)
        value["weights"] = {str(bits): count for bits, count in self.weights.items()}
        save_record(out / STATE_FOLDER / BITS_NAME, value)
        faults.point("bits.written")


def read_bits(out: Path) -> ChosenBits | None:
    """The chosen bits of the job in a folder; None before they are chosen. Raises CheckpointError if the record is damaged."""
    path = out / STATE_FOLDER / BITS_NAME
    value = load_record(path, _REMEDY)
    if value is None:
        return None
    try:
        return ChosenBits(
            rules=frozen_rules(value["rules"]),
            budget=float(value["budget"]),
            reached=float(value["reached"]),
            weights={int(bits): int(count) for bits, count in value["weights"].items()},
            loss={str(name): float(loss) for name, loss in value["loss"].items()},
        )
    except (UsageError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: is not a record of chosen bits; {_REMEDY}") from error


def with_chosen_rules(out: Path, request: dict[str, Any]) -> dict[str, Any]:
    """A request from job.json as if the chosen rules had been given; unchanged before bits are chosen. Raises CheckpointError."""
    settings = request.get("settings")
    if not isinstance(settings, dict) or settings.get("bits_per_weight") is None or (chosen := read_bits(out)) is None:
        return request
    rules = [{"pattern": rule.pattern, "overrides": dict(rule.overrides or {})} for rule in chosen.rules]
    given = settings.get("rules")
    changed = {"rules": [*given, *rules] if isinstance(given, list) else given, "chosen_rules": len(rules)}
    return {**request, "settings": {**settings, **changed}}
