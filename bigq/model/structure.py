"""The structure of a block, found by running one probe: which Linears share an input, and which depend on which.

A group is the Linears that receive the same tensor. Filling a group's outputs with NaN shows which groups' inputs they reach; a group's
level is the length of the longest such chain before it. A shortcut is a module that returns the output of one of its Linears unchanged,
as attention returns that of its output projection and an MLP that of its last Linear. Once that Linear is solved, the module need not
run again: its output follows from the Linear's inputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bigq.errors import UnsupportedModelError
from bigq.model.blocks import block_linears, is_product
from bigq.model.experts.call import BankCall
from bigq.model.experts.cut import MarkedChoices, banks_replaced, called_banks
from bigq.model.forward.block_call import BlockCall, OutputForm, hidden_of
from bigq.model.forward.capture import replace_forwards
from bigq.model.skeleton import linear_weight
from bigq.model.tracers import DataflowTracer, NanTracer

#: Linears with fewer inputs or outputs than this stay unquantized: gates, mostly. Routers do whatever their size, by what they reach.
MIN_FEATURES = 32


@dataclass(frozen=True, slots=True)
class Group:
    """The names in the block of Linears that share one input. A group of level 0 depends on no other group."""

    names: tuple[str, ...]
    level: int


@dataclass(frozen=True, slots=True)
class Shortcut:
    """A module that returns the output of the Linear ``linear`` inside it, perhaps with one of its arguments added (a residual).

    form: how the module returns it. added: the argument's position or name. last: whether the Linear is at the block's deepest level, so
    that only the replay of the whole block runs the module again. idle: modules outside it whose outputs reach nothing but it, as the norm
    before it; in a block without an MLP module, module is the Linear itself, and other Linears are idle.
    """

    module: str
    linear: str
    form: OutputForm
    added: int | str | None = None
    last: bool = False
    idle: tuple[str, ...] = ()

    def returns(self, y: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The module's output for these arguments where its Linear returns y."""
        if self.added is not None:
            y = y + (args[self.added] if isinstance(self.added, int) else kwargs[self.added])
        return self.form.wrap(y)


@dataclass(frozen=True, slots=True)
class BankPlace:
    """Where a bank of experts is in a block. name: of its module. level: of its inputs; groups of lower levels come before it."""

    name: str
    level: int


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """The groups of a block in order of execution, the Linears that stay unquantized, the shortcuts, and the banks of experts.

    routers: those of the Linears left out whose outputs choose experts.
    """

    groups: tuple[Group, ...]
    left_out: tuple[str, ...]
    shortcuts: tuple[Shortcut, ...]
    banks: tuple[BankPlace, ...] = ()
    routers: frozenset[str] = frozenset()

    def why_left(self, name: str, shape: tuple[int, ...]) -> str:
        """Why a Linear stays unquantized, as the predicate of a sentence about it. shape: of its weight."""
        if name in self.routers:
            return "chooses experts"
        if min(shape) < MIN_FEATURES:
            return f"has fewer than {MIN_FEATURES} inputs or outputs"
        return "is called several times, or computes something else"

    def with_shortcuts(self, *, last: bool, others: bool) -> BlockPlan:
        """The same structure, where only some modules have a shortcut: those whose Linear is at the deepest level, or the others."""
        return dataclasses.replace(self, shortcuts=tuple(s for s in self.shortcuts if (last if s.last else others)))

    def levels(self, true_sequential: bool) -> list[list[Group]]:
        """The groups by level; without true-sequential there is one level."""
        if not true_sequential:
            return [list(self.groups)]
        depth = max((g.level for g in self.groups), default=-1) + 1
        return [[g for g in self.groups if g.level == level] for level in range(depth)]


