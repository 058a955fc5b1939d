"""Keeps what modules with a shortcut need, row by row, so that these modules run once.

Before the deepest level of a block a module's output is cached: one hidden state per token. At the deepest level the inputs of its
Linear are kept, as far as memory has room: only the replay of the whole block needs them, and runs the Linear alone. With both, solving
a llama block takes one forward of its attention and of its Linears instead of 4 and 2.2.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bigq.model.experts.call import BankCall
from bigq.model.experts.cut import banks_replaced
from bigq.model.forward.capture import replace_forwards
from bigq.model.skeleton import is_linear, linear_weight
from bigq.model.structure import Shortcut
from bigq.sched.rows.routed import RoutedRows
from bigq.sched.rows.store import ActivationStore
from bigq.sched.rows.tiers import RowBuffer, Tier


@dataclass(slots=True)
class LastInputs:
    """Where the inputs of Linears at a block's deepest level are kept, throughout a job.

    rows: the first so many rows are kept. tier: of their buffers; None if there are none. Buffers in host memory are reused by the next
    block: pinning takes longer than what they save, and 11 MiB are written to new pages in 2.8 ms, to known ones in 0.2 ms (two cores).
    """

    rows: int = 0
    tier: Tier | None = None
    _spare: dict[tuple[int, torch.dtype], list[RowBuffer]] = field(default_factory=dict)

    def take(self, elements: int, dtype: torch.dtype) -> RowBuffer:
        """A buffer of ``elements`` per row. If none was given back, those of other sizes are freed: blocks may differ in width."""
        assert self.tier is not None
        if spare := self._spare.get((elements, dtype)):
            return spare.pop()
        self._free_spare()
        return self.tier.buffer(self.rows, elements, dtype)

    def give(self, buffer: RowBuffer, elements: int, dtype: torch.dtype) -> None:
        """Give back a buffer."""
        if self.tier is not None and self.tier.kind == "host":
            self._spare.setdefault((elements, dtype), []).append(buffer)
        else:
            buffer.close()

    def close(self) -> None:
        """Free all buffers that were given back, and keep no rows from now on."""
        self._free_spare()
        self.rows, self.tier = 0, None

    def _free_spare(self) -> None:
        for buffers in self._spare.values():
            for buffer in buffers:
                buffer.close()
        self._spare.clear()


class ShortcutCache:
    """The outputs of modules with a shortcut, by row; the inputs of their Linears until these are solved, and at the deepest level.

    A pass that restarts with a smaller batch puts all rows again. Cached rows are used only in passes with the batch that they were
    computed with: a block that is replayed from its shard has no cache and must give the same bytes.
    last: see ``LastInputs``; without it, shortcuts at the deepest level keep nothing.
    """

    def __init__(self, last: LastInputs | None = None) -> None:
        self._last = last or LastInputs()
        self._kept: dict[Shortcut, _CachedRows] = {}
        self._banks: dict[str, RoutedRows] = {}
        self._finished: list[Shortcut] = []

    def put(self, shortcut: Shortcut, store: ActivationStore, x: Tensor) -> None:
        """Cache the input x of the shortcut's Linear for the store's current batch of rows."""
        lo, hi = store.at
        if shortcut.last and hi > self._last.rows:
            return
        if shortcut not in self._kept:
            elements = x.numel() // (hi - lo)
            buffer = self._last.take(elements, x.dtype) if shortcut.last else store.buffer(elements, x.dtype)
            self._kept[shortcut] = _CachedRows(buffer, elements, x.dtype, self._last.rows if shortcut.last else store.shape[0])
        self._kept[shortcut].put(lo, hi, x)
        self._kept[shortcut].batch = store.batch

    def use_bank(self, name: str, rows: RoutedRows) -> None:
        """From now on a bank of experts returns the sum of its experts' outputs. ``close`` frees it."""
        self._banks[name] = rows

    def use_inputs(self, shortcut: Shortcut) -> None:
        """From now on the module's output is computed from the kept inputs of its Linear, which is solved."""
        if shortcut in self._kept:
            self._finished.append(shortcut)

    def compute_outputs(self, shortcut: Shortcut, linear: nn.Module, store: ActivationStore, block: int, step: int) -> None:
        """Replace the cached inputs of a solved Linear by its outputs, in an update pass of the store (block, step: see ``Halving``)."""
        inputs = self._kept[shortcut]
        outputs: _CachedRows | None = None

        def run(lo: int, hi: int) -> None:
            nonlocal outputs
            y = linear(inputs.get(lo, hi))
            if outputs is None:
                elements = y.numel() // (hi - lo)
                same = elements == inputs.elements
                outputs = inputs if same else _CachedRows(store.buffer(elements, y.dtype), elements, y.dtype, inputs.rows)
            outputs.put(lo, hi, y)

        store.update_pass(block, step, run)
        assert outputs is not None
        outputs.batch = inputs.batch if store.batch == inputs.batch else None
        if outputs is not inputs:
            inputs.buffer.close()
        self._kept[shortcut] = outputs
        self._finished.append(shortcut)

    @contextlib.contextmanager
    def apply(self, block: nn.Module, store: ActivationStore) -> Iterator[None]:
        """Let modules return their outputs for the store's current rows from the cache instead of running, while the context is open.

        Rows that were computed with another batch size are not used. Banks of experts that have no outputs yet return 0.
        """
        lo, hi = store.at
        usable = [s for s in self._finished if (kept := self._kept[s]).batch == store.batch and hi <= kept.rows]
        idle = [block.get_submodule(name) for s in usable for name in s.idle]

        def make(i: int) -> Callable[..., Any]:
            if i >= len(usable):
                return functools.partial(_empty_output, idle[i - len(usable)])
            shortcut = usable[i]
            kept = self._kept[shortcut]
            linear = block.get_submodule(shortcut.linear)

            def forward(*args: Any, **kwargs: Any) -> Any:
                x = kept.get(lo, hi)
                if hi < (end := min(hi + store.batch, store.shape[0])) <= kept.rows:
                    kept.buffer.prefetch(hi, end)
                return shortcut.returns(type(linear).forward(linear, x) if shortcut.last else x, args, kwargs)

            return forward

        def bank_output(name: str, call: BankCall) -> Tensor:
            return self._banks[name].output(lo, hi) if name in self._banks else call.zeros

        with banks_replaced(block, bank_output), replace_forwards([*(block.get_submodule(s.module) for s in usable), *idle], make):
            yield

    def require_banks(self, names: Iterable[str]) -> None:
        """The outputs of these banks must be complete. A pass without them would go on with zeros."""
        missing = set(names) - set(self._banks)
        assert not missing, f"banks without outputs: {missing}"

    @property
    def holds_inputs(self) -> bool:
        """Whether inputs of Linears at the deepest level are kept."""
        return any(shortcut.last for shortcut in self._kept)

    def drop_inputs(self) -> None:
        """Free the kept inputs of Linears at the deepest level; their modules run again."""
        for shortcut in [s for s in self._kept if s.last]:
            self._kept.pop(shortcut).buffer.close()
        self._finished = [s for s in self._finished if not s.last]

    def close(self) -> None:
        """Free all buffers."""
        for shortcut, kept in self._kept.items():
            if shortcut.last:
                self._last.give(kept.buffer, kept.elements, kept.dtype)
            else:
                kept.buffer.close()
        for rows in self._banks.values():
            rows.close()
        self._kept.clear()
        self._banks.clear()
        self._finished.clear()


def _empty_output(module: nn.Module, x: Tensor) -> Tensor:
    """What an idle module returns: nothing reads its values, so they are not set."""
    return x.new_empty(*x.shape[:-1], linear_weight(module).shape[0] if is_linear(module) else x.shape[-1])


@dataclass(slots=True)
class _CachedRows:
    """A module's tensor for the first ``rows`` rows, in a buffer of ``elements`` per row.

    shape: of one row's part of the tensor; its first dimension may fold batch and tokens. batch: the batch size that it was computed
    with; None where it changed on the way.
    """

    buffer: RowBuffer
    elements: int
    dtype: torch.dtype
    rows: int
    shape: tuple[int, ...] = ()
    batch: int | None = None

    def put(self, lo: int, hi: int, x: Tensor) -> None:
        self.shape = (x.shape[0] // (hi - lo), *x.shape[1:])
        self.buffer.put(lo, x.reshape(hi - lo, -1))

    def get(self, lo: int, hi: int) -> Tensor:
        return self.buffer.get(lo, hi).view((hi - lo) * self.shape[0], *self.shape[1:])
