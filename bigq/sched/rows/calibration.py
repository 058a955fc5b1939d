"""The calibration rows of a job, from the embedding through the blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from bigq import faults
from bigq.job.batches import Batches
from bigq.machine.ranks import Ranks
from bigq.model.pager import Pager
from bigq.sched.rows.checkpoint import Checkpoints
from bigq.sched.rows.probe import Probe, embed, store_for
from bigq.sched.rows.store import ActivationStore
from bigq.sched.rows.tiers import Tier


@dataclass(slots=True, kw_only=True)
class CalibrationRows:
    """Token ids [N, T] and their hidden states. Of several ranks each has its own.

    quantized: hidden states of the quantized model. unquantized: of the unquantized model, for methods that correct the upstream error.
    at: the block whose inputs the stores hold (the number of blocks after the last one); None while they are being overwritten.
    """

    tokens: Tensor
    probe: Probe
    quantized: ActivationStore
    unquantized: ActivationStore | None
    checkpoints: Checkpoints
    ranks: Ranks
    at: int | None = None

    @classmethod
    @contextlib.contextmanager
    def opened(
        cls,
        tokens: Tensor,
        pager: Pager,
        probe: Probe,
        batches: Batches,
        tier: Tier,
        checkpoints: Checkpoints,
        ranks: Ranks,
        *,
        both_models: bool,
    ) -> Iterator[CalibrationRows]:
        """Open stores for the rows; ``enter`` fills them. both_models: also a store for the unquantized model."""
        with contextlib.ExitStack() as stack:
            quantized = stack.enter_context(contextlib.closing(store_for(pager, tokens, batches, probe, tier)))
            unquantized = stack.enter_context(contextlib.closing(quantized.empty_like())) if both_models else None
            yield cls(tokens=tokens, probe=probe, quantized=quantized, unquantized=unquantized, checkpoints=checkpoints, ranks=ranks)

    @property
    def stores(self) -> tuple[ActivationStore, ...]:
        return (self.quantized,) if self.unquantized is None else (self.quantized, self.unquantized)

    def enter(self, pager: Pager, wanted: int) -> int:
        """Fill the stores from the newest checkpoint at or before block ``wanted``, else with the embedding. Returns their block."""
        at = self._restored(wanted)
        if at is None:
            embed(pager, self.tokens, self.probe, self.quantized)
            if self.unquantized is not None:
                self.unquantized.copy_from(self.quantized)
            at = 0
        self.at = at
        faults.point("rows.embedded")
        return at

    def _restored(self, wanted: int) -> int | None:
        """The block of the newest checkpoint that all ranks have, from which the stores are filled; None without one."""
        offered = [set(blocks) for blocks in self.ranks.everyone(self.checkpoints.blocks) if isinstance(blocks, list)]
        found = self.ranks.everyone(self.checkpoints.restore(wanted, *self.stores, among=set.intersection(*offered)))
        return found[self.ranks.index] if len(set(found)) == 1 else None  # type: ignore[return-value]  # what restore returns

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
