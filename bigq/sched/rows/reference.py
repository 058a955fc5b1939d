"""The reference of asymmetric calibration (gptaq): a block with its unquantized weights, and the rows in the unquantized model.

The quantized and the reference rows go through the same module in turn. Only the weights of solved Linears are in
memory twice. Experts are not kept: each is there for a moment in both forms (``solve.bank``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from bigq.sched.rows.shortcut_cache import ShortcutCache
from bigq.sched.rows.store import ActivationStore

#: The step (see ``batches.Halving``) of the pass that replays the reference rows through a block: after all steps that solve it.
REFERENCE_STEP = 2**20


@dataclass(frozen=True, slots=True)
class ReferenceBlock:
    """One block of the unquantized model.

    store: the block's inputs in the unquantized model. cache: the shortcut outputs for these rows.
    kept: unquantized weights of the solved Linears, by name in the block.
    """

    store: ActivationStore
    cache: ShortcutCache
    kept: dict[str, nn.Parameter] = field(default_factory=dict)

    def keep_weight(self, name: str, linear: nn.Module) -> None:
        """Keep a Linear's weight before it is quantized, and give the Linear a new parameter for the quantized one."""
        weight = linear._parameters["weight"]
        assert isinstance(weight, nn.Parameter)
        self.kept[name] = weight
        linear._parameters["weight"] = nn.Parameter(torch.empty_like(weight), requires_grad=False)

    @contextlib.contextmanager
    def unquantized_weights(self, block: nn.Module) -> Iterator[None]:
        """Give the block its unquantized weights while the context is open."""
        linears = {name: block.get_submodule(name) for name in self.kept}
        now = {name: linear._parameters["weight"] for name, linear in linears.items()}
        try:
            for name, linear in linears.items():
                linear._parameters["weight"] = self.kept[name]
            yield
        finally:
            for name, linear in linears.items():
                linear._parameters["weight"] = now[name]

    def align(self, store: ActivationStore) -> ActivationStore:
        """The reference store, moved to the batch of rows that ``store`` is at."""
        self.store.align_with(store)
        return self.store