def plan_block(block: nn.Module, hidden: Tensor, call: BlockCall, tracer: DataflowTracer | None = None) -> BlockPlan:
    """Find the groups of a block, their levels and its shortcuts from one probe [B, T, d]. tracer: defaults to NanTracer.

    Attention is computed by plain operations, which pass every NaN on. Fused kernels need not: the maximum that they keep may ignore NaN.
    Banks of experts return 0 instead of running, with the mark of what they receive.
    """
    tracer = tracer or NanTracer()

    def pass_on(_: str, bank: BankCall) -> Tensor:
        y = bank.zeros
        return tracer.mark(y) if any(tracer.is_marked(x) for x in (bank.tokens, bank.choice) if x is not None) else y

    with sdpa_kernel(SDPBackend.MATH), banks_replaced(block, pass_on):
        return _plan_block(block, hidden, call, tracer)


def _plan_block(block: nn.Module, hidden: Tensor, call: BlockCall, tracer: DataflowTracer) -> BlockPlan:
    linears = block_linears(block)
    groups = _groups(block, linears, hidden, call)
    routers = _routers(block, linears, groups, hidden, call, tracer)
    small = {name for name, module in linears.items() if min(linear_weight(module).shape) < MIN_FEATURES}
    groups = [kept for group in groups if (kept := [name for name in group if name not in routers | small])]
    traces = [_trace(block, linears, groups, groups[i], hidden, call, tracer) for i in range(len(groups))]
    reached = [trace.groups - {i} for i, trace in enumerate(traces)]
    levels = [0] * len(groups)
    for _ in groups:
        for i, targets in enumerate(reached):
            for t in targets:
                levels[t] = max(levels[t], levels[i] + 1)
    used = {name for group in groups for name in group}
    planned = tuple(Group(tuple(names), level) for names, level in zip(groups, levels, strict=True))
    left_out = tuple(name for name in linears if name not in used)
    places = tuple(
        BankPlace(name, max((level + 1 for level, trace in zip(levels, traces, strict=True) if name in trace.tokens), default=0))
        for name in called_banks(block, lambda: call.run(block, hidden))
    )
    deepest = max([*levels, *(place.level for place in places)], default=0)
    shortcuts = _shortcuts(block, planned, deepest, hidden, call, tracer)
    covered = {shortcut.linear for shortcut in shortcuts}
    for i, group in enumerate(planned):
        if group.level == deepest and len(group.names) == 1 and group.names[0] not in covered:
            idle = tuple(name for other, targets in zip(planned, reached, strict=True) if targets == {i} for name in other.names)
            shortcut = Shortcut(group.names[0], group.names[0], OutputForm(None), last=True, idle=idle)
            if idle and _leaves_idle(shortcut, block, hidden, call, tracer):
                shortcuts = (*shortcuts, shortcut)
    shortcuts = tuple(_with_idle_norms(s, block, hidden, call, tracer) for s in shortcuts)
    return BlockPlan(planned, left_out, shortcuts, places, frozenset(routers))


def _groups(block: nn.Module, linears: Mapping[str, nn.Module], hidden: Tensor, call: BlockCall) -> list[list[str]]:
    """The names of Linears by shared input, in order of first call, without those that compute something else."""
    inputs: list[Tensor] = []
    members: list[list[str]] = []
    calls: dict[str, int] = {}
    unfit: set[str] = set()

    def hook(name: str) -> Callable[..., None]:
        def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            x = args[0]
            calls[name] = calls.get(name, 0) + 1
            if not is_product(linears[name], x, output):
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
    return [kept for group in members if (kept := [name for name in group if name not in unfit])]


def _same_tensor(a: Tensor, b: Tensor) -> bool:
    """Whether two live tensors are equal views of the same memory, with no write in between."""

    def identity(t: Tensor) -> tuple[Any, ...]:
        return t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride(), t._version

    return identity(a) == identity(b)


@dataclass(frozen=True, slots=True)
class _Trace:
    """What marked outputs reach. groups: those whose input has the mark. tokens, choices: banks of which the tokens, or the weights of the
    chosen experts, have it."""

    groups: set[int]
    tokens: set[str]
    choices: set[str]


