"""What the output calls the matrices of experts that the checkpoint stores as one tensor for all.

There is no table of families. Names follow from the bank:

    experts.17.gate_proj, up_proj, down_proj   where the first product returns gate and up as two halves, and there are no biases
    experts.17.w13, w2                         else: gate and up stay one matrix, with rows and biases as in the source

All readers know the first ones from other families. The second are those of vLLM's gpt_oss. Parameters of other names keep them. A bank
whose own name is another gets ``experts`` as a part of its name: ``input_linear.experts.17.weight``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from bigq.model import skeleton
from bigq.model.experts.bank import bank_modules
from bigq.model.experts.stored import Part

#: The matrices that parameters of a bank consist of, and the one that each stays where gate and up cannot be two.
_HALVES: Mapping[str, tuple[str, ...]] = {"gate_up_proj": ("gate_proj", "up_proj")}
_JOINED: Mapping[str, tuple[str, ...]] = {"gate_up_proj": ("w13",), "up_proj": ("w13",), "down_proj": ("w2",)}
#: How what the names of experts begin with ends: formats and readers know experts by it.
_EXPERTS = ".experts"
#: The name of a weight of one expert: its bank, its number, its matrix.
_WEIGHT = re.compile(r"(.+)\.(\d+)\.(\w+)\.weight")


class ExpertLinear(NamedTuple):
    """A matrix of an expert: its outputs and inputs. joined: whether it belongs to experts whose gate and up are one matrix."""

    m: int
    n: int
    joined: bool = False


@dataclass(frozen=True, slots=True)
class Naming:
    """parts: the matrices of each 3-D parameter, in the order of its outputs. joined: whether gate and up stay one matrix.

    transposed: the parameters that are [experts, inputs, outputs].
    """

    parts: Mapping[str, tuple[str, ...]]
    transposed: frozenset[str]
    joined: bool

    @classmethod
    def of(cls, module: nn.Module) -> Naming:
        """By the parameters of a bank, and by what its class in transformers says of their layout, else by their shapes.

        See ``proof.require_layout``.
        """
        own = dict(module.named_parameters(recurse=False))
        keys = [key for key, param in own.items() if param.ndim == 3]
        halves = getattr(module, "is_concatenated", True) is True and len(keys) == len(own)
        joined = not halves and all(key in _JOINED for key in keys)
        names = _JOINED if joined else _HALVES if halves else {}
        said = getattr(module, "is_transposed", None)
        shapes = {key: own[key].shape for key in keys}
        if said is None and len(keys) == 1:
            said = _takes_rows(module, shapes[keys[0]])
        transposed = _look_transposed(shapes) if said is None else frozenset(keys if said is True else ())
        return cls({key: names.get(key, (key,)) for key in keys}, transposed, joined)

    def linear(self, key: str, shape: tuple[int, ...]) -> ExpertLinear:
        """One matrix of a parameter. shape: of the parameter."""
        m, n = (shape[2], shape[1]) if key in self.transposed else (shape[1], shape[2])
        return ExpertLinear(m // len(self.parts[key]), n, self.joined)


def _takes_rows(module: nn.Module, shape: torch.Size) -> bool:
    """Whether a bank's only matrix is [experts, inputs, outputs], by what the bank itself says of its inputs: in_features, input_size."""
    said = {value for key, value in vars(module).items() if key.startswith("in") and type(value) is int}
    return shape[1] in said and shape[2] not in said


def _look_transposed(shapes: Mapping[str, torch.Size]) -> frozenset[str]:
    """The 3-D parameters that can only be [experts, inputs, outputs], by the width that the first one takes and the last one returns: all,
    or the last one where all have one shape."""
    first, last = (list(shapes.values())[i] for i in (0, -1))
    if first[2] == last[1]:
        return frozenset()
    if first[1] == last[2]:
        return frozenset(shapes)
    return frozenset([list(shapes)[-1]]) if first == last else frozenset()


def packed_parts(model: nn.Module, names: Iterable[str]) -> dict[str, Part]:
    """Where the packed weights ``names`` of single experts go, for those that the output of a job names by these rules."""
    banks = {path: Naming.of(module) for path, module in bank_modules(model).items()}
    split = {name: match for name in names if (match := _WEIGHT.fullmatch(name)) is not None} if banks else {}
    keys = {key for naming in banks.values() for key in naming.parts}
    bases = {match[1] for match in split.values()}
    probes = {f"{start}.{key}": base for base in bases for start in (base.removesuffix(_EXPERTS), base) for key in keys}
    placed = skeleton.place(model, probes)
    targets = {**placed.whole, **{name: merge.target for name, merge in placed.merged.items()}}
    paths = {probes[name]: target.rpartition(".")[0] for name, target in targets.items() if target.rpartition(".")[0] in banks}
    found = {}
    for name, match in split.items():
        path = paths.get(match[1])
        for key, parts in banks[path].parts.items() if path is not None else ():
            if match[3] in parts:
                found[name] = Part(f"{path}.{key}", int(match[2]), parts.index(match[3]), len(parts))
    return found


def is_transposed(model: nn.Module, parameter: str) -> bool:
    """Whether a parameter of a bank is [experts, inputs, outputs]."""
    path, _, key = parameter.rpartition(".")
    return key in Naming.of(model.get_submodule(path)).transposed


def base_name(path: str, stored: str) -> str:
    """What the names of a bank's experts begin with in the output. path: of the bank in the model. stored: a tensor of the checkpoint that
    is one of its parameters.

    Checkpoints may have a longer path (``model.language_model.layers``), or another name for the bank itself. So the path is that of the
    tensor up to the module that holds the bank.
    """
    parent, _, bank = path.rpartition(".")
    before, found, _ = stored.rpartition(f".{parent.rpartition('.')[2]}.")
    return experts_of(f"{before}{found}{bank}" if found else path)


def experts_of(path: str) -> str:
    """What the names of experts begin with whose bank has a path."""
    return path if f".{path}".endswith(_EXPERTS) else path + _EXPERTS
