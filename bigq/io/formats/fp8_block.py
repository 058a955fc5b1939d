"""The format ``fp8-block``: a variant of compressed-tensors with 8-bit floats (E4M3) in blocks of 128 × 128, as DeepSeek-V3 has them.

For a Linear X with K inputs and N outputs:

    X.weight         fp8 (E4M3) [N, K]
    X.weight_scale   fp32 [⌈N/128⌉, K/128]       other programs write the dtype of the original weight

Readers quantize the inputs as well: for each token and group of 128 inputs, with a scale that they find. So K is a multiple of 128.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from bigq.errors import CheckpointError
from bigq.io.formats.base import InputType, PackedLinear, PackedWeight, require_tensor
from bigq.io.formats.numbers import FLOATS
from bigq.io.formats.w8a8 import BITS, Fp8
from bigq.io.index import TensorInfo
from bigq.kernels.grid_spec import BLOCK_ROWS
from bigq.kernels.pack import pack, unpack
from bigq.scheme import QuantScheme

#: Inputs that share a scale, of weights and of inputs.
GROUP = 128


class Fp8Block(Fp8):
    """All rows of a block have its scale in memory."""

    name = "fp8-block"
    weights: ClassVar[Mapping[str, Any]] = {
        **Fp8.weights,
        "strategy": "block",
        "group_size": None,
        "block_structure": [BLOCK_ROWS, GROUP],
    }
    inputs: ClassVar[Mapping[str, Any]] = {**Fp8.inputs, "strategy": "group", "group_size": GROUP}
    quantized_inputs: ClassVar[InputType] = "e4m3-groups"
    scale_form = "block"
    group_sizes = (GROUP,)
    fixed: ClassVar[Mapping[str, int | bool]] = {"bits": BITS, "group_size": GROUP, "symmetric": True}
    outputs_of_parts = BLOCK_ROWS

    def multiples(self, bits: int) -> tuple[int, int]:
        return 16, GROUP

    def store(self, prefix: str, stored: PackedWeight, scheme: QuantScheme, dtype: torch.dtype) -> dict[str, Tensor]:
        words, scales, _ = stored
        blocks = scales[::BLOCK_ROWS].float().clone(memory_format=torch.contiguous_format)
        if not torch.equal(_of_rows(blocks, len(scales)), scales.float()):
            raise ValueError(f"{prefix}: {self.name} holds one scale for {BLOCK_ROWS} rows only")
        return {
            f"{prefix}.weight_scale": blocks,
            f"{prefix}.weight": self.numbers(unpack(words, BITS).T).contiguous(),
        }

    def layout(
        self, prefix: str, linear: PackedLinear, symmetric: bool, dtype: torch.dtype
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {
            f"{prefix}.weight_scale": (torch.float32, _blocks(linear.outputs, linear.inputs)),
            f"{prefix}.weight": (self.dtype, (linear.outputs, linear.inputs)),
        }

    def read(self, prefix: str, get: Callable[[str], Tensor], scheme: QuantScheme) -> PackedWeight:
        blocks, numbers = (get(f"{prefix}.{name}") for name in self.suffixes(True))
        if numbers.ndim != 2 or numbers.shape[1] % GROUP or tuple(blocks.shape) != _blocks(*numbers.shape):
            raise CheckpointError(f"{prefix}: the shapes of weight and weight_scale do not match")
        scales = _of_rows(blocks, len(numbers))
        return PackedWeight(pack(self.codes(numbers).T.contiguous(), BITS), scales, torch.zeros_like(scales, dtype=torch.uint8))

    def geometry(self, prefix: str, tensors: Mapping[str, TensorInfo]) -> PackedLinear:
        scales, weight = (require_tensor(tensors, f"{prefix}.{suffix}") for suffix in self.suffixes(True))
        fits = len(weight.shape) == 2 and min(weight.shape) > 0 and not weight.shape[1] % GROUP
        if not fits or tuple(scales.shape) != _blocks(*weight.shape) or weight.dtype != self.dtype or scales.dtype not in FLOATS:
            raise CheckpointError(f"tensor {weight.name}: its shape or dtype does not match that of its weight_scale")
        return PackedLinear(bits=BITS, outputs=weight.shape[0], inputs=weight.shape[1], groups=weight.shape[1] // GROUP)


def _blocks(outputs: int, inputs: int) -> tuple[int, int]:
    return math.ceil(outputs / BLOCK_ROWS), inputs // GROUP


def _of_rows(blocks: Tensor, rows: int) -> Tensor:
    """The scale of each row, [rows, groups]."""
    return blocks.repeat_interleave(BLOCK_ROWS, 0)[:rows]
