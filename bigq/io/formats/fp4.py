"""The formats ``nvfp4``, ``nvfp4-w4a4`` and ``mxfp4``: variants of compressed-tensors with 4-bit floats (E2M1) in small groups.

For a Linear X with K inputs and N outputs:

    X.weight_packed         uint8 [N, K/2]    two numbers in a byte, the first one in the low half
    X.weight_scale          nvfp4: fp8 (E4M3) [N, K/16]; mxfp4: uint8 [N, K/32], exponents of E8M0
    X.weight_global_scale   nvfp4: fp32 [1], by which scales are divided
    X.input_global_scale    nvfp4-w4a4: fp32 [1], the same for inputs: 448 · 6 over the largest magnitude of a calibration input

Readers of nvfp4-w4a4 round inputs as well, in groups of 16 with scales that they find (``input_activations``, dynamic "local").

bigq writes the global scale 256 for every Linear. Readers take several Linears as one, as q, k and v, and need the same for all of them.
E4M3 has its full precision for scales from 2^-14 to 1.75 then, which are weights of up to 10.5.
"""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from bigq.errors import CheckpointError, UsageError
from bigq.io.formats.base import PackedLinear, PackedWeight, require_tensor
from bigq.io.formats.gptq import check_scales
from bigq.io.formats.numbers import Numbers, wrong_input_number
from bigq.io.index import TensorInfo
from bigq.kernels.decode import E8M0_BIAS, E8M0_NAN, exponents
from bigq.kernels.pack import pack, unpack
from bigq.scheme import QuantScheme

BITS = 4
GLOBAL_SCALE = 256.0
#: The largest scale of E4M3 times the largest number of E2M1: what the largest input is multiplied to.
LARGEST_SCALED = 448.0 * 6.0
_WEIGHTS: Mapping[str, Any] = {"num_bits": BITS, "type": "float", "symmetric": True, "dynamic": False}


