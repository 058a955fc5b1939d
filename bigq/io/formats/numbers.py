"""Variants of ``compressed-tensors`` that store numbers, in a dtype of their own, instead of packed codes.

All packed Linears of a model have one scheme, that of the variant, so the config has one group. Some variants say that readers quantize
the inputs of Linears as well (``input_activations``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from bigq.errors import CheckpointError
from bigq.io.formats.base import Format, Quantization, require_tensor
from bigq.io.formats.compressed_tensors import CompressedTensors
from bigq.io.index import TensorInfo
from bigq.scheme import QuantScheme

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class Numbers(CompressedTensors):
    """variant: its name in configs. weights, inputs: what a config's group says of them; inputs that stay as they are have None.
    weight_suffixes: of the tensors of a weight; that for inputs comes after them."""

    tag = "compressed-tensors"
    mark = "weight_scale"
    zeros = "weight_zero_point"
    spare: ClassVar[tuple[str, ...]] = ()
    takes_joined = False
    variant: ClassVar[str]
    weights: ClassVar[Mapping[str, Any]]
    inputs: ClassVar[Mapping[str, Any] | None] = None
    weight_suffixes: ClassVar[tuple[str, ...]]

    def suffixes(self, symmetric: bool) -> tuple[str, ...]:
        return (*self.weight_suffixes, *([self.input_suffix] if self.input_suffix else []))

    def tensor(self, prefix: str, suffix: str) -> str:
        return f"{prefix}.{suffix}"

    def split(self, name: str) -> tuple[str, str]:
        return Format.split(self, name)

    def scheme(self) -> QuantScheme:
        """That of every packed Linear."""
        fixed: Mapping[str, Any] = self.fixed
        return QuantScheme(points=self.points, scale_form=self.scale_form, **fixed)

    def config(self, job: Quantization) -> dict[str, Any]:
        found = super().config(job)
        for group in found["config_groups"].values():
            group["weights"] = {**group["weights"], **self.weights}
            group["input_activations"] = None if self.inputs is None else dict(self.inputs)
            group["format"] = self.variant
        return {**found, "quant_method": "compressed-tensors", "format": self.variant}

    def require_input_number(self, prefix: str, tensors: Mapping[str, TensorInfo]) -> None:
        """Raise CheckpointError if the tensor for inputs is missing or no number."""
        if self.input_suffix:
            number = require_tensor(tensors, f"{prefix}.{self.input_suffix}")
            if math.prod(number.shape) != 1 or number.dtype not in FLOATS:
                raise CheckpointError(f"tensor {number.name}: is not one floating number")

    def describes(self, config: Mapping[str, Any]) -> bool:
        """Whether a ``quantization_config`` is of this variant, with weights and inputs as it has them."""
        groups = config.get("config_groups")
        if config.get("quant_method") != "compressed-tensors" or config.get("format") != self.variant:
            return False
        return isinstance(groups, dict) and bool(groups) and all(map(self._is_group, groups.values()))

    def _is_group(self, group: Any) -> bool:
        if not isinstance(group, dict) or group.get("output_activations") is not None:
            return False
        says = (self.inputs is None and group.get("input_activations") is None) or _says(group, "input_activations", self.inputs or {})
        return says and _says(group, "weights", self.weights)


def _says(group: Mapping[str, Any], part: str, values: Mapping[str, Any]) -> bool:
    said = group.get(part)
    return bool(values) and isinstance(said, dict) and all(said.get(key) == value for key, value in values.items())


def wrong_input_number(piece: Tensor) -> str | None:
    """What is wrong with the number for inputs, by which readers divide; None if nothing."""
    return None if bool((torch.isfinite(piece) & (piece > 0)).all()) else "is not a positive number"


@dataclass(frozen=True, slots=True)
class NumbersSchemes:
    """A parsed quantization config whose packed Linears all have the scheme of the format."""

    path: Path
    format: Numbers

    def scheme(self, name: str) -> QuantScheme:
        return self.format.scheme()
