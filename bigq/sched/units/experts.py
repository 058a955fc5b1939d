"""The experts of a block in groups: each group becomes one shard, committed as soon as it is solved.

A block with experts may hold tens of GB. Its experts are read, solved and written one after the other, so a group's shard bounds what
waits to be written and what a killed job does again.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from bigq.config import JobConfig
from bigq.io.writer import OutputTensor
from bigq.job.finish import FinishedBlock
from bigq.methods.base import Scaling
from bigq.model.experts.bank import Bank, reading_products
from bigq.model.experts.pages import StoredBank
from bigq.model.pager import Pager
from bigq.progress.records import LinearRecord
from bigq.sched.shards import Product, Shard
from bigq.sched.solve.bank import BankJob
from bigq.sched.solve.expert_scales import has_too_few
from bigq.sched.solve.results import SolvedExpert
from bigq.sched.units.base import Bench
from bigq.sched.units.schemes import bank_schemes
from bigq.scheme import QuantScheme

#: Weights in a group of experts: about 1 GB at 4 bits. A larger expert is a group by itself.
GROUP_WEIGHTS = 2 * 10**9


@dataclass(frozen=True, slots=True)
class ExpertGroup:
    """Experts [first, stop) of a bank, and the shard that they become."""

    bank: StoredBank
    first: int
    stop: int
    shard: Shard


def expert_groups(pager: Pager, index: int, number: int, config: JobConfig) -> list[ExpertGroup]:
    """The groups of experts in block ``index``. number: of the first one's shard.

    A bank that is copied is one group if a tensor of it holds all experts.
    """
    groups: list[ExpertGroup] = []
    prefix = f"{pager.blocks_path}.{index}."
    for bank in (bank for path, bank in pager.banks.items() if path.startswith(prefix)):
        weights = sum(pager.model.get_parameter(f"{bank.path}.{key}")[0].numel() for key in bank.sources)
        copied = bank.is_whole and not bank_schemes(bank, config)
        step = bank.experts if copied else max(1, GROUP_WEIGHTS // weights)
        for first in range(0, bank.experts, step):
            stop = min(first + step, bank.experts)
            shard = Shard(
                number=number + len(groups),
                name=f"experts-{index}-{len(groups)}",
                sources=bank.stored(range(first, stop)),
            )
            groups.append(ExpertGroup(bank, first, stop, shard))
    return groups


@dataclass(slots=True)
class BankWork:
    """The work on one block's groups of experts: what is committed already, and what waits for the rest of its group.

    factors: of what banks receive, by their names in the block. unscaled: experts that had too few tokens for scales inside.
    """

    bench: Bench
    index: int
    groups: Sequence[ExpertGroup]
    batch: int | None
    scaling: Scaling | None = None
    factors: Mapping[str, Tensor] = field(default_factory=dict)
    unscaled: int = 0
    _banks: dict[str, Bank] = field(default_factory=dict)
    _packed: dict[str, Mapping[str, Tensor]] = field(default_factory=dict)
    _records: list[LinearRecord] = field(default_factory=list)

    def _is_finished(self, bank: str, expert: int) -> bool:
        """Whether an expert's group is committed."""
        return self.bench.writer.committed(self._group(bank, expert).shard) is not None

    def _ends_group(self, bank: str, expert: int) -> bool:
        return expert + 1 == self._group(bank, expert).stop

    def _group(self, bank: str, expert: int) -> ExpertGroup:
        return next(g for g in self.groups if g.bank.path == bank and g.first <= expert < g.stop)

    def jobs(self, prefix: str, block: nn.Module, banks: Mapping[str, Bank]) -> dict[str, BankJob]:
        """The work of each bank by its name in the block. banks: how they compute."""
        bench = self.bench
        made = {}
        for name, bank in banks.items():
            stored = bench.pager.banks[f"{prefix}.{name}"]
            schemes = bank_schemes(stored, bench.config)
            self._banks[stored.path] = bank
            made[name] = BankJob(
                prefix=stored.path,
                module=block.get_submodule(name),
                bank=bank,
                schemes=schemes,
                names=stored.matrices,
                load=functools.partial(self._load, stored, schemes),
                clock=bench.control.clock,
                original=functools.partial(self._load_original, stored),
                finished=functools.partial(self._is_finished, stored.path),
                finite_only=bench.config.on_nonfinite == "skip",
                at_once=bench.choice.experts_at_once or 1,
                ends=functools.partial(self._ends_group, stored.path),
                ranks=bench.writer.ranks,
                fold=bench.expert_fold(self.index, name),
            )
        return made

    def _load(self, bank: StoredBank, schemes: Mapping[str, QuantScheme], e: int) -> Mapping[str, Tensor]:
        """An expert's parameters: as committed, or else those of the checkpoint. A spare one has none."""
        if e >= bank.experts:
            return {}
        group = self._group(bank.path, e)
        commit = self.bench.writer.committed(group.shard)
        pager = self.bench.pager
        if not schemes or commit is None:
            return self._load_original(bank, e)
        finished = FinishedBlock(self.bench.writer.journal, commit, self.bench.config.made)
        matrices = {
            key: [
                finished.weight(bank.prefix(n), scheme, pager.dtype_of(f"{bank.path}.{key}"), pager.device) for n in bank.matrices(key, e)
            ]
            for key, scheme in schemes.items()
        }
        return pager.load_expert(bank.path, e, matrices)

    def _load_original(self, bank: StoredBank, e: int) -> Mapping[str, Tensor]:
        """An expert's parameters in the checkpoint. A spare one has none."""
        if e >= bank.experts:
            return {}
        self.bench.pager.announce_experts(bank.path, range(e, min(e + 2, bank.experts)))
        held = self.bench.pager.load_expert(bank.path, e)
        factors = self.factors.get(self._banks[bank.path].name)
        return held if factors is None else _scaled(self._banks[bank.path], held, factors)

    def take(self, solved: SolvedExpert) -> list[LinearRecord]:
        """Pack an expert, and hand over its group if it is the last one of it. Returns its records. Only who writes the group packs it."""
        bench, group = self.bench, self._group(solved.bank, solved.number)
        records = [matrix.record(solved.tokens) for matrix in solved.matrices]
        self.unscaled += has_too_few(bench.expert_fold(self.index, self._banks[solved.bank].name), self.scaling, solved.tokens)
        bank = group.bank
        dtypes = {name: bank.dtype(key) for key in bank.sources for name in bank.matrices(key, solved.number)}
        for matrix in solved.matrices if bench.writer.ranks.writes(group.shard.number) else ():
            with bench.control.clock.phase("pack"):
                self._packed[matrix.name] = bench.config.made.pack(bank.prefix(matrix.name), matrix.weight, dtypes[matrix.name])
        self._records += records
        if solved.number + 1 == group.stop:
            self._hand_over(group)
        return records

    def copy_unquantized(self) -> None:
        """Hand over the groups whose experts stay unquantized."""
        for group in self.groups:
            if not bank_schemes(group.bank, self.bench.config) and self.bench.writer.committed(group.shard) is None:
                self._hand_over(group)

    def _hand_over(self, group: ExpertGroup) -> None:
        writer = self.bench.writer
        tensors = self._tensors(group) if writer.ranks.writes(group.shard.number) else []
        product = Product(tensors=tensors, records=self._records, batch=self.batch)
        self._packed, self._records = {}, []
        writer.hand_over(group.shard, product, self.index)

    def _tensors(self, group: ExpertGroup) -> list[OutputTensor]:
        writer, bank, experts = self.bench.writer, group.bank, range(group.first, group.stop)
        if not self._packed:
            return [writer.stored(name) for name in bank.stored(experts)]
        names = [name for e in experts for key in bank.sources for name in bank.matrices(key, e)]
        return [tensor for name in names for tensor in writer.packed(self._packed[name])]


def _scaled(bank: Bank, held: Mapping[str, Tensor], factors: Tensor) -> Mapping[str, Tensor]:
    """An expert's parameters where its inputs are to be multiplied by factors [n]."""
    scaled = {}
    for product in reading_products(bank):
        value = held[product.parameter]
        scaled[product.parameter] = (value.float() * (factors[:, None] if product.transposed else factors)).to(value.dtype)
    return {**held, **scaled}


def uncommitted(groups: Sequence[ExpertGroup], bench: Bench) -> Iterator[ExpertGroup]:
    """The groups that are not committed yet."""
    return (group for group in groups if bench.writer.committed(group.shard) is None)
