"""The ``w8a8-int8`` format: compressed-tensors' variant "int-quantized", for readers that multiply int8 by int8, as vLLM does.

For a Linear X with K inputs and N outputs, at 8 bits, symmetric, in whole rows:

    X.weight         int8 [N, K]    code − 128
    X.weight_scale   [N, 1]         dtype of the original weight

Readers quantize the inputs as well: for each token to 8 bits, symmetric, with a scale that they find (``input_activations``, dynamic).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from bigq.errors import CheckpointError, UsageError
from bigq.io.formats.base import Format, Misfit, PackedLinear, PackedWeight, Quantization, require_tensor
from bigq.io.formats.compressed_tensors import CompressedTensors
from bigq.io.formats.gptq import check_scales
from bigq.io.index import TensorInfo
from bigq.kernels.pack import pack, unpack
from bigq.scheme import QuantScheme

BITS = 8
#: A code less this is the number that is stored.
MIDDLE = 128
VARIANT = "int-quantized"
_WEIGHTS = {"num_bits": BITS, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
_INPUTS = {"num_bits": BITS, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class W8A8Int8(CompressedTensors):
    """Names and config are those of compressed-tensors. All packed Linears have one scheme, so the config has one group."""

    name = "w8a8-int8"
    tag = "compressed-tensors"
    mark = "weight_scale"
    zeros = "weight_zero_point"
    spare: ClassVar[tuple[str, ...]] = ()
    takes_joined = False
    bits = (BITS,)
    group_sizes = (-1,)
    symmetric_only = True
    quantizes_inputs = True

    def suffixes(self, symmetric: bool) -> tuple[str, ...]:
        return ("weight_scale", "weight")

    def tensor(self, prefix: str, suffix: str) -> str:
        return f"{prefix}.{suffix}"

    def split(self, name: str) -> tuple[str, str]:
        return Format.split(self, name)

    def multiples(self, bits: int) -> tuple[int, int]:
        # Of kernels on CUDA.
        return 16, 16

    def misfit(
        self, m: int, n: int, scheme: QuantScheme, *, transposed: bool = False, joined: bool = False, expert: bool = False
    ) -> Misfit | None:
        if expert:
            return Misfit("joined", f"is of experts, which {self.name} does not hold")
        return super().misfit(m, n, scheme, transposed=transposed, joined=joined, expert=expert)

    def store(self, prefix: str, stored: PackedWeight, scheme: QuantScheme, dtype: torch.dtype) -> dict[str, Tensor]:
        words, scales, zeros = stored
        if scales.shape[1] != 1 or bool((zeros != MIDDLE).any()):
            raise ValueError(f"{prefix}: {self.name} holds symmetric codes in whole rows only")
        exact = scales.to(dtype)
        if not torch.equal(exact.to(scales.dtype), scales):
            raise UsageError(f"{prefix}: its scales are not exact in {dtype}; quantize the original model with --scale-bits 8")
        codes = unpack(words, BITS).T
        return {
            f"{prefix}.weight_scale": exact.contiguous(),
            f"{prefix}.weight": (codes.to(torch.int16) - MIDDLE).to(torch.int8).contiguous(),
        }

    def layout(
        self, prefix: str, linear: PackedLinear, symmetric: bool, dtype: torch.dtype
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {
            f"{prefix}.weight_scale": (dtype, (linear.outputs, 1)),
            f"{prefix}.weight": (torch.int8, (linear.outputs, linear.inputs)),
        }

    def read(self, prefix: str, get: Callable[[str], Tensor], scheme: QuantScheme) -> PackedWeight:
        scales, numbers = (get(f"{prefix}.{name}") for name in self.suffixes(True))
        if numbers.ndim != 2 or scales.shape != (len(numbers), 1) or numbers.shape[1] % 4:
            raise CheckpointError(f"{prefix}: the shapes of weight and weight_scale do not match")
        codes = (numbers.to(torch.int16) + MIDDLE).to(torch.uint8)
        return PackedWeight(pack(codes.T.contiguous(), BITS), scales, torch.full_like(scales, MIDDLE, dtype=torch.uint8))

    def geometry(self, prefix: str, tensors: Mapping[str, TensorInfo]) -> PackedLinear:
        scales, weight = (require_tensor(tensors, f"{prefix}.{suffix}") for suffix in self.suffixes(True))
        fits = len(weight.shape) == 2 and min(weight.shape) > 0 and not weight.shape[1] % 4 and scales.shape == (weight.shape[0], 1)
        if not fits or weight.dtype != torch.int8 or scales.dtype not in _FLOATS:
            raise CheckpointError(f"tensor {weight.name}: its shape or dtype does not match that of its weight_scale")
        return PackedLinear(bits=BITS, outputs=weight.shape[0], inputs=weight.shape[1], groups=1)

    def values_per_check(self, suffix: str, info: TensorInfo) -> int:
        return 1

    def check_values(self, suffix: str, linear: PackedLinear, piece: Tensor, start: int) -> tuple[str | None, tuple[int, int] | None]:
        return check_scales(piece) if suffix == "weight_scale" else None, None

    def config(self, job: Quantization) -> dict[str, Any]:
        found = super().config(job)
        for group in found["config_groups"].values():
            group["input_activations"] = dict(_INPUTS)
            group["format"] = VARIANT
        return {**found, "quant_method": "compressed-tensors", "format": VARIANT}


@dataclass(frozen=True, slots=True)
class W8A8Schemes:
    """A parsed quantization config whose packed Linears all have the scheme of ``W8A8Int8``."""

    path: Path
    format: Format

    def scheme(self, name: str) -> QuantScheme:
        return QuantScheme(bits=BITS, group_size=-1)


def is_w8a8(config: Mapping[str, Any]) -> bool:
    """Whether a ``quantization_config`` is one of ``W8A8Int8``: its weights, and inputs quantized for each token."""
    groups = config.get("config_groups")
    if config.get("quant_method") != "compressed-tensors" or config.get("format") != VARIANT or not isinstance(groups, dict) or not groups:
        return False
    return all(_says(group, "weights", _WEIGHTS) and _says(group, "input_activations", _INPUTS) for group in groups.values())


def _says(group: Any, part: str, values: Mapping[str, Any]) -> bool:
    said = group.get(part) if isinstance(group, dict) else None
    return isinstance(said, dict) and all(said.get(key) == value for key, value in values.items())
