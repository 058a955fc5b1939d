"""The structure of a block, found by experiment on one probe: which Linears share an input, and in which order they depend.

Groups are Linears that receive the same tensor. Poisoning a group's output with NaN shows whose inputs it reaches; a
group's level is the length of the longest such chain before it. A shortcut is a module whose output is, untouched, that of one
of its Linears (attention and its output projection): once that Linear is solved, the module need not run again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bigq.arch import block_linears
from bigq.sched.capture import BlockCall, OutputForm, all_replaced, hidden_of
from bigq.skeleton import linear_weight

#: Linears with fewer inputs or outputs than this are gates of some kind and stay as they are.
SMALLEST = 32


@dataclass(frozen=True, slots=True)
class Group:
    """Linears, by their name in the block, that share one input; ``level`` 0 depends on no other group."""

    names: tuple[str, ...]
    level: int


@dataclass(frozen=True, slots=True)
class Shortcut:
    """A module whose output is that of the Linear ``linear`` inside it; ``form`` is how it returns it."""

    module: str
    linear: str
    form: OutputForm


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """The groups of a block in order of execution, the Linears that stay as they are, and the modules to run once."""

    groups: tuple[Group, ...]
    left_out: tuple[str, ...]
    shortcuts: tuple[Shortcut, ...]

    def levels(self, true_sequential: bool) -> list[list[Group]]:
        if not true_sequential:
            return [list(self.groups)]
        depth = max((g.level for g in self.groups), default=-1) + 1
        return [[g for g in self.groups if g.level == level] for level in range(depth)]


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that spreads from a tensor to all that is computed from it. put: a tensor like y that has it; on: whether x does."""

    put: Callable[[Tensor], Tensor]
    on: Callable[[Tensor], bool]


#: For real tensors.
NAN = Mark(lambda y: torch.full_like(y, float("nan")), lambda x: bool(torch.isnan(x).any()))
#: For tensors without values (meta), where gradients are enabled.
GRADIENT = Mark(lambda y: y.detach().requires_grad_().clone(), lambda x: x.requires_grad)


def plan_block(block: nn.Module, hidden: Tensor, call: BlockCall, mark: Mark = NAN) -> BlockPlan:
    """Find the groups of a loaded block and their levels from one probe [B, T, d]."""
    linears = block_linears(block)
    groups = _groups(block, linears, hidden, call)
    reached = [_marked(block, linears, groups, i, hidden, call, mark) for i in range(len(groups))]
    levels = [0] * len(groups)
    for _ in groups:
        for i, targets in enumerate(reached):
            for t in targets:
                levels[t] = max(levels[t], levels[i] + 1)
    used = {name for group in groups for name in group}
    planned = tuple(Group(tuple(names), level) for names, level in zip(groups, levels, strict=True))
    left_out = tuple(name for name in linears if name not in used)
    return BlockPlan(planned, left_out, _shortcuts(block, planned, hidden, call))


def _groups(block: nn.Module, linears: Mapping[str, nn.Module], hidden: Tensor, call: BlockCall) -> list[list[str]]:
    """Names of Linears by shared input, in order of first call."""
    inputs: list[Tensor] = []
    members: list[list[str]] = []
    calls: dict[str, int] = {}
    unfit: set[str] = set()

    def hook(name: str) -> Callable[..., None]:
        def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            x = args[0]
            calls[name] = calls.get(name, 0) + 1
            if not isinstance(output, Tensor) or output.shape[:-1] != x.shape[:-1]:
                unfit.add(name)
            for known, group in zip(inputs, members, strict=True):
                if _same_tensor(x, known):
                    group.append(name)
                    return
            inputs.append(x)
            members.append([name])

        return after

    handles = [module.register_forward_hook(hook(name)) for name, module in linears.items()]
    try:
        call.run(block, hidden)
    finally:
        for handle in handles:
            handle.remove()
    unfit |= {name for name, count in calls.items() if count > 1}
    unfit |= {name for name, module in linears.items() if min(linear_weight(module).shape) < SMALLEST}
    return [kept for group in members if (kept := [name for name in group if name not in unfit])]


def _same_tensor(a: Tensor, b: Tensor) -> bool:
    """Whether two live tensors are views of the same memory in the same shape and state."""

    def identity(t: Tensor) -> tuple[Any, ...]:
        return t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride(), t._version

    return identity(a) == identity(b)


def _marked(
    block: nn.Module, linears: Mapping[str, nn.Module], groups: list[list[str]], source: int, hidden: Tensor, call: BlockCall, mark: Mark
) -> set[int]:
    """The groups whose input is marked when the outputs of group ``source`` are."""
    names = [name for group in groups for name in group]
    group_of = {name: i for i, group in enumerate(groups) for name in group}
    reached: set[int] = set()

    def make(k: int) -> Callable[[Tensor], Tensor]:
        name, module = names[k], linears[names[k]]

        def forward(x: Tensor) -> Tensor:
            if mark.on(x):
                reached.add(group_of[name])
            y: Tensor = type(module).forward(module, x)
            return mark.put(y) if group_of[name] == source else y

        return forward

    with all_replaced([linears[name] for name in names], make):
        call.run(block, hidden)
    return reached - {source}


def _shortcuts(block: nn.Module, groups: tuple[Group, ...], hidden: Tensor, call: BlockCall) -> tuple[Shortcut, ...]:
    """Modules that return a Linear's output untouched, where that Linear is no wider than the hidden states."""
    level_of = {name: group.level for group in groups for name in group.names}
    outputs: dict[str, list[Any]] = {}

    def hook(name: str) -> Callable[..., None]:
        return lambda _module, _args, output: outputs.setdefault(name, []).append(output)

    handles = [module.register_forward_hook(hook(name)) for name, module in block.named_modules() if name]
    try:
        call.run(block, hidden)
    finally:
        for handle in handles:
            handle.remove()
    found: dict[str, Shortcut] = {}
    for name, results in outputs.items():
        if name in level_of or len(results) > 1 or not OutputForm.fits(results[0]):
            continue
        form = OutputForm.of(results[0])
        inner = [n for n in level_of if n.startswith(name + ".")]
        source = next((n for n in inner if outputs[n][0] is hidden_of(results[0])), None)
        if source is None or form.has_extras or any(level_of[n] > level_of[source] for n in inner):
            continue
        if max(linear_weight(block.get_submodule(source)).shape) <= hidden.shape[-1]:
            found.setdefault(source, Shortcut(name, source, form))
    return tuple(found.values())
