"""Finding what the weights of a block have to do with the residual stream, by running it on stand-ins.

Norms are held at what they returned, so that nothing depends on the stream but the stream itself. A change of the block's input must then
reach its output, and the inputs of norms that read the stream, unchanged but for a factor; so must a change of what a Linear adds to it.
What is found is a guess that ``proof`` tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from bigq.errors import UnsupportedModelError
from bigq.model.rotation.banks import ADVICE, bank_roles
from bigq.model.rotation.matrices import Rotation
from bigq.model.rotation.roles import HEAD_SEED, STREAM_SEED, BankRole, HeadPair, Roles
from bigq.model.rotation.standins import Bare, generator_of
from bigq.model.rotation.weights import Side
from bigq.model.skeleton import linear_weight

#: Relative errors below this are rounding: everything runs in fp32.
CLOSE = 1e-3

Call = Callable[[Tensor], Tensor]


class Seen:
    """The first inputs and the outputs of modules in one run, and how often each was called."""

    def __init__(self) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.calls: dict[str, int] = {}

    def after(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        self.inputs[name], self.outputs[name] = x.clone(), y.clone()
        self.calls[name] = self.calls.get(name, 0) + 1
        return y


def find_roles(bare: Bare, call: Call, hidden: Tensor, sizes: Iterable[int], *, ends: bool = False) -> Roles:
    """The roles in a block, or in what follows the blocks. call: its output for hidden states like ``hidden`` [B, T, d].

    sizes: that heads may have. ends: whether the stream ends there, in logits. Raises UnsupportedModelError, naming what cannot be rotated.
    """
    base = Seen()
    output = bare.run(lambda: call(hidden), base.after)
    norms = _stream_norms(bare, call, hidden, base, None if ends else output)
    offsets = {name: _offset(bare, name, base.inputs[name]) for name in norms}
    readers = _readers(base, [*bare.linears, *bare.banks], norms)
    tables = _readers(base, bare.tables, norms)
    writers = () if ends else _writers(bare, call, hidden, base, output)
    heads = tuple(_heads(bare, call, hidden, base, readers, writers, tuple(sizes)))
    banks: dict[str, BankRole] = {}
    for name in bare.banks:
        if name in readers and name in writers:
            banks |= bank_roles(bare, name, readers[name], bare.calls[name])
    return Roles(norms=offsets, readers=readers, tables=tables, writers=writers, heads=heads, banks=banks)


def factor_of(change: Tensor, given: Tensor) -> float | None:
    """The mean of c where every vector of a change is c times the given one; 0 where there is none; None where it is anything else.

    Each token may have a c of its own, as that of a gate: rotations do not see it.
    """
    if change.shape != given.shape:
        return None
    c = (change * given).sum(-1, keepdim=True) / given.square().sum(-1, keepdim=True)
    rest = float((change - c * given).norm() / given.norm())
    mean = float(c.abs().mean())
    if rest > CLOSE * max(1.0, mean):
        return None
    return float(c.mean()) if mean > CLOSE else 0.0


def _noise(name: str, like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=generator_of(f"{name} changed")).to(like.device)


def _held(base: Seen, norms: Iterable[str], change: Mapping[str, Tensor], seen: Seen) -> Callable[[str, Tensor, Tensor], Tensor]:
    """Norms return what they did; outputs of some modules are changed."""
    held = set(norms)

    def after(name: str, x: Tensor, y: Tensor) -> Tensor:
        seen.after(name, x, y)
        y = base.outputs[name] if name in held else y
        return y + change[name] if name in change else y

    return after


def _stream_norms(bare: Bare, call: Call, hidden: Tensor, base: Seen, output: Tensor | None) -> list[str]:
    """The norms whose inputs change as the block's input does. output: None where
    the stream ends. Raises UnsupportedModelError where the stream itself is changed."""
    noise, seen = _noise("stream", hidden), Seen()
    changed = bare.run(lambda: call(hidden + noise), _held(base, bare.norms, {}, seen))
    names = [*bare.linears, *bare.tables, *bare.banks]
    readers = [name for name in names if name in seen.inputs and not torch.equal(seen.inputs[name], base.inputs[name])]
    if readers:
        raise UnsupportedModelError(
            f"--rotate: {bare.name}.{readers[0]} reads the residual stream behind no norm with a weight for each feature and nothing else "
            f"(a LayerNorm has a bias); {ADVICE}"
        )
    found = []
    for name in bare.norms:
        if name not in seen.inputs:
            continue
        c = factor_of(seen.inputs[name] - base.inputs[name], noise)
        if c is None and seen.inputs[name].shape[-1] == bare.width:
            raise UnsupportedModelError(f"--rotate: {bare.name}.{name} normalizes something else than the residual stream; {ADVICE}")
        if c:
            if base.calls[name] > 1:
                raise UnsupportedModelError(f"--rotate: {bare.name}.{name} is called several times; {ADVICE}")
            found.append(name)
    if output is not None and not factor_of(changed - output, noise):
        raise UnsupportedModelError(f"--rotate: {bare.name} does more to the residual stream than to add to it; {ADVICE}")
    return found


def _offset(bare: Bare, name: str, x: Tensor) -> float:
    """What a norm adds to its weight before it multiplies by it. Raises UnsupportedModelError unless it commutes with rotations."""
    module, path = bare.module.get_submodule(name), f"{name}.{bare.norms[name]}"
    weight = bare.parameters[path]

    def out(x: Tensor, value: Tensor) -> Tensor:
        return bare.run(lambda: module(x), values={path: value})

    zero, one = out(x, torch.zeros_like(weight)), out(x, torch.ones_like(weight))
    unit = one - zero
    rotation = Rotation(bare.width, STREAM_SEED)
    offset = factor_of(zero, unit)  # the same for all tokens, as the next check shows
    if offset is None or not _close(out(x, weight), unit * (weight + offset)) or unit.norm() == 0:
        raise UnsupportedModelError(f"--rotate: {bare.name}.{name} does more with its weight than to multiply by it; {ADVICE}")
    if not _close(out(rotation.turn(x), one_like := torch.ones_like(weight)), rotation.turn(out(x, one_like))):
        raise UnsupportedModelError(
            f"--rotate: {bare.name}.{name} is no RMSNorm: rotated inputs do not give rotated outputs, since it subtracts the mean; {ADVICE}"
        )
    return round(offset, 3)


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() <= CLOSE * b.norm().clamp(min=1e-30))


def _readers(base: Seen, names: Iterable[str], norms: Iterable[str]) -> dict[str, str]:
    """Those of some modules whose inputs are what a norm of the stream returned, and that norm."""
    names, readers = list(names), {}
    for norm in norms:
        y = base.outputs[norm].flatten(0, -2)
        for name in names:
            x = base.inputs.get(name)
            if x is not None and x.shape[-1] == y.shape[-1] and torch.equal(x.flatten(0, -2), y):
                readers[name] = norm
    return readers


def _writers(bare: Bare, call: Call, hidden: Tensor, base: Seen, output: Tensor) -> tuple[str, ...]:
    """Linears whose outputs are added to the stream. Raises UnsupportedModelError where a norm's are."""
    found = []
    for name in (*bare.linears, *bare.banks, *bare.norms):
        if name not in base.outputs or base.outputs[name].shape[-1] != bare.width or base.calls[name] > 1:
            continue
        noise = _noise(name, base.outputs[name])
        changed = bare.run(lambda: call(hidden), _held(base, bare.norms, {name: noise}, Seen()))
        if changed.numel() != noise.numel() or not factor_of(changed - output, noise.reshape(changed.shape)):
            continue
        if name in bare.norms:
            raise UnsupportedModelError(
                f"--rotate: {bare.name}.{name} weighs features of what is added to the residual stream, which no Linear behind it can take "
                f"over; {ADVICE}"
            )
        found.append(name)
    return tuple(found)