def _trace(
    block: nn.Module,
    linears: Mapping[str, nn.Module],
    groups: list[list[str]],
    marked: Collection[str],
    hidden: Tensor,
    call: BlockCall,
    tracer: DataflowTracer,
) -> _Trace:
    """What is reached when the outputs of the Linears ``marked`` are marked. A bank passes the mark of its tokens on."""
    names = [name for group in groups for name in group]
    group_of = {name: i for i, group in enumerate(groups) for name in group}
    trace = _Trace(set(), set(), set())

    def make(k: int) -> Callable[[Tensor], Tensor]:
        name, module = names[k], linears[names[k]]

        def forward(x: Tensor) -> Tensor:
            if tracer.is_marked(x):
                trace.groups.add(group_of[name])
            y: Tensor = type(module).forward(module, x)
            return tracer.mark(y) if name in marked else y

        return forward

    def bank(name: str, bank: BankCall) -> Tensor:
        if choices.marked(bank.choices) if bank.repeats else bank.choice is not None and tracer.is_marked(bank.choice):
            trace.choices.add(name)
        y = bank.zeros
        if tracer.is_marked(bank.tokens):
            trace.tokens.add(name)
            y = tracer.mark(y)
        return y

    with MarkedChoices(tracer.is_marked) as choices, replace_forwards([linears[name] for name in names], make), banks_replaced(block, bank):
        call.run(block, hidden)
    return trace


def _routers(
    block: nn.Module, linears: Mapping[str, nn.Module], groups: list[list[str]], hidden: Tensor, call: BlockCall, tracer: DataflowTracer
) -> set[str]:
    """Linears that only choose experts: their outputs reach the choice of a bank and not its tokens. They stay unquantized."""
    if not called_banks(block, lambda: call.run(block, hidden)):
        return set()
    traces = {name: _trace(block, linears, groups, {name}, hidden, call, tracer) for group in groups for name in group}
    return {name for name, trace in traces.items() if trace.choices - trace.tokens}


