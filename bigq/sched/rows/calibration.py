"""The calibration rows of a job, from the embedding through the blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from bigq import faults
from bigq.job.batches import Batches
from bigq.model.pager import Pager
from bigq.sched.rows.checkpoint import Checkpoints
from bigq.sched.rows.probe import Probe, embed, store_for
from bigq.sched.rows.store import ActivationStore
from bigq.sched.rows.tiers import Tier


@dataclass(slots=True, kw_only=True)
class CalibrationRows:
    """Token ids [N, T] and their hidden states.

    quantized: hidden states of the quantized model. unquantized: of the unquantized model, for methods that correct the upstream error.
    at: the block whose inputs the stores hold (the number of blocks after the last one); None while they are being overwritten.
    """

    tokens: Tensor
    probe: Probe
    quantized: ActivationStore
    unquantized: ActivationStore | None
    checkpoints: Checkpoints
    at: int | None = None

    @classmethod
    @contextlib.contextmanager
    def opened(
        cls, tokens: Tensor, pager: Pager, probe: Probe, batches: Batches, tier: Tier, checkpoints: Checkpoints, *, both_models: bool
    ) -> Iterator[CalibrationRows]:
        """Open stores for the rows; ``enter`` fills them. both_models: also a store for the unquantized model."""
        with contextlib.ExitStack() as stack:
            quantized = stack.enter_context(contextlib.closing(store_for(pager, tokens, batches, probe, tier)))
            unquantized = stack.enter_context(contextlib.closing(quantized.empty_like())) if both_models else None
            yield cls(tokens=tokens, probe=probe, quantized=quantized, unquantized=unquantized, checkpoints=checkpoints)

    @property
    def stores(self) -> tuple[ActivationStore, ...]:
        return (self.quantized,) if self.unquantized is None else (self.quantized, self.unquantized)

    def enter(self, pager: Pager, wanted: int) -> int:
        """Fill the stores from the newest checkpoint at or before block ``wanted``, else with the embedding. Returns their block."""
        at = self.checkpoints.restore(wanted, *self.stores)
        if at is None:
            embed(pager, self.tokens, self.probe, self.quantized)
            if self.unquantized is not None:
                self.unquantized.copy_from(self.quantized)
            at = 0
        self.at = at
        faults.point("rows.embedded")
        return at

    def watch(self, pause: Callable[[], None], passing: Callable[[str, int, int], None]) -> None:
        """Call ``pause`` before each batch, and ``passing`` with the progress of a pass."""
        for store in self.stores:
            store.before_batch, store.on_progress = pause, passing

    def save(self, event: Callable[..., None], blocks: int) -> None:
        """Save the hidden states on disk, if there is room. Does nothing while they are being overwritten."""
        if self.at is None:
            return
        self.checkpoints.save(self.at, *self.stores)
        if self.checkpoints.keeps(self.at):
            event("checkpoint", block=self.at + 1, blocks=blocks)

    def expected_saving_seconds(self) -> float:
        """How long ``save`` is expected to take."""
        return self.checkpoints.expected_seconds(*self.stores)
