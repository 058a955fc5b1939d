"""The experts of a model as the checkpoint stores them: bank by bank and expert by expert, without their weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from bigq.errors import UnsupportedModelError
from bigq.io.formats import Format
from bigq.io.index import TensorInfo
from bigq.io.sources.packed import PackedSource
from bigq.model.experts.bank import bank_modules
from bigq.model.experts.naming import ExpertLinear, Naming, base_name, experts_of
from bigq.model.experts.source import ExpertSource


@dataclass(frozen=True, slots=True)
class StoredBank:
    """One bank. path: of its module. sources: by the name of a 3-D parameter in it, the source of each expert's part.

    shapes: of one matrix of each parameter. naming: of the matrices that are stored as one tensor for all experts.
    """

    path: str
    sources: Mapping[str, tuple[ExpertSource, ...]]
    shapes: Mapping[str, ExpertLinear]
    naming: Naming

    @property
    def experts(self) -> int:
        return len(next(iter(self.sources.values())))

    @property
    def base(self) -> str:
        """What the names of its experts begin with in the output."""
        whole = next((sources[0].whole for sources in self.sources.values() if sources[0].whole is not None), None)
        return self.path if whole is None else base_name(self.path, whole.name)

    @property
    def is_whole(self) -> bool:
        """Whether a parameter is stored as one tensor for all experts."""
        return any(sources[0].whole is not None for sources in self.sources.values())

    @property
    def is_joined(self) -> bool:
        """Whether the output has one matrix for gate and up of an expert."""
        return any(shape.joined for shape in self.shapes.values())

    def matrices(self, parameter: str, expert: int) -> tuple[str, ...]:
        """The names of one expert's matrices of a parameter, as those of Linears, in the order of its outputs."""
        source = self.sources[parameter][expert]
        if source.whole is not None:
            return tuple(f"{self.base}.{expert}.{part}" for part in self.naming.parts[parameter])
        return tuple(part.name.removesuffix(".weight") for part in source.parts)

    def is_transposed(self, parameter: str) -> bool:
        """Whether a parameter has the output's matrices as [inputs, outputs]. Matrices that are stored one by one are as it has them."""
        source = self.sources[parameter][0]
        return source.transposed or (source.whole is not None and parameter in self.naming.transposed)

    def prefix(self, matrix: str) -> str:
        """What the names of a matrix's packed tensors begin with."""
        return f"{matrix}_" if self.is_joined else matrix

    def packed_prefixes(self, parameter: str, expert: int) -> tuple[str | None, ...]:
        """What the packed tensors of one expert's matrices begin with in this checkpoint; None where they are not packed."""
        source = self.sources[parameter][expert]
        if source.whole is not None:
            return (None,) * len(self.naming.parts[parameter])
        return tuple(part.prefix if isinstance(part, PackedSource) else None for part in source.parts)

    def dtype(self, parameter: str) -> torch.dtype:
        """The dtype of a parameter in the checkpoint."""
        return self.sources[parameter][0].parts[0].dtype

    def nbytes(self, parameter: str) -> int:
        """Bytes of one matrix of a parameter in the checkpoint."""
        source = self.sources[parameter][0]
        return sum(info.nbytes for info in source.tensors) // len(self.matrices(parameter, 0))

    def tensors(self, experts: Iterable[int]) -> Iterator[TensorInfo]:
        """What is read for some experts, in this order: stored tensors, or their slices."""
        for e in experts:
            for sources in self.sources.values():
                yield from sources[e].tensors

    def stored(self, experts: Iterable[int]) -> list[str]:
        """The names of the stored tensors that hold some experts, perhaps among others."""
        found: dict[str, None] = {}
        for e in experts:
            for sources in self.sources.values():
                whole = sources[e].whole
                found |= dict.fromkeys([info.name for info in sources[e].tensors] if whole is None else [whole.name])
        return list(found)

    def packed(self) -> Iterator[PackedSource]:
        """The packed matrices of its experts."""
        for sources in self.sources.values():
            yield from (part for source in sources for part in source.parts if isinstance(part, PackedSource))

    def linears(self) -> dict[str, ExpertLinear]:
        """Every matrix of every expert by its name in the output."""
        return {
            name: self.shapes[key] for key, sources in self.sources.items() for e in range(len(sources)) for name in self.matrices(key, e)
        }


def nominal_linears(model: nn.Module) -> dict[str, dict[str, ExpertLinear]]:
    """What ``StoredBank.linears`` might find for each bank of a model without a checkpoint."""
    return {experts_of(path): _nominal(path, module) for path, module in bank_modules(model).items()}


def _nominal(path: str, module: nn.Module) -> dict[str, ExpertLinear]:
    naming = Naming.of(module)
    shapes = {key: tuple(module.get_parameter(key).shape) for key in naming.parts}
    return {
        f"{experts_of(path)}.{e}.{part}": naming.linear(key, shapes[key])
        for key, parts in naming.parts.items()
        for e in range(shapes[key][0])
        for part in parts
    }


def stored_banks(model: nn.Module, sources: Mapping[str, tuple[ExpertSource, ...]]) -> dict[str, StoredBank]:
    """The banks of a model by path. sources: see ``expert_sources``. All parameters of banks have sources."""
    found = {}
    for path, module in bank_modules(model).items():
        names = [key for key, param in module.named_parameters(recurse=False) if param.ndim == 3]
        naming = Naming.of(module)
        own = {key: sources[f"{path}.{key}"] for key in names}
        shapes = {key: _shape(naming, key, tuple(module.get_parameter(key).shape), parts[0]) for key, parts in own.items()}
        found[path] = StoredBank(path, own, shapes, naming)
    return found


def stores_inputs(folder: Path, format: Format, banks: Iterable[StoredBank]) -> bool:
    """Whether a format stores a number for the inputs of each Linear. folder: of the checkpoint.

    Raises UnsupportedModelError if it does and experts are packed, for whose inputs bigq knows none.
    """
    if format.input_suffix and any(any(bank.packed()) for bank in banks):
        raise UnsupportedModelError(
            f"{folder}: has numbers for the inputs of experts (static scales), which bigq cannot read; give the original model"
        )
    return bool(format.input_suffix)


def _shape(naming: Naming, key: str, shape: tuple[int, ...], source: ExpertSource) -> ExpertLinear:
    if source.whole is not None:
        return naming.linear(key, shape)
    m, n = source.parts[0].shape
    prefix = source.parts[0].prefix if isinstance(source.parts[0], PackedSource) else ""
    return ExpertLinear(m, n, joined=prefix.endswith("_"))
