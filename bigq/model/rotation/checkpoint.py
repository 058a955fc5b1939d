"""The tensors of a checkpoint as those of the rotated model: weights that take part are decoded as they are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from bigq.errors import UnsupportedModelError
from bigq.io.index import TensorInfo
from bigq.model.architecture import text_config
from bigq.model.description import ModelDescription
from bigq.model.rotation.around import ModelRoles, model_roles
from bigq.model.rotation.find import ADVICE
from bigq.model.rotation.matrices import Rotation
from bigq.model.rotation.roles import STREAM_SEED, Roles, turns_of
from bigq.model.rotation.weights import Neutral, Side, Turned, TurnedVector
from bigq.model.skeleton import is_transposed, map_names

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
    placed = map_names(described.model, tensors)
    head, embedding = f"{described.head_name}.weight", embedding_name(described)
    at = {target: name for name, target in placed.items()}
    if head not in at and embedding in at:
        at[head] = head
        tensors = {**tensors, head: dataclasses.replace(tensors[at[embedding]], name=head)}

    def stored(parameter: str) -> TensorInfo:
        if parameter not in at:
            raise UnsupportedModelError(f"--rotate: {parameter} is not stored as one tensor; {ADVICE}")
        return tensors[at[parameter]]

    return {**tensors, **{info.name: info for info in _changed(described, roles, stored)}}


def embedding_name(described: ModelDescription) -> str:
    """The parameter of the input embedding."""
    return next(f"{name}.weight" for name, module in described.model.named_modules() if module is described.embedding)


def _changed(described: ModelDescription, roles: ModelRoles, stored: Callable[[str], TensorInfo]) -> Iterator[TensorInfo]:
    stream = Side(Rotation(roles.width, STREAM_SEED))
    info = stored(embedding_name(described))
    yield made(info, Turned(name=info.name, inputs=stream), info)
    places = [(f"{described.blocks_path}.{i}.", block) for i, block in enumerate(roles.blocks)]
    for prefix, part in (*places, ("", roles.around)):
        yield from _of_place(described, prefix, part, roles.width, stored)


def _of_place(
    described: ModelDescription, prefix: str, roles: Roles, width: int, stored: Callable[[str], TensorInfo]
) -> Iterator[TensorInfo]:
    norms = {}
    for name, offset in roles.norms.items():
        ((leaf, _),) = described.model.get_submodule(prefix + name).named_parameters()
        norms[name] = stored(f"{prefix}{name}.{leaf}")
        yield made(norms[name], Neutral(offset), norms[name])
    for name, turn in turns_of(roles, width).items():
        module, info = described.model.get_submodule(prefix + name), stored(f"{prefix}{name}.weight")
        if is_transposed(module):
            raise UnsupportedModelError(f"--rotate: {prefix}{name} is stored transposed, which is not supported; {ADVICE}")
        scale = () if turn.norm is None else (norms[turn.norm],)
        offset = 0.0 if turn.norm is None else roles.norms[turn.norm]
        yield made(info, Turned(name=info.name, inputs=turn.inputs, outputs=turn.outputs, offset=offset), info, *scale)
        if turn.outputs is not None and getattr(module, "bias", None) is not None:
            bias = stored(f"{prefix}{name}.bias")
            yield made(bias, TurnedVector(turn.outputs), bias)


def made(info: TensorInfo, coding: Turned | TurnedVector | Neutral, *parts: TensorInfo) -> TensorInfo:
    """A tensor in the place of ``info``."""
    first = parts[0]
    return dataclasses.replace(info, file=first.file, start=first.start, stop=first.stop, coding=coding, parts=parts)
