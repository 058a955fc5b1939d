"""Folding input scales into a block before it is solved: one pass over the rows of the unquantized block, then a choice for each fold."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from bigq.machine.memory import return_freed_memory
from bigq.machine.ranks import OneProcess, Ranks
from bigq.methods.base import Scaling
from bigq.model.blocks import block_linears
from bigq.model.experts.bank import reading_products
from bigq.model.experts.call import BankCall
from bigq.model.experts.cut import banks_replaced
from bigq.model.folding.apply import factors_of, fold_, matrices, norm_weight, touched
from bigq.model.folding.fold import Fold
from bigq.model.skeleton import linear_weight
from bigq.progress.clock import Clock
from bigq.sched.rows.store import ActivationStore
from bigq.sched.solve.bank import BankJob
from bigq.sched.solve.shared import agreed
from bigq.scheme import QuantScheme
from bigq.solver.scaling import SAMPLED_EXPERTS, InputStatistics, Reader, powers_of_two

#: The step of the pass (see ``Halving``): before all that solve the block.
FOLD_STEP = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldWork:
    """The folds of one loaded block, and what becomes of them.

    schemes: of the Linears that are quantized, by name in the block. banks: by name in the block. ranks: the processes that share the rows.
    changed: names of the parameters in the block that are no longer the checkpoint's. factors: of the inputs of banks, by bank.
    """

    folds: Sequence[Fold]
    scaling: Scaling
    index: int
    block: nn.Module
    schemes: Mapping[str, QuantScheme]
    banks: Mapping[str, BankJob]
    clock: Clock
    ranks: Ranks = field(default_factory=OneProcess)
    changed: set[str] = field(default_factory=set)
    factors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def used(self) -> list[Fold]:
        """The folds with a reader that is quantized. By what a bank is multiplied must be known from a norm, for a job that goes on."""
        banks = {name for name, bank in self.banks.items() if bank.schemes}
        return [
            fold
            for fold in self.folds
            if not banks.union(self.schemes).isdisjoint(fold.readers)
            and (fold.rows is None or not any(name in self.banks for name in fold.readers))
            and all(name not in self.banks or name in banks for name in fold.readers)
            and self.scaling.takes("norm" if fold.rows is None else "linear")
        ]

    def kept(self, packed: Collection[str]) -> list[str]:
        """The names of parameters in the block that may change and that its shard holds as they are. packed: Linears that it holds
        packed."""
        packed = {f"{name}.weight" for name in packed}
        return list(dict.fromkeys(name for fold in self.used for name in touched(self.block, fold) if name not in packed))

    def restore(self, values: Mapping[str, Tensor]) -> None:
        """Set the parameters that a shard has, by their names in the block, and find the factors of banks from the norms among them."""
        for fold in self.used:
            banks = [name for name in fold.readers if name in self.banks and name not in self.factors]
            if banks:
                leaf = f"{fold.producer}.{norm_weight(self.block.get_submodule(fold.producer))}"
                before = self.block.get_parameter(leaf)
                self.factors.update(dict.fromkeys(banks, factors_of(before, values[leaf].to(before), fold.offset)))
        for name, value in values.items():
            self.block.get_parameter(name).copy_(value)

    def run(self, store: ActivationStore) -> None:
        """Choose the scales of all folds, and fold them."""
        used = self.used
        if not used:
            return
        with self.clock.phase("replay"):
            tokens = self.ranks.number(store.shape[0] * store.shape[1])
            statistics = store.read_pass(self.index, FOLD_STEP, lambda: _collect(used, self.block, self.index, store, tokens))
            for fold in used:
                statistics[fold.producer].reduce(self.ranks)
        return_freed_memory()
        linears = block_linears(self.block)
        with self.clock.phase("scale"):
            for fold in used:
                readers = [Reader(linear_weight(linears[name]), self.schemes[name]) for name in fold.readers if name in self.schemes]
                banks = [name for name in fold.readers if name in self.banks]
                for bank in (self.banks[name] for name in banks):
                    readers += _bank_readers(bank)
                channels = fold.channels.to(store.device)  # folds are found on the host
                scales = agreed(self.scaling.choose(statistics.pop(fold.producer), readers, channels), self.ranks)
                if self._has_exact_part(fold):
                    scales = powers_of_two(scales)
                self.factors.update(dict.fromkeys(banks, fold_(self.block, fold, scales)))
                self.changed.update(touched(self.block, fold))
                return_freed_memory()

    def _has_exact_part(self, fold: Fold) -> bool:
        """Whether a matrix that changes stays unquantized, such as a router's: powers of two leave its products as they are."""
        names = [name.removesuffix(".weight") for name, _ in matrices(self.block, fold)]
        return any(name not in self.schemes for name in (*names, *([] if fold.rows is None else [fold.producer])))


def _bank_readers(bank: BankJob) -> list[Reader]:
    """The matrices of some experts that read a bank's input."""
    step = -(-bank.bank.experts // SAMPLED_EXPERTS)
    found = []
    for e in range(0, bank.bank.experts, step):
        held = bank.load_original(e)
        for product in reading_products(bank.bank):
            value = held[product.parameter]
            found.append(Reader(value.T if product.transposed else value, bank.schemes[product.parameter]))
    return found


def _collect(folds: Sequence[Fold], block: nn.Module, index: int, store: ActivationStore, tokens: int) -> dict[str, InputStatistics]:
    """The statistics of the input of each fold, by its producer. tokens: of all ranks."""
    found = {fold.producer: InputStatistics(len(fold.channels), store.device, tokens) for fold in folds}
    for hidden, call in store.batches(index):
        with _watched(folds, block, found):
            call.run(block, hidden)
    return found


@contextlib.contextmanager
def _watched(folds: Sequence[Fold], block: nn.Module, found: Mapping[str, InputStatistics]) -> Iterator[None]:
    """Let the first reader of each fold add what it receives. Banks return 0, so they need no weights."""
    banks: dict[str, str] = {}
    handles = []

    def watch(module: nn.Module, producer: str) -> None:
        def before(_: nn.Module, args: tuple[Any, ...]) -> None:
            found[producer].add(args[0])

        handles.append(module.register_forward_pre_hook(before))

    with_call = {name for name, module in block.named_modules() if _is_called_with_tensor(module)}
    for fold in folds:
        first = next((name for name in fold.readers if name in with_call), None)
        if first is None:
            banks[fold.readers[0]] = fold.producer
        else:
            watch(block.get_submodule(first), fold.producer)

    def bank(name: str, call: BankCall) -> Tensor:
        if name in banks:
            found[banks[name]].add(call.tokens)
        return call.zeros

    with banks_replaced(block, bank):
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _is_called_with_tensor(module: nn.Module) -> bool:
    """Whether a module has a matrix of its own, and is no bank: such a one is called with its input."""
    own = list(module.parameters(recurse=False))
    return any(param.ndim == 2 for param in own) and all(param.ndim < 3 for param in own)
