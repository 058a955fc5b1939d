"""The formats ``w8a8-int8`` and ``fp8``: variants of compressed-tensors for readers that multiply 8-bit numbers, as vLLM does.

For a Linear X with K inputs and N outputs, in whole rows:

    X.weight         int8 or fp8 (E4M3) [N, K]
    X.weight_scale   [N, 1]                      dtype of the original weight

Readers quantize the inputs as well, to the same type: for each token with a scale that they find (``input_activations``, dynamic), or
with one for all tokens (static):

    X.input_scale    fp32 [1]                    the largest magnitude of a calibration input over the largest number of the type
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from bigq.errors import CheckpointError, UsageError
from bigq.io.formats.base import InputType, PackedLinear, PackedWeight, require_tensor
from bigq.io.formats.gptq import check_scales
from bigq.io.formats.numbers import FLOATS, Numbers, wrong_input_number
from bigq.io.index import TensorInfo
from bigq.kernels.pack import pack, unpack
from bigq.scheme import QuantScheme

BITS = 8
#: The code of 0, of int8 and of E4M3: there the codes are the places of its numbers in ascending order (``bigq.kernels.grid_spec``).
INT8_ZERO, E4M3_ZERO = 128, 126
#: The exponent and fraction of E4M3 that are NaN.
E4M3_NAN = 0x7F


class EightBits(Numbers):
    """dtype: of the numbers. zero: the zero point of all rows. largest: the largest number of an input."""

    bits = (BITS,)
    weight_suffixes = ("weight_scale", "weight")
    group_sizes = (-1,)
    fixed: ClassVar[Mapping[str, int | bool]] = {"bits": BITS, "group_size": -1, "symmetric": True}
    dtype: ClassVar[torch.dtype]
    zero: ClassVar[int]
    largest: ClassVar[float]

    @abstractmethod
    def numbers(self, codes: Tensor) -> Tensor:
        """Codes, uint8, as the numbers that are stored."""

    @abstractmethod
    def codes(self, numbers: Tensor) -> Tensor:
        """The codes, uint8, of stored numbers."""

    def input_number(self, largest: float) -> Tensor:
        # Inputs that were all 0 say nothing of a scale, by which readers divide.
        scale = torch.tensor([largest or self.largest]) / self.largest
        return scale.clamp(min=torch.finfo(torch.float32).tiny)

    def multiples(self, bits: int) -> tuple[int, int]:
        # Of kernels on CUDA.
        return 16, 16

    def store(self, prefix: str, stored: PackedWeight, scheme: QuantScheme, dtype: torch.dtype) -> dict[str, Tensor]:
        words, scales, zeros = stored
        if scales.shape[1] != 1 or bool((zeros != self.zero).any()):
            raise ValueError(f"{prefix}: {self.name} holds symmetric codes in whole rows only")
        exact = scales.to(dtype)
        if not torch.equal(exact.to(scales.dtype), scales):
            raise UsageError(f"{prefix}: its scales are not exact in {dtype}; quantize the original model with --scale-bits 8")
        return {
            f"{prefix}.weight_scale": exact.contiguous(),
            f"{prefix}.weight": self.numbers(unpack(words, BITS).T).contiguous(),
        }

    def layout(
        self, prefix: str, linear: PackedLinear, symmetric: bool, dtype: torch.dtype
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        kinds = (dtype, (linear.outputs, 1)), (self.dtype, (linear.outputs, linear.inputs)), (torch.float32, (1,))
        return {f"{prefix}.{suffix}": kind for suffix, kind in zip(self.suffixes(True), kinds, strict=False)}

    def read(self, prefix: str, get: Callable[[str], Tensor], scheme: QuantScheme) -> PackedWeight:
        scales, numbers = (get(f"{prefix}.{name}") for name in self.weight_suffixes)
        if numbers.ndim != 2 or scales.shape != (len(numbers), 1) or numbers.shape[1] % 4:
            raise CheckpointError(f"{prefix}: the shapes of weight and weight_scale do not match")
        codes = self.codes(numbers).T.contiguous()
        return PackedWeight(pack(codes, BITS), scales, torch.full_like(scales, self.zero, dtype=torch.uint8))

    def geometry(self, prefix: str, tensors: Mapping[str, TensorInfo]) -> PackedLinear:
        scales, weight = (require_tensor(tensors, f"{prefix}.{suffix}") for suffix in self.weight_suffixes)
        self.require_input_number(prefix, tensors)
        fits = len(weight.shape) == 2 and min(weight.shape) > 0 and not weight.shape[1] % 4 and scales.shape == (weight.shape[0], 1)
        if not fits or weight.dtype != self.dtype or scales.dtype not in FLOATS:
            raise CheckpointError(f"tensor {weight.name}: its shape or dtype does not match that of its weight_scale")
        return PackedLinear(bits=BITS, outputs=weight.shape[0], inputs=weight.shape[1], groups=1)

    def values_per_check(self, suffix: str, info: TensorInfo) -> int:
        return 1

    def check_values(self, suffix: str, linear: PackedLinear, piece: Tensor, start: int) -> tuple[str | None, tuple[int, int] | None]:
        if suffix == self.input_suffix:
            return wrong_input_number(piece), None
        return check_scales(piece) if suffix == "weight_scale" else self.check_numbers(piece), None

    def check_numbers(self, piece: Tensor) -> str | None:
        """What is wrong with a piece of the numbers, or None."""
        return None


class W8A8Int8(EightBits):
    """int8 numbers: a code less 128."""

    name = "w8a8-int8"
    variant = "int-quantized"
    weights: ClassVar[Mapping[str, Any]] = {"num_bits": BITS, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    inputs: ClassVar[Mapping[str, Any]] = {"num_bits": BITS, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    quantized_inputs = "int8"
    dtype = torch.int8
    zero = INT8_ZERO
    largest = 127.0

    def numbers(self, codes: Tensor) -> Tensor:
        return (codes.to(torch.int16) - INT8_ZERO).to(torch.int8)

    def codes(self, numbers: Tensor) -> Tensor:
        return (numbers.to(torch.int16) + INT8_ZERO).to(torch.uint8)


class Fp8(EightBits):
    """Numbers of E4M3."""

    name = "fp8"
    variant = "float-quantized"
    weights: ClassVar[Mapping[str, Any]] = {**W8A8Int8.weights, "type": "float"}
    inputs: ClassVar[Mapping[str, Any]] = {**W8A8Int8.inputs, "type": "float"}
    quantized_inputs: ClassVar[InputType] = "e4m3"
    points = "e4m3"
    dtype = torch.float8_e4m3fn
    zero = 0  # a codebook has no zero points
    largest = 448.0

    def numbers(self, codes: Tensor) -> Tensor:
        signed = codes.to(torch.int16) - E4M3_ZERO
        return (signed.abs() | (signed < 0).to(torch.int16) << 7).to(torch.uint8).view(torch.float8_e4m3fn)

    def codes(self, numbers: Tensor) -> Tensor:
        patterns = numbers.view(torch.uint8).to(torch.int16)
        size = patterns & 0x7F
        return torch.where(patterns > 0x7F, E4M3_ZERO - size, E4M3_ZERO + size).to(torch.uint8)

    def check_numbers(self, piece: Tensor) -> str | None:
        return "holds NaN" if bool(((piece.view(torch.uint8) & 0x7F) == E4M3_NAN).any()) else None


class StaticW8A8Int8(W8A8Int8):
    """With one scale for the inputs of all tokens."""

    inputs: ClassVar[Mapping[str, Any]] = {**W8A8Int8.inputs, "strategy": "tensor", "dynamic": False}
    input_suffix = "input_scale"


class StaticFp8(Fp8):
    """With one scale for the inputs of all tokens."""

    inputs: ClassVar[Mapping[str, Any]] = {**Fp8.inputs, "strategy": "tensor", "dynamic": False}
    input_suffix = "input_scale"
