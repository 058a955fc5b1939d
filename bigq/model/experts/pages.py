"""The experts of a model as the checkpoint stores them: bank by bank and expert by expert, without their weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from bigq.errors import CheckpointError
from bigq.io.index import TensorInfo
from bigq.io.sources.base import Source
from bigq.model.experts.bank import bank_modules
from bigq.model.experts.source import ExpertSource


@dataclass(frozen=True, slots=True)
class StoredBank:
    """One bank. path: of its module. sources: by the name of a 3-D parameter in it, the source of each expert's part."""

    path: str
    sources: Mapping[str, tuple[ExpertSource, ...]]

    @property
    def experts(self) -> int:
        return len(next(iter(self.sources.values())))

    @property
    def by_matrix(self) -> bool:
        """Whether every matrix of every expert is stored as a tensor of its own."""
        return all(source.own for sources in self.sources.values() for source in sources)

    def matrices(self, parameter: str, expert: int) -> tuple[Source, ...]:
        """The stored matrices of one expert's part of a parameter, in the order of its outputs."""
        return self.sources[parameter][expert].parts

    def tensors(self, experts: Iterable[int]) -> Iterator[TensorInfo]:
        """The stored tensors of some experts, in the order in which they are read."""
        for e in experts:
            for sources in self.sources.values():
                yield from sources[e].tensors

    def names(self, experts: Iterable[int]) -> list[str]:
        """The names of the weights of some experts in the checkpoint."""
        return [part.name for e in experts for sources in self.sources.values() for part in sources[e].parts]

    def linears(self) -> dict[str, tuple[int, int]]:
        """Every matrix that is stored as a tensor of its own: its name, as that of a Linear, and its shape [outputs, inputs]."""
        found = {}
        for sources in self.sources.values():
            for source in sources:
                for part in source.parts if source.own else ():
                    m, n = part.shape
                    found[part.name.removesuffix(".weight")] = (m, n)
        return found


def nominal_linears(model: nn.Module) -> dict[str, dict[str, tuple[int, int]]]:
    """What ``StoredBank.linears`` might find for each bank of a model without a checkpoint: one matrix for each parameter of an expert."""
    return {
        path: {
            f"{path}.{e}.{key}": (param.shape[1], param.shape[2])
            for key, param in module.named_parameters(recurse=False)
            if param.ndim == 3
            for e in range(param.shape[0])
        }
        for path, module in bank_modules(model).items()
    }


def stored_banks(model: nn.Module, sources: Mapping[str, tuple[ExpertSource, ...]]) -> dict[str, StoredBank]:
    """The banks of a model by path. sources: see ``expert_sources``. Raises CheckpointError if a bank's matrices are not stored."""
    found = {}
    for path, module in bank_modules(model).items():
        names = [key for key, param in module.named_parameters(recurse=False) if param.ndim == 3]
        missing = next((f"{path}.{key}" for key in names if f"{path}.{key}" not in sources), None)
        if missing is not None:
            raise CheckpointError(f"the tensors of {missing} are missing from the checkpoint; fetch it again, or correct config.json")
        found[path] = StoredBank(path, {key: sources[f"{path}.{key}"] for key in names})
    return found