@dataclass(frozen=True, slots=True)
class _ModuleCall:
    """One call of a module. returned: a copy of the hidden states in ``output``, which may be overwritten later."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any
    returned: Tensor


def _shortcuts(
    block: nn.Module, groups: tuple[Group, ...], deepest: int, hidden: Tensor, call: BlockCall, tracer: DataflowTracer
) -> tuple[Shortcut, ...]:
    """Modules that return a Linear's output, unchanged or with an argument added.

    deepest: the block's deepest level, that of a bank included. Before it the Linear must be no wider than the hidden states. Each
    shortcut is tested: with it, the block must return the same bits.
    """
    level_of = {name: group.level for group in groups for name in group.names}
    seen: dict[str, list[_ModuleCall]] = {}

    def hook(name: str) -> Callable[..., None]:
        def after(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
            if OutputForm.fits(output):
                seen.setdefault(name, []).append(_ModuleCall(args, kwargs, output, hidden_of(output).clone()))

        return after

    handles = [module.register_forward_hook(hook(name), with_kwargs=True) for name, module in block.named_modules() if name]
    hidden = tracer.begin(hidden)
    try:
        expected = call.outputs(block, hidden.clone())
    finally:
        for handle in handles:
            handle.remove()
    found: dict[str, Shortcut] = {}
    for name, calls in seen.items():
        if name in level_of or len(calls) > 1:
            continue
        inner = [n for n in level_of if n.startswith(name + ".")]
        for source in inner:
            if source in found or any(level_of[n] > level_of[source] for n in inner):
                continue
            last = level_of[source] == deepest
            if not last and max(linear_weight(block.get_submodule(source)).shape) > hidden.shape[-1]:
                continue
            if not seen[source][0].returned.numel():  # no token reaches it, such as an adapter of another language
                continue
            shortcut = _shortcut(name, calls[0], source, seen[source][0], tracer, last)
            if shortcut is not None and _is_exact(shortcut, block, seen[source][0].returned, hidden, call, expected, tracer):
                found[source] = shortcut
    return tuple(found.values())


def _shortcut(name: str, module: _ModuleCall, source: str, linear: _ModuleCall, tracer: DataflowTracer, last: bool) -> Shortcut | None:
    """The shortcut of a module by a Linear in it; None if the module's output is not a simple function of the Linear's."""
    result, form = hidden_of(module.output), OutputForm.of(module.output)
    if result is linear.output:
        return Shortcut(name, source, form, last=last)
    places: list[tuple[int | str, Any]] = [*enumerate(module.args), *module.kwargs.items()]
    for place, r in places:
        if isinstance(r, Tensor) and r.shape == result.shape == linear.output.shape and tracer.is_sum(result, linear.output, r):
            return Shortcut(name, source, form, place, last)
    return None


def _with_idle_norms(shortcut: Shortcut, block: nn.Module, hidden: Tensor, call: BlockCall, tracer: DataflowTracer) -> Shortcut:
    """The shortcut with those children of the block that only feed its module and keep the shape of their input, as norms do."""
    for name, child in block.named_children():
        if block_linears(child) or shortcut.module.split(".")[0] == name:
            continue
        tried = dataclasses.replace(shortcut, idle=(*shortcut.idle, name))
        if _keeps_shape(child, block, hidden, call) and _leaves_idle(tried, block, hidden, call, tracer):
            shortcut = tried
    return shortcut


def _keeps_shape(module: nn.Module, block: nn.Module, hidden: Tensor, call: BlockCall) -> bool:
    """Whether the block calls a module once, with one tensor, and it returns another of the same shape and dtype."""
    kept: list[bool] = []

    def after(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Any) -> None:
        x = args[0] if len(args) == 1 and not kwargs else None
        kept.append(isinstance(x, Tensor) and isinstance(y, Tensor) and (x.shape, x.dtype) == (y.shape, y.dtype))

    handle = module.register_forward_hook(after, with_kwargs=True)
    try:
        call.run(block, hidden.clone())
    finally:
        handle.remove()
    return kept == [True]


def _leaves_idle(shortcut: Shortcut, block: nn.Module, hidden: Tensor, call: BlockCall, tracer: DataflowTracer) -> bool:
    """Whether the block returns the same bits where idle modules return marked values and the shortcut's Linear what it returned."""
    linear = block.get_submodule(shortcut.linear)
    returned: list[Tensor] = []
    handle = linear.register_forward_hook(lambda module, args, output: returned.append(output.detach().clone()))
    try:
        expected = call.outputs(block, hidden.clone())
    finally:
        handle.remove()

    def make(i: int) -> Callable[..., Any]:
        if i == len(shortcut.idle):
            return lambda *args, **kwargs: shortcut.returns(returned[0].clone(), args, kwargs)
        module = block.get_submodule(shortcut.idle[i])
        return lambda x: tracer.mark(type(module).forward(module, x))

    with replace_forwards([*map(block.get_submodule, shortcut.idle), block.get_submodule(shortcut.module)], make):
        outputs = call.outputs(block, hidden.clone())
    clean = not any(map(tracer.is_marked, outputs)) and _same_outputs(outputs, expected, tracer)
    return bool(returned[0].numel()) and clean


def _is_exact(
    shortcut: Shortcut, block: nn.Module, y: Tensor, hidden: Tensor, call: BlockCall, expected: Sequence[Tensor], tracer: DataflowTracer
) -> bool:
    """Whether the block returns the same bits with a shortcut. y: the output of its Linear."""

    def make(_: int) -> Callable[..., Any]:
        return lambda *args, **kwargs: shortcut.returns(y, args, kwargs)

    # A block that fails without the module's extra output, or hands it on, cannot use the shortcut.
    with replace_forwards([block.get_submodule(shortcut.module)], make):
        try:
            return _same_outputs(call.outputs(block, hidden.clone()), expected, tracer)
        except (AttributeError, TypeError, RuntimeError, UnsupportedModelError):
            return False


def _same_outputs(outputs: Sequence[Tensor], expected: Sequence[Tensor], tracer: DataflowTracer) -> bool:
    return all(tracer.same(a, b) for a, b in zip(outputs, expected, strict=True))
