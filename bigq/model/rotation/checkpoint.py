"""The tensors of a checkpoint as those of the rotated model: weights that take part are decoded as they are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bigq.errors import UnsupportedModelError
from bigq.io.index import Decoder, TensorInfo
from bigq.model.architecture import text_config
from bigq.model.description import ModelDescription
from bigq.model.rotation.around import ModelRoles, model_roles
from bigq.model.rotation.banks import ADVICE
from bigq.model.rotation.matrices import Rotation
from bigq.model.rotation.roles import STREAM_SEED, Roles, Turn, turns_of
from bigq.model.rotation.weights import Neutral, Side, Turned, TurnedVector
from bigq.model.skeleton import is_transposed, place

#: The setting of config.json that makes readers use the embedding as the output head.
TIE = "tie_word_embeddings"


def untie(config: Any) -> None:
    """Give the model of a config a head of its own: the last norm's weight goes into the head, and not into the embedding."""
    for part in (config, text_config(config)):
        if getattr(part, TIE, False):
            setattr(part, TIE, False)


def described_rotation(described: ModelDescription, tensors: Mapping[str, TensorInfo]) -> Mapping[str, TensorInfo]:
    """The tensors of the rotated model, without reading any. described: untied; its buffers have values.

    Where the checkpoint has no head of its own, the head is made of the embedding. Raises UnsupportedModelError, naming what fails.
    """
    roles = model_roles(described)
    if not tensors:
        return tensors
    placement = place(described.model, tensors)
    head, embedding = f"{described.head_name}.weight", embedding_name(described)
    at: dict[str, list[str]] = {}
    for name, target in placement.whole.items():
        at[target] = [name]
    for name, merge in placement.merged.items():
        at.setdefault(merge.target, []).append(name)
    if head not in at and embedding in at:
        at[head] = [head]
        tensors = {**tensors, head: dataclasses.replace(tensors[at[embedding][0]], name=head)}
    changed = _Changed(described, roles, {target: [tensors[name] for name in names] for target, names in at.items()})
    return {**tensors, **{info.name: info for info in changed.all()}}


def embedding_name(described: ModelDescription) -> str:
    """The parameter of the input embedding."""
    return next(f"{name}.weight" for name, module in described.model.named_modules() if module is described.embedding)


@dataclass(frozen=True, slots=True)
class _Changed:
    """The tensors that a rotation changes. at: the stored ones of every parameter."""

    described: ModelDescription
    roles: ModelRoles
    at: Mapping[str, Sequence[TensorInfo]]

    def all(self) -> Iterator[TensorInfo]:
        info = self._one(embedding_name(self.described))
        yield _made(info, Turned(name=info.name, inputs=self._stream))
        for i, block in enumerate(self.roles.blocks):
            yield from self._of_place(f"{self.described.blocks_path}.{i}.", block)
        yield from self._of_place("", self.roles.around)

    @property
    def _stream(self) -> Side:
        return Side(Rotation(self.roles.width, STREAM_SEED))

    def _one(self, parameter: str) -> TensorInfo:
        """The tensor that is a parameter. Raises UnsupportedModelError where there are several."""
        if len(found := self.at.get(parameter, ())) != 1:
            raise UnsupportedModelError(f"--rotate: {parameter} is not stored as one tensor; {ADVICE}")
        return found[0]

    def _of_place(self, prefix: str, roles: Roles) -> Iterator[TensorInfo]:
        model, width = self.described.model, self.roles.width
        norms = {}
        for name, offset in roles.norms.items():
            ((leaf, _),) = model.get_submodule(prefix + name).named_parameters()
            norms[name] = self._one(f"{prefix}{name}.{leaf}")
            yield _made(norms[name], Neutral(offset))

        def turned(info: TensorInfo, turn: Turn) -> TensorInfo:
            scale, offset = ((), 0.0) if turn.norm is None else ((norms[turn.norm],), roles.norms[turn.norm])
            return _made(info, Turned(name=info.name, inputs=turn.inputs, outputs=turn.outputs, offset=offset), *scale)

        for name, norm in roles.tables.items():
            for leaf, param in model.get_submodule(prefix + name).named_parameters(recurse=False):
                if param.ndim == 2 and param.shape[1] == width:
                    yield turned(self._one(f"{prefix}{name}.{leaf}"), Turn(inputs=self._stream, norm=norm))
        for name, turn in turns_of(roles, width).items():
            module = model.get_submodule(prefix + name)
            if any(parameter.startswith(f"{name}.") for parameter in roles.banks):
                continue
            if is_transposed(module):
                raise UnsupportedModelError(f"--rotate: {prefix}{name} is stored transposed, which is not supported; {ADVICE}")
            yield turned(self._one(f"{prefix}{name}.weight"), turn)
            if turn.outputs is not None and getattr(module, "bias", None) is not None:
                yield _made(self._one(f"{prefix}{name}.bias"), TurnedVector(turn.outputs))
        for name, role in roles.banks.items():
            for info in self.at[prefix + name]:
                if role.norm is None and len(model.get_parameter(prefix + name).shape) == 2:
                    yield _made(info, TurnedVector(self._stream))
                elif len(info.shape) == 2:
                    yield turned(info, Turn(outputs=self._stream) if role.norm is None else Turn(inputs=self._stream, norm=role.norm))
                else:
                    raise UnsupportedModelError(
                        f"--rotate: {info.name} holds all experts in one tensor, which is not supported yet; {ADVICE}"
                    )


def _made(info: TensorInfo, coding: Decoder, *others: TensorInfo) -> TensorInfo:
    """A tensor that is made of the stored one and others."""
    return dataclasses.replace(info, coding=coding, parts=(info, *others))
