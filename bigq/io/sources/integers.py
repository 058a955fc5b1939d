"""Linears that are packed as integers, as if they were plain tensors: a job may quantize them again, to another format or width.

Of gptq, groups may be in any order (``desc_act`` without static groups). AWQ is the layout of its "gemm" kernels:

    X.qweight   int32 [K, N/8]    4-bit codes of 8 outputs in a word, in the order 0 2 4 6 1 3 5 7
    X.qzeros    int32 [G, N/8]    zero points, packed alike and stored unchanged
    X.scales    fp16 [G, N]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bigq.errors import CheckpointError, UnsupportedModelError
from bigq.io.formats import Format, PackedSchemes
from bigq.io.formats.base import module_of
from bigq.io.formats.gptq import Gptq
from bigq.io.index import Decoder, TensorInfo
from bigq.io.json_file import show_name
from bigq.kernels.dequantize import dequantize, dequantize_packed
from bigq.kernels.pack import pack, unpack
from bigq.scheme import QuantScheme

#: The output, of 8 in a word, that each 4 bits of AWQ's words belong to, from the lowest bits on.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True, slots=True)
class PackedIntegers:
    """A Linear in one of the packed formats. names: of its parts, without the prefix."""

    format: Format
    prefix: str
    scheme: QuantScheme
    names: tuple[str, ...]

    @property
    def by_rows(self) -> bool:
        return False

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        given = {self.format.tensor(self.prefix, name): part for name, part in zip(self.names, parts, strict=True)}
        order: Tensor | None = None
        if isinstance(self.format, Gptq):
            order = self._sort_groups(given)
        words, scales, zeros = self.format.read(self.prefix, given.__getitem__, self.scheme)
        weight = dequantize_packed(words, scales, zeros, self.scheme.bits, dtype, self.scheme.points)
        if order is None:
            return weight
        natural = torch.empty_like(weight)
        natural[:, order] = weight
        return natural

    def _sort_groups(self, given: dict[str, Tensor]) -> Tensor | None:
        """Bring inputs into the order of their groups, in place. Returns the order; None if they have it."""
        index, codes = (f"{self.prefix}.{name}" for name in ("g_idx", "qweight"))
        groups = given[index].long()
        order = groups.argsort(stable=True)
        if torch.equal(order, torch.arange(len(order), device=order.device)):
            return None
        given[codes] = pack(unpack(given[codes], self.scheme.bits)[order].contiguous(), self.scheme.bits)
        given[index] = given[index][order].contiguous()
        return order


@dataclass(frozen=True, slots=True)
class AwqIntegers:
    """A Linear as AWQ packs it, at 4 bits."""

    @property
    def by_rows(self) -> bool:
        return False

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        qweight, qzeros, scales = parts
        codes, zeros = _awq_numbers(qweight).T.contiguous(), _awq_numbers(qzeros).T.contiguous()
        return dequantize(codes, scales.T.contiguous(), zeros, dtype)


def _awq_numbers(words: Tensor) -> Tensor:
    """Int32 words [k, m/8] as uint8 numbers [k, m]."""
    numbers = torch.empty(*words.shape, 8, dtype=torch.uint8, device=words.device)
    for place, output in enumerate(_AWQ_ORDER):
        numbers[..., output] = (words >> (4 * place)) & 15
    return numbers.flatten(-2)


def decoded_integers(tensors: Mapping[str, TensorInfo], schemes: PackedSchemes, dtype: torch.dtype) -> dict[str, TensorInfo]:
    """A checkpoint's tensors, in which every packed Linear is one tensor of ``dtype`` [outputs, inputs].

    Raises CheckpointError, UnsupportedModelError where tensors of a Linear are missing or do not match.
    """
    made = schemes.format

    def weight(prefix: str) -> tuple[TensorInfo, list[str]]:
        scheme = schemes.scheme(module_of(prefix))
        names = made.suffixes(scheme.symmetric)
        linear = made.geometry(prefix, tensors)
        parts = [tensors[made.tensor(prefix, name)] for name in names]
        if linear.bits != scheme.bits:
            raise CheckpointError(
                f"tensor {parts[0].name} is packed as {linear}, but config.json says {scheme.bits} bits; the two belong to different models"
            )
        coding = PackedIntegers(made, prefix, scheme, tuple(names))
        spare = [name for suffix in made.spare if (name := made.tensor(prefix, suffix)) in tensors]
        return _made(f"{module_of(prefix)}.weight", (linear.outputs, linear.inputs), dtype, coding, parts), spare

    return _replaced(tensors, made.prefixes(tensors), lambda prefix: made.tensor(prefix, made.mark), weight)


def decoded_awq(tensors: Mapping[str, TensorInfo], dtype: torch.dtype) -> dict[str, TensorInfo]:
    """A checkpoint's tensors, in which every Linear that AWQ has packed is one tensor of ``dtype`` [outputs, inputs].

    Raises CheckpointError where tensors of a Linear are missing or do not match.
    """

    def weight(prefix: str) -> tuple[TensorInfo, list[str]]:
        parts = [tensors.get(f"{prefix}.{name}") for name in ("qweight", "qzeros", "scales")]
        found = [part for part in parts if part is not None]
        if len(found) < len(parts):
            raise CheckpointError(f"tensor {show_name(found[0].name)} lacks its scales or zero points; fetch it again")
        qweight, _, scales = found
        shapes = [part.shape for part in found]
        n, eighth = qweight.shape if len(qweight.shape) == 2 else (0, 0)
        groups = scales.shape[0] if scales.shape else 0
        if not groups or n % groups or shapes != [(n, eighth), (groups, eighth), (groups, 8 * eighth)]:
            raise CheckpointError(
                f"tensor {show_name(qweight.name)}: its shape does not match those of qzeros and scales; the checkpoint is damaged, or its "
                "version of AWQ is not gemm: fetch it again, or one of version gemm"
            )
        return _made(f"{prefix}.weight", (8 * eighth, n), dtype, AwqIntegers(), found), []

    prefixes = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    return _replaced(tensors, prefixes, lambda prefix: f"{prefix}.qweight", weight)


def _replaced(
    tensors: Mapping[str, TensorInfo],
    prefixes: Sequence[str],
    mark: Callable[[str], str],
    weight: Callable[[str], tuple[TensorInfo, list[str]]],
) -> dict[str, TensorInfo]:
    """Tensors with those of packed Linears replaced by one each, in the place of the one that ``mark`` names."""
    made: dict[str, TensorInfo] = {}
    gone: set[str] = set()
    for prefix in prefixes:
        first = tensors[mark(prefix)]
        try:
            info, spare = weight(prefix)
        except (CheckpointError, UnsupportedModelError) as error:
            raise type(error)(f"{first.file}: {str(error).removeprefix(f'{first.file}: ')}") from None
        made[first.name] = info
        gone |= {part.name for part in info.parts} | set(spare)
    return {found.name: found for name, info in tensors.items() if (found := made.get(name, info)) and (name in made or name not in gone)}


def _made(name: str, shape: tuple[int, int], dtype: torch.dtype, coding: Decoder, parts: Sequence[TensorInfo]) -> TensorInfo:
    return dataclasses.replace(parts[0], name=name, shape=shape, dtype=dtype, coding=coding, parts=tuple(parts))
