"""What ``--quality`` stands for: values of other options, which may still be given one by one. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bigq.options import Resume, option
from bigq.scheme import WEIGHTS, QuantScheme
from bigq.vocabulary import MethodName, OrderName, QualityName, ScalesName


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """The options that a quality sets."""

    method: MethodName
    order: OrderName
    scales: ScalesName

    @property
    def of_scheme(self) -> Mapping[str, Any]:
        """The fields of QuantScheme."""
        return {"order": self.order, "scales": self.scales}

    @property
    def of_job(self) -> Mapping[str, Any]:
        """The other fields of JobConfig."""
        return {"method": self.method}

    @property
    def values(self) -> tuple[str, str, str]:
        return self.method, self.order, self.scales


#: docs/quality.md says what each costs and gives. "balanced" has the defaults of the classes.
PRESETS: Mapping[QualityName, Preset] = {
    "fast": Preset(method="gptq", order="activation", scales="minmax"),
    "balanced": Preset(method="gptq", order="group", scales="search"),
    "best": Preset(method="gptaq", order="group", scales="search"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Presetting:
    """The option itself. It is no field of a job, which holds what it stands for."""

    quality: QualityName = option(
        "balanced",
        help="what --method, --order and --scales are where they are not given: "
        + "; ".join(f"{name}: {', '.join(preset.values)}" for name, preset in PRESETS.items()),
        group=WEIGHTS,
        resume=Resume.REFUSED,
    )


def quality_of(method: MethodName, scheme: QuantScheme) -> QualityName | None:
    """The quality that stands for these options, or None."""
    return next((name for name, each in PRESETS.items() if each.values == (method, scheme.order, scheme.scales)), None)
