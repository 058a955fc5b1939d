"""The experts of a streamed block: each is loaded once, for the tokens of all rows, and computes them batch by batch as the model would."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from bigq.model.experts.bank import Bank, bank_modules
from bigq.model.experts.cut import called_banks
from bigq.model.experts.proof import prove_bank
from bigq.model.forward.quantized_inputs import ROUNDINGS
from bigq.model.pager import Pager
from bigq.progress.clock import Clock
from bigq.sched.rows.probe import Probe
from bigq.sched.rows.routed import record_routed
from bigq.sched.rows.shortcut_cache import ShortcutCache
from bigq.sched.rows.store import ActivationStore
from bigq.sched.solve.bank import BankJob, run_bank_rows


@dataclass(slots=True)
class BankRunner:
    """Runs the banks of a model's blocks. The results have the bits of the model's own forward with the same batches."""

    pager: Pager
    probe: Probe
    clock: Clock
    _proven: dict[Any, Bank] = field(default_factory=dict)

    @contextlib.contextmanager
    def outputs(self, i: int, block: nn.Module, store: ActivationStore) -> Iterator[ShortcutCache]:
        """The outputs of all banks of loaded block i, for a pass through the whole block."""
        prefix = f"{self.pager.blocks_path}.{i}"
        with contextlib.closing(ShortcutCache()) as cache:
            calls = called_banks(block, lambda: self.probe.calls[i].run(block, self.probe.hidden)) if bank_modules(block) else {}
            for step, (name, call) in enumerate(calls.items(), 1):
                path, module = f"{prefix}.{name}", block.get_submodule(name)
                key = (type(module), name, tuple(p.shape for p in module.parameters(recurse=False)))
                if key not in self._proven:
                    self._proven[key] = prove_bank(path, module, call, functools.partial(self.pager.load_expert, path))
                bank = self._proven[key]
                rows = record_routed(name, block, store, i, step, functools.partial(cache.apply, block, store), prefix)
                rows.begin_total(store, bank)
                cache.use_bank(name, rows)
                run_bank_rows(self._job(path, module, bank), rows, store.batch)
                rows.drop_inputs()
            yield cache

    def _job(self, path: str, module: nn.Module, bank: Bank) -> BankJob:
        pager, rounding = self.pager, None
        if pager.schemes is not None and any(pager.banks[path].packed()):
            rounding = ROUNDINGS.get(pager.schemes.format.quantized_inputs)
        # No format stores a number for the inputs of experts (``stores_inputs``).
        rounded = None if rounding is None else lambda x: rounding(x, None)

        def load(e: int) -> dict[str, Any]:
            pager.announce_experts(path, range(e, min(e + 2, bank.experts)))
            return pager.load_expert(path, e, dtype=None if rounded is None else torch.float32)

        job = BankJob(prefix=path, module=module, bank=bank, schemes={}, names=lambda key, e: (), load=load, clock=self.clock)
        return dataclasses.replace(job, rounded=rounded)
