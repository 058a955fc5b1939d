"""A block as it was before anything in it was quantized, and the rows as the reference model has them: what asymmetric calibration
looks at beside the block as it is and the rows as they are.

Both go through the same module, one after the other: only the weights of solved Linears are there twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from bigq.sched.rows.shortcut_cache import ShortcutCache
from bigq.sched.rows.store import ActivationStore

#: The step (see ``batches.Halving``) of the pass that takes the reference rows through a block: behind all that solves it.
REFERENCE_STEP = 2**20


@dataclass(frozen=True, slots=True)
class ReferenceBlock:
    """The unquantized weights and rows of one block.

    store: the rows in the unquantized model, at the block's entrance. cache: module outputs kept on their way through it.
    kept: unquantized weights of Linears that are solved, by the Linear's name in the block.
    """

    store: ActivationStore
    cache: ShortcutCache
    kept: dict[str, nn.Parameter] = field(default_factory=dict)

    def keep_weight(self, name: str, linear: nn.Module) -> None:
        """The Linear's weight is about to be overwritten: give it another parameter for that."""
        weight = linear._parameters["weight"]
        assert isinstance(weight, nn.Parameter)
        self.kept[name] = weight
        linear._parameters["weight"] = nn.Parameter(torch.empty_like(weight), requires_grad=False)

    @contextlib.contextmanager
    def unquantized_weights(self, block: nn.Module) -> Iterator[None]:
        """Let the block have all its unquantized weights."""
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
        """The reference rows' store, at the batch that another one is at."""
        self.store.align_with(store)
        return self.store
