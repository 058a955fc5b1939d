"""Surveys of models that tests have made before: half of the time of a job on a tiny model goes into its plan.

A survey runs the model on meta, so it depends on the skeleton, on how its weights are stored and on the row length. All of these are
compared, so a job gets a remembered result only if its own would be the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from types import FunctionType
from typing import Any

import torch
from torch import nn

from bigq.io.index import TensorInfo
from bigq.machine.ceilings import Ceilings
from bigq.model.experts.pages import StoredBank
from bigq.sched.plan.shape import ModelShape
from bigq.sched.plan.survey import Outline

Survey = Callable[[Outline, int], ModelShape]
Measure = Callable[[torch.device, torch.dtype], Ceilings]


def remembered_survey(survey: Survey) -> Survey:
    """``survey``, made once for each outline and row length. What it raises is not remembered."""
    known: dict[Hashable, ModelShape] = {}

    def remembered(outline: Outline, seqlen: int) -> ModelShape:
        key = (seqlen, *all_of(outline))
        if key not in known:
            known[key] = survey(outline, seqlen)
        return known[key]

    return remembered


def remembered_rates(measure: Measure) -> Measure:
    """``measure``, called once for each device, dtype and number of threads."""
    known: dict[Hashable, Ceilings] = {}

    def remembered(device: torch.device, dtype: torch.dtype) -> Ceilings:
        key = (str(device), dtype, torch.get_num_threads())
        if key not in known:
            known[key] = measure(device, dtype)
        return known[key]

    return remembered


def all_of(outline: Outline) -> tuple[Hashable, ...]:
    """All that a survey can see of a model: but for the values of its tensors, and where in files they are."""
    model = outline.model
    modules = tuple(model.named_modules())
    parameters = model.named_parameters(remove_duplicate=False)
    buffers = model.named_buffers(remove_duplicate=False)
    first: dict[int, str] = {}  # of the names of a tied parameter
    return (
        outline.blocks_path,
        outline.dtype,
        outline.stored,
        outline.coded,
        outline.fused,
        tuple((name, *stored(info)) for name, info in outline.sources.items()),
        tuple((name, *stored_bank(bank)) for name, bank in outline.banks.items()),
        repr(model.config.to_dict() | {"_name_or_path": None}),  # type: ignore[operator, union-attr]
        str(getattr(model.config, "_attn_implementation", None)),
        tuple((name, type(module), settings(module)) for name, module in modules),
        tuple({kind: tuple(code(kind)) for kind in map(type, (module for _, module in modules))}.items()),
        tuple((name, first.setdefault(id(p), name), p.shape, p.dtype, p.requires_grad) for name, p in parameters),
        tuple((name, b.shape, b.dtype) for name, b in buffers),
    )


def stored(info: TensorInfo) -> tuple[Hashable, ...]:
    return info.name, info.dtype, info.shape, info.nbytes, info.stored_bytes, repr(info.coding)


def stored_bank(bank: StoredBank) -> tuple[Hashable, ...]:
    parts = ((key, repr(shape), bank.matrices(key, 0), bank.nbytes(key), bank.dtype(key)) for key, shape in bank.shapes.items())
    return bank.path, bank.base, bank.experts, bank.is_whole, bank.is_joined, *parts


def code(kind: type[Any]) -> Iterator[Hashable]:
    """The functions of a class. Tests replace some; code that comes with a model makes classes of its own."""
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        yield from (value for value in vars(base).values() if isinstance(value, FunctionType))


def settings(module: nn.Module) -> tuple[Hashable, ...]:
    """A module's own values, such as its layer's kind of attention, and functions in place of its class's."""
    plain = (bool, int, float, str, tuple, list, dict, type(None))
    values = ((name, value) for name, value in vars(module).items() if name[0] != "_" and name != "name_or_path")
    kept = ((name, value) for name, value in values if isinstance(value, (*plain, FunctionType)))
    return tuple((name, value if isinstance(value, FunctionType) else repr(value)) for name, value in kept)
