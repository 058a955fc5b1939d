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
    sweeps: int

    @property
    def of_scheme(self) -> Mapping[str, Any]:
        """The fields of QuantScheme."""
        return {"order": self.order, "scales": self.scales, "sweeps": self.sweeps}

    @property
    def of_job(self) -> Mapping[str, Any]:
        """The other fields of JobConfig."""
        return {"method": self.method}

    @property
    def values(self) -> tuple[str, str, str, int]:
        return self.method, self.order, self.scales, self.sweeps


#: "balanced" has the defaults of the classes.
PRESETS: Mapping[QualityName, Preset] = {
    "fast": Preset(method="gptq", order="activation", scales="minmax", sweeps=0),
    "balanced": Preset(method="gptq", order="group", scales="search", sweeps=1),
    "best": Preset(method="gptaq", order="group", scales="search", sweeps=4),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Presetting:
    """The option itself. It is no field of a job, which holds what it stands for."""

    quality: QualityName = option(
        "balanced",
        help="what --method, --order, --scales and --sweeps are where they are not given: "
        + "; ".join(f"{name}: {', '.join(map(str, preset.values))}" for name, preset in PRESETS.items()),
        group=WEIGHTS,
        resume=Resume.REFUSED,
    )


def quality_of(method: MethodName, scheme: QuantScheme) -> QualityName | None:
    """The quality that stands for these options, or None."""
    return next((name for name, each in PRESETS.items() if each.values == (method, scheme.order, scheme.scales, scheme.sweeps)), None)
