"""How checkpoints store the experts of a bank: matrix by matrix, while the model has one parameter for all of them.

``experts.17.gate_proj.weight`` becomes a part of ``experts.gate_up_proj`` [experts, outputs, inputs]. Which part follows from
transformers' own rules: their patterns, and the order in which they stack and concatenate.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from bigq.errors import CheckpointError, UnsupportedModelError
from bigq.io.json_file import show_name
from bigq.model.architecture import is_composite
from bigq.model.blocks import find_blocks
from bigq.model.experts.spare import spare_experts
from bigq.model.skeleton import Merge, is_linear, place

#: Rules that are followed: experts are stacked, and then perhaps their matrices concatenated by outputs.
_STACKING = ((("MergeModulelist", 0),), (("MergeModulelist", 0), ("Concatenate", 1)))
#: A rule that puts tensors one behind the other.
_JOINING = (("Concatenate", 0),)
#: The numbers in a name.
_NUMBERS = re.compile(r"(\d+)")


@dataclass(frozen=True, slots=True)
class Part:
    """Where a stored matrix goes: to ``parameter[expert]``, as the part number ``part`` of ``parts`` along the outputs."""

    parameter: str
    expert: int
    part: int
    parts: int


def expert_parts(model: nn.Module, names: Iterable[str]) -> dict[str, Part]:
    """Checkpoint name → where it goes, for those tensors that transformers would merge. Raises as ``merged_parts`` does."""
    merged = place(model, names).merged
    beside = merged_beside(model, merged)
    return merged_parts({name: merge for name, merge in merged.items() if name not in beside})


def merged_beside(model: nn.Module, merged: Mapping[str, Merge]) -> dict[str, Merge]:
    """Those of ``merged`` that are copied as they are stored: what ``joined_parameters`` are made of, what belongs to a composite
    model's parts beside the decoder blocks, such as a tower for images, and what is stored for spare experts (see ``spare``).

    What transformers makes of the latter matters only if text needs them: see ``require_unmerged``.
    """
    joined = {name for names in joined_parameters(model, merged).values() for name in names}
    path = find_blocks(model)[0] if is_composite(model.config) else ""
    spare = {name for name, merge in merged.items() if _is_spare(model, name, merge)}
    return {name: merge for name, merge in merged.items() if name in joined | spare or not merge.target.startswith(path and f"{path}.")}


def _is_spare(model: nn.Module, name: str, merge: Merge) -> bool:
    """Whether a tensor is what a checkpoint stores for a spare expert."""
    path, _, key = merge.target.rpartition(".")
    module, numbers = model.get_submodule(path), _NUMBERS.findall(name)
    return bool(numbers) and spare_experts(module) > 0 and int(numbers[-1]) >= module.get_parameter(key).shape[0]


def joined_parameters(model: nn.Module, merged: Mapping[str, Merge]) -> dict[str, tuple[str, ...]]:
    """Parameters that are stored in pieces along their first dimension → the pieces' names, in order. merged: see ``Placement``.

    Not the weights of Linears, which the output would have to name as the checkpoint does, and not those of embeddings, which are read by
    rows.
    """
    found: dict[str, dict[str, Merge]] = {}
    for name, merge in merged.items():
        module = model.get_submodule(merge.target.rpartition(".")[0])
        if merge.steps == _JOINING and len(merge.targets) == 1 and not is_linear(module) and not isinstance(module, nn.Embedding):
            found.setdefault(merge.target, {})[name] = merge
    for target, pieces in found.items():
        places, stored = next(iter(pieces.values())).places, sorted(merge.place for merge in pieces.values())
        if stored != list(range(places)):
            raise CheckpointError(
                f"{target}: the checkpoint holds {len(pieces)} of the {places} tensors that it consists of, such as "
                f"{show_name(next(iter(pieces)))}; fetch it again"
            )
    return {target: tuple(sorted(pieces, key=lambda name: pieces[name].place)) for target, pieces in found.items()}


def require_unmerged(parameter: str, beside: Mapping[str, Merge]) -> None:
    """Raise UnsupportedModelError if a parameter is made of tensors that are beside the decoder blocks. beside: of ``merged_beside``."""
    merge = next((merge for merge in beside.values() if parameter in merge.targets), None)
    if merge is not None:
        raise _other_rule(parameter, merge)


def merged_parts(merged: Mapping[str, Merge]) -> dict[str, Part]:
    """Checkpoint name → where it goes. merged: see ``Placement``.

    Raises UnsupportedModelError for rules that do more than stack experts and concatenate their matrices by outputs, CheckpointError where
    an expert lacks one of them.
    """
    found: dict[str, list[list[str]]] = {}
    for name, merge in merged.items():
        require_stacking(merge)
        found.setdefault(merge.target, [[] for _ in range(merge.places)])[merge.place].append(name)
    result: dict[str, Part] = {}
    for target, matrices in found.items():
        _require_equal_numbers(matrices)
        for part, column in enumerate(matrices):
            ordered = sorted(column, key=_by_number)
            result |= {name: Part(target, expert, part, len(matrices)) for expert, name in enumerate(ordered)}
    return result


def require_stacking(merge: Merge) -> None:
    """Raise UnsupportedModelError unless a rule stacks tensors as experts and then concatenates them by outputs at most."""
    if merge.steps not in _STACKING or len(merge.targets) != 1:
        raise _other_rule(merge.target, merge)


def _other_rule(parameter: str, merge: Merge) -> UnsupportedModelError:
    steps = ", ".join(name for name, _ in merge.steps)
    several = merge.places > 1 or any(name == "MergeModulelist" for name, _ in merge.steps)
    one = "makes it and others of one tensor" if len(merge.targets) > 1 else "changes what is stored for it"
    made = "makes it of several tensors" if several else one
    return UnsupportedModelError(f"{parameter}: transformers {made} by {steps}, which is not supported")


def _require_equal_numbers(matrices: list[list[str]]) -> None:
    most, fewest = max(matrices, key=len), min(matrices, key=len)
    if len(most) > len(fewest):
        raise CheckpointError(
            f"the checkpoint holds {len(most)} tensors like {show_name(most[0])}, but {len(fewest)} of another matrix of the same experts; "
            "fetch it again"
        )


def _by_number(name: str) -> list[tuple[int, str]]:
    """A key that sorts expert 10 after expert 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in _NUMBERS.split(name)]
