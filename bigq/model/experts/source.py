"""Where one expert's part of a bank's parameter is stored: matrix by matrix, or as a slice of one tensor for all experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bigq.errors import CheckpointError, UnsupportedModelError
from bigq.io.index import TensorInfo
from bigq.io.reader import slices
from bigq.io.sources.base import Read, Source
from bigq.io.sources.plain import PlainSource
from bigq.model.experts.bank import bank_modules
from bigq.model.experts.naming import is_transposed, packed_parts
from bigq.model.experts.stored import Part, expert_parts
from bigq.model.skeleton import place


@dataclass(frozen=True, slots=True)
class ExpertSource:
    """One expert's part of a parameter. parts: stored matrices, in this order along the first dimension, all of one shape.

    whole: the tensor for all experts that the one part is a slice of; None if the parts are tensors of this expert alone.
    transposed: whether the part is [inputs, outputs], while the stored matrices are [outputs, inputs]. turned: whether the slice of
    ``whole`` is the transpose of the part.
    """

    parts: tuple[Source, ...]
    whole: TensorInfo | None = None
    transposed: bool = False
    turned: bool = False

    def value(self, read: Read, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The part, without the dimension of the experts. Raises CheckpointError, NumericsError."""
        return joined([part.value(read, device, dtype) for part in self.parts], transposed=self.transposed or self.turned)

    @property
    def tensors(self) -> Iterator[TensorInfo]:
        """The stored tensors, in the order in which ``value`` reads them."""
        for part in self.parts:
            yield from part.tensors


def joined(matrices: Sequence[Tensor], *, transposed: bool) -> Tensor:
    """One expert's part of a parameter from its matrices [outputs, inputs]. It is contiguous, since a product's bits may depend on that."""
    value = matrices[0] if len(matrices) == 1 else torch.cat(list(matrices))
    return value.T.contiguous() if transposed else value


def expert_sources(
    model: nn.Module, sources: Mapping[str, Source], placed: Mapping[str, str], parts: Mapping[str, Part] | None = None
) -> dict[str, tuple[ExpertSource, ...]]:
    """Parameter of a bank → its experts' sources. sources: of the checkpoint's weights, by name. placed: the plain tensors among them
    that are whole parameters, see ``map_names``. parts: what ``expert_parts`` finds for these names, if it is known already.

    Raises CheckpointError where the number of experts or the shape of one differs from the model's.
    """
    parameters = {
        f"{path}.{key}": param
        for path, bank in bank_modules(model).items()
        for key, param in bank.named_parameters(recurse=False)
        if param.ndim == 3
    }
    stored: dict[str, dict[int, dict[int, Source]]] = {}
    parts = expert_parts(model, sources) if parts is None else parts
    named = packed_parts(model, [name for name, source in sources.items() if name not in parts and not source.is_plain])
    for name, part in (dict(parts) | named).items():
        if part.parameter not in parameters:
            raise UnsupportedModelError(f"{part.parameter}: made of several tensors such as {name}, but belongs to no bank of experts")
        stored.setdefault(part.parameter, {}).setdefault(part.expert, {})[part.part] = sources[name]
    transposed = {part.parameter for part in named.values() if is_transposed(model, part.parameter)}
    found = {
        parameter: tuple(
            ExpertSource(tuple(matrices[i] for i in sorted(matrices)), transposed=parameter in transposed)
            for _, matrices in sorted(experts.items())
        )
        for parameter, experts in stored.items()
    }
    for name, parameter in placed.items():
        if parameter in parameters:
            (info,) = sources[name].tensors
            e, m, n = parameters[parameter].shape
            if info.shape == (e * m, n) and not info.parts:  # those of all experts, one behind the other
                info = dataclasses.replace(info, shape=(e, m, n))
            turned = info.shape == (e, n, m) != (e, m, n) and name in place(model, [name]).turned
            PlainSource(info).check((e, n, m) if turned else (e, m, n))
            found[parameter] = tuple(ExpertSource((PlainSource(one),), whole=info, turned=turned) for one in slices(info))
    for parameter, experts in found.items():
        _check(parameter, tuple(parameters[parameter].shape), experts)
    return found


def _check(parameter: str, shape: tuple[int, ...], experts: Sequence[ExpertSource]) -> None:
    first = next(experts[0].tensors)
    if len(experts) != shape[0]:
        raise CheckpointError(
            f"{first.file}: the checkpoint holds {len(experts)} experts for {parameter}, but config.json says {shape[0]}; "
            "the two belong to different models"
        )
    for expert in experts:
        m, n = (shape[2], shape[1]) if expert.transposed or expert.turned else shape[1:]
        for part in expert.parts:
            part.check((m // len(expert.parts), n))