class Fp4(Numbers):
    """group: inputs that share a scale. scale_dtype: of the stored scales."""

    mark = "weight_packed"
    points = "e2m1"
    bits = (BITS,)
    group: ClassVar[int]
    scale_dtype: ClassVar[torch.dtype]

    @abstractmethod
    def stored_scales(self, prefix: str, scales: Tensor) -> list[Tensor]:
        """The tensors that hold scales. Raises UsageError where they are not exact."""

    @abstractmethod
    def scales(self, stored: list[Tensor]) -> Tensor:
        """The scales, fp32, of the tensors that hold them."""

    def multiples(self, bits: int) -> tuple[int, int]:
        return 1, self.group

    def store(self, prefix: str, stored: PackedWeight, scheme: QuantScheme, dtype: torch.dtype) -> dict[str, Tensor]:
        words, scales, _ = stored
        halves = _patterns(words.device)[unpack(words, BITS).T.int()]
        tensors = (halves[:, ::2] | halves[:, 1::2] << 4, *self.stored_scales(prefix, scales))
        return {f"{prefix}.{suffix}": t.contiguous() for suffix, t in zip(self.weight_suffixes, tensors, strict=True)}

    def layout(
        self, prefix: str, linear: PackedLinear, symmetric: bool, dtype: torch.dtype
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        m, n = linear.outputs, linear.inputs
        kinds = (torch.uint8, (m, n // 2)), (self.scale_dtype, (m, linear.groups)), (torch.float32, (1,)), (torch.float32, (1,))
        return {f"{prefix}.{suffix}": kind for suffix, kind in zip(self.suffixes(True), kinds, strict=False)}

    def read(self, prefix: str, get: Callable[[str], Tensor], scheme: QuantScheme) -> PackedWeight:
        packed, *stored = (get(f"{prefix}.{suffix}") for suffix in self.weight_suffixes)
        m, n = (packed.shape[0], 2 * packed.shape[1]) if packed.ndim == 2 else (0, 0)
        if n % self.group or tuple(stored[0].shape) != (m, n // self.group) or any(math.prod(t.shape) != 1 for t in stored[1:]):
            raise CheckpointError(f"{prefix}: the shapes of weight_packed and its scales do not match")
        halves = torch.stack([packed & 15, packed >> 4], -1).view(m, n)
        codes = _places(packed.device)[halves.int()].T.contiguous()
        scales = self.scales(stored)
        return PackedWeight(pack(codes, BITS), scales, torch.zeros_like(scales, dtype=torch.uint8))

    def geometry(self, prefix: str, tensors: Mapping[str, TensorInfo]) -> PackedLinear:
        packed, scales, *whole = (require_tensor(tensors, f"{prefix}.{suffix}") for suffix in self.weight_suffixes)
        self.require_input_number(prefix, tensors)
        m, n = (packed.shape[0], 2 * packed.shape[1]) if len(packed.shape) == 2 else (0, 0)
        shapes = not min(m, n) or n % self.group or scales.shape != (m, n // self.group) or any(math.prod(t.shape) != 1 for t in whole)
        if shapes or packed.dtype != torch.uint8 or scales.dtype != self.scale_dtype or any(t.dtype != torch.float32 for t in whole):
            raise CheckpointError(f"tensor {packed.name}: its shape or dtype does not match those of the tensors beside it")
        return PackedLinear(bits=BITS, outputs=m, inputs=n, groups=n // self.group)

    def values_per_check(self, suffix: str, info: TensorInfo) -> int:
        return 1

    def check_values(self, suffix: str, linear: PackedLinear, piece: Tensor, start: int) -> tuple[str | None, tuple[int, int] | None]:
        if suffix == self.input_suffix:
            return wrong_input_number(piece), None
        return None if suffix == "weight_packed" else self.check_scales(piece), None

    def check_scales(self, piece: Tensor) -> str | None:
        """What is wrong with a piece of the scales, or None."""
        return check_scales(piece.float())


class NvFp4(Fp4):
    """Scales in E4M3, with one for all of them."""

    name = "nvfp4"
    variant = "nvfp4-pack-quantized"
    weight_suffixes = ("weight_packed", "weight_scale", "weight_global_scale")
    group = 16
    fixed: ClassVar[Mapping[str, int | bool]] = {"bits": BITS, "group_size": group, "symmetric": True}
    scale_form = "e4m3"
    scale_dtype = torch.float8_e4m3fn
    weights: ClassVar[Mapping[str, Any]] = {
        **_WEIGHTS,
        "strategy": "tensor_group",
        "group_size": group,
        "scale_dtype": "torch.float8_e4m3fn",
    }

    def stored_scales(self, prefix: str, scales: Tensor) -> list[Tensor]:
        wide = scales.float() * GLOBAL_SCALE
        found = wide.to(torch.float8_e4m3fn)
        if not torch.equal(found.float(), wide):
            raise UsageError(f"{prefix}: its scales are not exact in {self.name}; quantize the original model with --format {self.name}")
        return [found, torch.tensor([GLOBAL_SCALE])]

    def scales(self, stored: list[Tensor]) -> Tensor:
        return stored[0].float() / stored[1].float().reshape(1, 1)


class NvFp4W4A4(NvFp4):
    """With inputs that readers round to the same numbers."""

    name = "nvfp4-w4a4"
    inputs: ClassVar[Mapping[str, Any]] = {**NvFp4.weights, "dynamic": "local"}
    quantized_inputs = "e2m1"
    input_suffix = "input_global_scale"

    def input_number(self, largest: float) -> Tensor:
        # Inputs that were all 0 say nothing of a scale. The inverse must be finite too.
        return (LARGEST_SCALED / torch.tensor([largest or LARGEST_SCALED])).clamp(max=1 / torch.finfo(torch.float32).tiny)


class MxFp4(Fp4):
    """Scales in E8M0: powers of two."""

    name = "mxfp4"
    variant = "mxfp4-pack-quantized"
    weight_suffixes = ("weight_packed", "weight_scale")
    group = 32
    fixed: ClassVar[Mapping[str, int | bool]] = {"bits": BITS, "group_size": group, "symmetric": True}
    scale_form = "e8m0"
    scale_dtype = torch.uint8
    weights: ClassVar[Mapping[str, Any]] = {**_WEIGHTS, "strategy": "group", "group_size": group, "scale_dtype": "torch.uint8"}

    def stored_scales(self, prefix: str, scales: Tensor) -> list[Tensor]:
        fraction, exponent = torch.frexp(scales.float())
        if not bool((fraction == 0.5).all()):
            raise UsageError(f"{prefix}: its scales are not exact in {self.name}; quantize the original model with --format {self.name}")
        return [(exponent - 1 + E8M0_BIAS).to(torch.uint8)]

    def scales(self, stored: list[Tensor]) -> Tensor:
        return exponents(stored[0])

    def check_scales(self, piece: Tensor) -> str | None:
        return "holds NaN" if bool((piece == E8M0_NAN).any()) else None


@functools.cache
def _patterns(device: torch.device) -> Tensor:
    """The four bits of each code, uint8 [16]: a sign, exponent and fraction. Codes are the places of the numbers in ascending order."""
    return torch.tensor([*range(15, 7, -1), *range(8)], dtype=torch.uint8, device=device)


@functools.cache
def _places(device: torch.device) -> Tensor:
    """The code of each four bits."""
    return torch.argsort(_patterns(device).int()).to(torch.uint8)
