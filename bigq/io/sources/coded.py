"""Weights that a checkpoint stores as fp8, int8 or fp4 numbers and scales, as if they were plain tensors.

What the tensors are called tells how they are stored:

    X, X_scale_inv                  fp8; a scale for each block of ``weight_block_size`` (DeepSeek), or one for all (Mistral)
    X, X_scale                      fp8 or int8; a scale for all, for each row, block or group (compressed-tensors, FBGEMM, ModelOpt)
    X_packed, X_scale, X_global_scale   NVFP4 of compressed-tensors: fp8 scales of 16 columns, divided by the global one
    X, X_scale, X_scale_2           NVFP4 of ModelOpt: the same, multiplied by the global one
    X_packed, X_scale (bytes)       MXFP4 of compressed-tensors: exponents of 32 columns
    X_blocks, X_scales (bytes)      MXFP4 of gpt-oss: the same; the parameter has inputs and outputs exchanged

X is ``….weight``, or a parameter of all experts. Scales of activations and of the cache belong to kernels and are left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bigq.errors import CheckpointError, UnsupportedModelError
from bigq.io.index import TensorInfo
from bigq.io.json_file import show_name
from bigq.kernels.decode import decode_scaled, exponents

#: Numbers of these dtypes are useless without scales.
CODES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
#: Scales that only kernels need: of activations, and of keys and values in the cache.
_OF_KERNELS = re.compile(
    r"\.(input_scale(_ub)?|input_zero_point|input_global_scale|activation_scale|output_scale|(k|v|q|kv)_scale|(k|v|kv)_cache_scale)$"
)
#: Names of scales, which may be fp8 or bytes themselves.
_SCALES = re.compile(r"_(scale|scales|scale_inv|scale_2|global_scale)$")
#: Columns that share a scale in FP4.
_NVFP4_GROUP, _MXFP4_GROUP = 16, 32


@dataclass(frozen=True, slots=True)
class Coding:
    """How a weight is made of its parts: numbers, scales, perhaps a global scale.

    block: rows and columns that share a scale. divided: whether scales are divided by the global one instead of multiplied.
    transposed: whether the parameter is the transpose of what is stored. blocks: whether bytes have a dimension for each group.
    """

    block: tuple[int, int]
    divided: bool = False
    transposed: bool = False
    blocks: bool = False

    @property
    def by_rows(self) -> bool:
        return False

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """The weight in ``dtype``, on the device of its parts."""
        codes, scales, *whole = parts
        if self.blocks:
            codes = codes.flatten(-2)
        factors = exponents(scales)
        if whole:
            factors = factors / whole[0].float() if self.divided else factors * whole[0].float()
        *batch, m, n = codes.shape
        n *= 2 if codes.dtype == torch.uint8 else 1
        factors = factors.reshape(*batch, math.ceil(m / self.block[0]), math.ceil(n / self.block[1]))
        weight = decode_scaled(codes, factors, self.block, dtype)
        return weight.transpose(-1, -2).contiguous() if self.transposed else weight


def decoded_tensors(tensors: Mapping[str, TensorInfo], block: tuple[int, int] | None, dtype: torch.dtype) -> dict[str, TensorInfo]:
    """A checkpoint's tensors, in which every coded weight is one tensor of ``dtype``, and no scales are left.

    block: what the config says of blocks that share a scale. Raises CheckpointError where a weight lacks its scales, or where these have
    another shape; UnsupportedModelError for zero points, and for Linears whose inputs have to be scaled.
    """
    found: dict[str, TensorInfo] = {}
    used: set[str] = set()
    for name, info in tensors.items():
        if name.endswith(".pre_quant_scale"):
            raise UnsupportedModelError(f"{info.file}: tensor {show_name(name)} scales the inputs of a Linear, which is not supported")
        made = _weight(name, info, tensors, block, dtype)
        if made is not None:
            found[made.name] = made
            used |= {part.name for part in made.stored}
        elif name not in used and not _OF_KERNELS.search(name):
            found[name] = info
    for name in used:
        if name in found and found[name].coding is None:
            del found[name]
    return found


def _weight(
    name: str, info: TensorInfo, tensors: Mapping[str, TensorInfo], block: tuple[int, int] | None, dtype: torch.dtype
) -> TensorInfo | None:
    """The weight whose numbers a stored tensor holds; None if it holds none."""

    def other(suffix: str, of: str = name) -> TensorInfo:
        found = tensors.get(of + suffix)
        if found is None:
            raise CheckpointError(f"{info.file}: tensor {show_name(name)} lacks its scales, {show_name(of + suffix)}; fetch it again")
        return found

    if _SCALES.search(name):
        return None
    if info.dtype == torch.uint8:
        if name.endswith("_blocks") and (base := name.removesuffix("_blocks")) + "_scales" in tensors:
            scales = tensors[f"{base}_scales"]
            *batch, m, groups, width = info.shape
            coding = Coding((1, _MXFP4_GROUP), transposed=True, blocks=True)
            return _made(base, (*batch, 2 * groups * width, m), dtype, coding, (info, scales), (*batch, m, groups))
        if name.endswith("_packed"):
            base = name.removesuffix("_packed")
            scales, *rest = other("_scale", base), *([tensors[g]] if (g := f"{base}_global_scale") in tensors else [])
            group = _NVFP4_GROUP if rest else _MXFP4_GROUP
            return _halves(base, info, (scales, *rest), Coding((1, group), divided=True), dtype)
        if f"{name}_scale_2" in tensors:
            return _halves(name, info, (other("_scale"), tensors[f"{name}_scale_2"]), Coding((1, _NVFP4_GROUP)), dtype)
        return None
    if info.dtype not in CODES or len(info.shape) < 2:
        return None
    if f"{name}_zero_point" in tensors:
        raise UnsupportedModelError(f"{info.file}: tensor {show_name(name)} has zero points, which are not supported for 8-bit sources")
    scales = tensors.get(f"{name}_scale_inv") or other("_scale")
    *batch, m, n = info.shape
    coding = Coding(_block(info, scales, block))
    rows, columns = math.ceil(m / coding.block[0]), math.ceil(n / coding.block[1])
    fitting = math.prod(scales.shape) == math.prod(batch) * rows * columns
    return _made(name, info.shape, dtype, coding, (info, scales), tuple(scales.shape) if fitting else (*batch, rows, columns))


def _halves(name: str, info: TensorInfo, scales: Sequence[TensorInfo], coding: Coding, dtype: torch.dtype) -> TensorInfo:
    """A weight whose bytes hold two numbers each."""
    *batch, m, half = info.shape
    n = 2 * half
    return _made(name, (*batch, m, n), dtype, coding, (info, *scales), (*batch, m, math.ceil(n / coding.block[1])))


def _block(info: TensorInfo, scales: TensorInfo, block: tuple[int, int] | None) -> tuple[int, int]:
    """Rows and columns that share a scale, by the shapes of a matrix and of its scales, and by the config."""
    *batch, m, n = info.shape
    held = math.prod(scales.shape) // max(1, math.prod(batch))
    if held == 1:
        return m, n
    if block is not None and tuple(scales.shape[-2:]) == (math.ceil(m / block[0]), math.ceil(n / block[1])):
        return block
    if tuple(scales.shape[-2:]) == (1, n):
        return m, 1
    if held == m:
        return 1, n
    if len(scales.shape) >= 2 and scales.shape[-2] == m and n % scales.shape[-1] == 0:
        return 1, n // scales.shape[-1]
    said = "" if block is None else f", blocks of {block[0]} × {block[1]} by config.json"
    raise CheckpointError(
        f"{scales.file}: tensor {show_name(scales.name)} has shape {list(scales.shape)}, which does not fit {show_name(info.name)}, "
        f"{list(info.shape)}{said}; the two belong to different models"
    )


def _made(
    name: str, shape: Sequence[int], dtype: torch.dtype, coding: Coding, parts: tuple[TensorInfo, ...], scales: tuple[int, ...]
) -> TensorInfo:
    """A weight made of parts. scales: the shape that its scales must have."""
    codes, held, *whole = parts
    if tuple(held.shape) != scales:
        raise CheckpointError(
            f"{held.file}: tensor {show_name(held.name)} has shape {list(held.shape)} instead of {list(scales)}; fetch the model again"
        )
    for one in whole:
        if math.prod(one.shape) != 1:
            raise CheckpointError(f"{one.file}: tensor {show_name(one.name)} has shape {list(one.shape)}, not one number; fetch it again")
    return TensorInfo(
        name=name, dtype=dtype, shape=tuple(shape), file=codes.file, start=codes.start, stop=codes.stop, coding=coding, parts=parts
    )
