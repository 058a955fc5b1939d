"""Linears that are packed as integers, as if they were plain tensors: a job may quantize them again, to another format or width.

Of gptq, groups may be in any order (``desc_act`` without static groups). The layouts are in ``bigq.io.formats``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bigq.errors import CheckpointError, UnsupportedModelError
from bigq.io.formats import FORMATS, Format, PackedSchemes
from bigq.io.formats.awq import awq_codes
from bigq.io.formats.base import module_of
from bigq.io.formats.gptq import Gptq
from bigq.io.index import Decoder, TensorInfo
from bigq.kernels.dequantize import dequantize, dequantize_packed
from bigq.kernels.pack import pack, unpack
from bigq.scheme import QuantScheme


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
    """A Linear as AWQ packs it, at 4 bits. Its codes are not packed again in between, as they would be by ``Format.read``."""

    @property
    def by_rows(self) -> bool:
        return False

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        qweight, qzeros, scales = parts
        return dequantize(awq_codes(qweight), scales.T.contiguous(), awq_codes(qzeros), dtype)


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
    made = FORMATS["awq"]

    def weight(prefix: str) -> tuple[TensorInfo, list[str]]:
        linear = made.geometry(prefix, tensors)
        parts = [tensors[f"{prefix}.{name}"] for name in made.suffixes(False)]
        return _made(f"{prefix}.weight", (linear.outputs, linear.inputs), dtype, AwqIntegers(), parts), []

    return _replaced(tensors, made.prefixes(tensors), lambda prefix: f"{prefix}.{made.mark}", weight)


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
