"""Where one expert's part of a bank's parameter is stored: matrix by matrix, or as a slice of one tensor for all experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bigq.errors import CheckpointError
from bigq.io.index import TensorInfo
from bigq.io.sources.base import Read
from bigq.model.experts.stored import expert_parts


@dataclass(frozen=True, slots=True)
class ExpertSource:
    """One expert's part of a parameter. tensors: stored in this order along the first dimension."""

    tensors: tuple[TensorInfo, ...]

    def value(self, read: Read, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The part, without the dimension of the experts. Raises CheckpointError, NumericsError."""
        parts = [read(info) for info in self.tensors]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(device=device, dtype=dtype)


def expert_sources(model: nn.Module, tensors: Mapping[str, TensorInfo], placed: Mapping[str, str]) -> dict[str, tuple[ExpertSource, ...]]:
    """Parameter of a bank → its experts' sources. tensors: of the checkpoint. placed: those that are whole parameters, see ``map_names``.

    Raises CheckpointError where the number of experts or the shape of one differs from the model's.
    """
    parameters = dict(model.named_parameters())
    stored: dict[str, dict[int, dict[int, TensorInfo]]] = {}
    for name, part in expert_parts(model, tensors).items():
        stored.setdefault(part.parameter, {}).setdefault(part.expert, {})[part.part] = tensors[name]
    found = {
        parameter: tuple(ExpertSource(tuple(parts[i] for i in sorted(parts))) for _, parts in sorted(experts.items()))
        for parameter, experts in stored.items()
    }
    for name, parameter in placed.items():
        if parameter in parameters and parameters[parameter].ndim == 3:
            found[parameter] = tuple(ExpertSource((one,)) for one in slices(tensors[name]))
    for parameter, sources in found.items():
        _check(parameter, tuple(parameters[parameter].shape), sources)
    return found


def slices(info: TensorInfo) -> tuple[TensorInfo, ...]:
    """The parts of a stored tensor along its first dimension, each as if it were a tensor of its own. Their names are numbered."""
    step = info.nbytes // info.shape[0]
    return tuple(
        dataclasses.replace(
            info, name=f"{info.name}[{i}]", shape=info.shape[1:], start=info.start + i * step, stop=info.start + (i + 1) * step
        )
        for i in range(info.shape[0])
    )


def _check(parameter: str, shape: tuple[int, ...], sources: tuple[ExpertSource, ...]) -> None:
    first = sources[0].tensors[0]
    if len(sources) != shape[0]:
        raise CheckpointError(
            f"{first.file}: the checkpoint holds {len(sources)} experts for {parameter}, but config.json says {shape[0]}; "
            "the two belong to different models"
        )
    for source in sources:
        rows = sum(info.shape[0] for info in source.tensors)
        wrong = next((info for info in source.tensors if info.shape[1:] != shape[2:]), source.tensors[0] if rows != shape[1] else None)
        if wrong is not None:
            raise CheckpointError(
                f"{wrong.file}: tensor {wrong.name} has shape {list(wrong.shape)}, which does not fit an expert of {parameter}, "
                f"{list(shape[1:])} by config.json; the two belong to different models"
            )
