"""Finding the folds of a block, by running it on stand-ins of its weights (``rotation.standins``).

A Linear's input is divided by a norm if the norm returns it; by a Linear before it, if doubling some of that one's outputs doubles the
input: values that attention averages, or what a gate multiplies. Which of the outputs belongs to which input is read from runs in which
those are doubled whose number has a certain bit. Scales are powers of two, so nothing is rounded: a right fold leaves the bits of the
block's output as they are, and any other changes them. That is the proof, which every fold has to pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bigq.model.folding.fold import BlockFolds, Fold
from bigq.model.rotation.standins import Bare, generator_of
from bigq.model.skeleton import linear_weight

#: The largest relative difference of a block's output where a norm adds a number to its weight, which rounds in fp32.
CLOSE = 1e-5

Call = Callable[[Tensor], Tensor]


class _Seen:
    """What modules received and returned in one run, and the block's output."""

    def __init__(self) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.calls: dict[str, int] = {}
        self.result = torch.empty(0)


class BlockExperiments:
    """Runs of one block on stand-ins. call: its output for hidden states like ``hidden`` [B, T, d]. sizes: that heads may have."""

    def __init__(self, bare: Bare, call: Call, hidden: Tensor, sizes: Sequence[int]) -> None:
        self._bare, self._call, self._hidden, self._sizes = bare, call, hidden, tuple(sizes)
        self._modules = dict(bare.module.named_modules())
        self._matrices = {*bare.linears, *bare.banks, *(name for name, module in self._modules.items() if name and _has_matrix(module))}
        self._base = self.run()

    def find(self) -> BlockFolds:
        """All folds of the block, each proven."""
        folds: list[Fold] = []
        without: list[str] = []
        for readers in self._groups():
            fold = next((fold for fold in self._candidates(readers) if self.proven(fold)), None)
            if fold is not None:
                folds.append(fold)
            else:
                without += [name for name in readers if name in self._bare.linears or name in self._bare.banks]
        return BlockFolds(tuple(folds), tuple(without))

    def proven(self, fold: Fold) -> bool:
        """Whether a block where scales are folded returns the same, and all that has a matrix receives the same: the same bits, unless an
        offset rounds."""
        scales = 2.0 ** torch.randint(-2, 3, (fold.count,), generator=generator_of(str(fold))).to(self._hidden.device)
        inputs = dict.fromkeys(fold.readers, scales[fold.channels])
        if fold.rows is not None:
            factor = torch.ones(linear_weight(self._bare.linears[fold.producer]).shape[0], device=scales.device)
            factor[fold.rows] = 1 / scales
            seen = self.run(outputs={fold.producer: factor}, inputs=inputs)
        else:
            seen = self.run(values=self._divided(fold, scales), inputs=inputs)
        pairs = [(seen.result, self._base.result)]
        pairs += [(seen.inputs[name], x) for name, x in self._base.inputs.items() if name in self._matrices or name not in self._modules]
        if not fold.offset:
            return all(torch.equal(*pair) for pair in pairs)
        return all(bool((found - expected).norm() <= CLOSE * expected.norm()) for found, expected in pairs)

    def run(
        self,
        *,
        outputs: Mapping[str, Tensor] | None = None,
        inputs: Mapping[str, Tensor] | None = None,
        values: Mapping[str, Tensor] | None = None,
    ) -> _Seen:
        """Run the block. outputs, inputs: factors of what modules return and receive, one for each feature. values: of parameters."""
        seen = _Seen()

        def after(name: str, x: Tensor, y: Tensor) -> Tensor:
            if name in self._bare.banks or name not in self._modules:  # what a bank is called with is in no fixed place; and its choice
                seen.inputs[name] = x
                seen.calls[name] = seen.calls.get(name, 0) + 1
            return y

        with self._hooks(seen, outputs or {}, inputs or {}):
            seen.result = self._bare.run(lambda: self._call(self._hidden), after, values=values)
        return seen

    @contextlib.contextmanager
    def _hooks(self, seen: _Seen, outputs: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Iterator[None]:
        handles = []

        def watch(name: str, module: nn.Module) -> None:
            def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                if name in inputs:
                    return _first_scaled(args, kwargs, inputs[name])
                return None

            def behind(_: nn.Module, args: tuple[Any, ...], y: Any) -> Any:
                if name not in self._bare.banks:
                    seen.calls[name] = seen.calls.get(name, 0) + 1
                    if args and isinstance(args[0], Tensor):
                        seen.inputs[name] = args[0].clone()
                if not isinstance(y, Tensor):  # such as what a router returns
                    return None
                y = y * outputs[name] if name in outputs else y
                seen.outputs[name] = y.clone()
                return y

            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(behind))

        for name, module in self._modules.items():
            if name and any(True for _ in module.parameters(recurse=False)):
                watch(name, module)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _groups(self) -> list[tuple[str, ...]]:
        """Everything with a matrix, by the input that it shares, where a Linear or a bank is among it."""
        groups: list[tuple[Tensor, list[str]]] = []
        for name in sorted(self._matrices, key=list(self._modules).index):
            x = self._base.inputs.get(name)
            if x is None or self._base.calls[name] > 1:
                continue
            x = x.flatten(0, -2)
            group = next((names for known, names in groups if _equal(known, x)), None)
            if group is None:
                groups.append((x, [name]))
            else:
                group.append(name)
        weights = {*self._bare.linears, *self._bare.banks}
        return [tuple(names) for _, names in groups if weights.intersection(names)]

    def _candidates(self, readers: tuple[str, ...]) -> Iterator[Fold]:
        """Folds that may be, the likeliest first."""
        x = self._base.inputs[readers[0]]
        n = x.shape[-1]
        identity = torch.arange(n, device=x.device)
        for name in self._modules:
            if self._is_norm(name, n) and _equal(self._base.outputs[name].flatten(0, -2), x.flatten(0, -2)):
                for offset in (0.0, 1.0):
                    yield Fold(producer=name, readers=readers, channels=identity, offset=offset)
        for name in self._bare.linears:
            if name not in readers and self._base.calls.get(name) == 1:
                yield from self._behind(name, readers, x)

    def _is_norm(self, name: str, n: int) -> bool:
        """Whether a module may be a norm of n features: it has one or two vectors, and nothing else."""
        parameters = list(self._modules[name].parameters())
        return name in self._base.outputs and 0 < len(parameters) <= 2 and all(tuple(p.shape) == (n,) for p in parameters)

    def _behind(self, producer: str, readers: tuple[str, ...], x: Tensor) -> Iterator[Fold]:
        """Folds in which some outputs of a Linear are divided. x: the readers' input."""
        m = linear_weight(self._bare.linears[producer]).shape[0]
        if torch.equal(self._input(readers, producer, torch.full((m,), 2.0, device=x.device)), x):
            return
        for rows in candidate_rows(m, x.shape[-1], self._sizes):
            factor = torch.ones(m, device=x.device)
            rows = rows.to(x.device)
            factor[rows] = 2.0
            if torch.equal(self._input(readers, producer, factor), 2 * x):
                channels = self._channels(producer, readers, x, m, rows)
                if channels is not None:
                    yield Fold(producer=producer, readers=readers, channels=channels, rows=rows)

    def _input(self, readers: tuple[str, ...], producer: str, factor: Tensor) -> Tensor:
        return self.run(outputs={producer: factor}).inputs[readers[0]]

    def _channels(self, producer: str, readers: tuple[str, ...], x: Tensor, m: int, rows: Tensor) -> Tensor | None:
        """Which of some outputs of a Linear each input belongs to; None where it belongs to several."""
        channels = torch.zeros(x.shape[-1], dtype=torch.long, device=x.device)
        number = torch.arange(len(rows), device=x.device)
        given = x.flatten(0, -2)
        for bit in range(max(1, (len(rows) - 1).bit_length())):
            factor = torch.ones(m, device=x.device)
            factor[rows] = 1.0 + (number >> bit & 1)
            found = self._input(readers, producer, factor).flatten(0, -2)
            same, doubled = (found == given).all(0), (found == 2 * given).all(0)
            if not bool((same | doubled).all()):
                return None
            channels += (doubled & ~same).long() << bit
        silent = (given == 0).all(0)
        if bool(silent.any()) and len(rows) == len(channels):  # nothing shows where these belong but that all others are in order
            channels = torch.where(silent & (channels[~silent] == number[~silent]).all(), number, channels)
        return channels if len(channels.unique()) == len(rows) else None

    def _divided(self, fold: Fold, scales: Tensor) -> dict[str, Tensor]:
        """The parameters of a norm that divides."""
        found = {}
        for leaf, _ in self._modules[fold.producer].named_parameters():
            value = self._bare.parameters[f"{fold.producer}.{leaf}"]
            offset = fold.offset if leaf == "weight" else 0.0
            found[f"{fold.producer}.{leaf}"] = (value + offset) / scales - offset
        return found