def _heads(
    bare: Bare, call: Call, hidden: Tensor, base: Seen, readers: Mapping[str, str], writers: Iterable[str], sizes: tuple[int, ...]
) -> Iterable[HeadPair]:
    """Pairs of a value and an output projection: where values that are rotated head by head give inputs that are."""
    taken: set[str] = set()
    for writer in writers:
        if writer in readers:
            continue
        inputs = linear_weight(bare.linears[writer]).shape[1]
        for pair in _candidates(bare, readers, writer, inputs, sizes):
            if pair.value in taken:
                continue
            turn = Rotation(pair.size, HEAD_SEED)
            values, reads, seen = Side(turn, pair.first, pair.values), Side(turn, 0, pair.reads), Seen()

            def after(name: str, x: Tensor, y: Tensor, pair: HeadPair = pair, values: Side = values, seen: Seen = seen) -> Tensor:
                seen.after(name, x, y)
                return values.turn(y) if name == pair.value else y

            bare.run(lambda: call(hidden), after)
            was, now = base.inputs[writer], seen.inputs[writer]
            if _close(now, reads.turn(was)) and not _close(now, was):
                taken.add(pair.value)
                yield pair
                break


def _candidates(bare: Bare, readers: Mapping[str, str], writer: str, inputs: int, sizes: tuple[int, ...]) -> Iterable[HeadPair]:
    """The pairs that may be: all outputs of a reader are values, or the last ones, behind those of queries and keys."""
    for name in (name for name in readers if name in bare.linears):
        outputs = linear_weight(bare.linears[name]).shape[0]
        for size in sizes:
            if size < 2 or inputs % size:
                continue
            if outputs % size == 0 and inputs % outputs == 0:
                yield HeadPair(name, writer, size, outputs // size, inputs // size)
            rest = outputs - inputs  # of keys and values, behind the queries
            if rest > 0 and rest % (2 * size) == 0:
                values = rest // 2 // size
                yield HeadPair(name, writer, size, values, inputs // size, outputs - values * size)