def candidate_rows(m: int, n: int, sizes: Sequence[int]) -> Iterator[Tensor]:
    """Which outputs of a Linear of m outputs may be the ones that an input of n features belongs to.

    All; or of each period the last or the first ones: the values behind queries and keys, head by head or of all heads, and the half of
    gate and up, one behind the other or in turns. sizes: that heads may have.
    """
    tried: set[tuple[int, int, bool]] = set()
    for count in (m, n, (m - n) // 2 if (m - n) % 2 == 0 else 0):
        if count <= 0 or count > m or n % count:
            continue
        for size in (count, *sizes, 1):
            if count % size or m * size % count:
                continue
            period = m * size // count
            for last in (True, False):
                if (size, period, last) in tried or (size == period and (size, period, True) in tried):
                    continue
                tried.add((size, period, last))
                at = torch.arange(m) % period
                yield torch.nonzero(at >= period - size if last else at < size).flatten()


def _has_matrix(module: nn.Module) -> bool:
    return any(param.ndim == 2 for param in module.parameters(recurse=False))


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def _first_scaled(args: tuple[Any, ...], kwargs: dict[str, Any], factor: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a module whose first tensor is multiplied by a factor for each feature."""
    if args:
        return (args[0] * factor, *args[1:]), kwargs
    name = next(name for name, value in kwargs.items() if isinstance(value, Tensor))
    return args, {**kwargs, name: kwargs[name] * factor}
