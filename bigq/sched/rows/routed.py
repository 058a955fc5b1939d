"""The calibration tokens at a bank of experts: its inputs, which experts they choose, and the sum of the experts' outputs.

Inputs and sums are in the tier of the hidden states, one row a token. The choices are small and stay on the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bigq.errors import UnsupportedModelError
from bigq.model.capture import StopForward
from bigq.model.experts.bank import Bank, BankCall, routed
from bigq.model.pager import replace_forward
from bigq.sched.rows.store import ActivationStore
from bigq.sched.rows.tiers import RowBuffer


@dataclass(slots=True)
class RoutedRows:
    """The tokens of all calibration rows at one bank.

    call: of the bank for one token; its kinds of arguments. experts, weights: of each token, [tokens, k]. per_row: tokens of a row.
    total: the sum of the outputs so far, in the dtype of the bank's sum; None before it is begun.
    """

    call: BankCall
    inputs: RowBuffer
    experts: Tensor
    weights: Tensor
    per_row: int
    total: RowBuffer | None = None

    def begin_total(self, store: ActivationStore, bank: Bank) -> None:
        """Set the sum of the outputs to 0."""
        width = self.call.tokens.shape[-1]
        self.total = store.token_buffer(len(self.experts), width, bank.total)
        for lo, hi in self.spans(store.batch):
            self.total.put(lo, torch.zeros(hi - lo, width, dtype=bank.total, device=store.device))

    def spans(self, batch: int) -> list[tuple[int, int]]:
        """The tokens of each batch of rows."""
        step = batch * self.per_row
        return [(lo, min(lo + step, len(self.experts))) for lo in range(0, len(self.experts), step)]

    def routes(self, bank: Bank, batch: int | None) -> Iterator[tuple[int, list[tuple[Tensor, Tensor]]]]:
        """For every expert in order: its tokens and their positions among each token's experts, apart for each batch of rows.

        batch: None takes all rows at once.
        """
        spans = [(0, len(self.experts))] if batch is None else self.spans(batch)
        parts = [routed(self.experts[lo:hi], bank.experts, by_slot=bank.by_slot) for lo, hi in spans]
        for each in zip(*parts, strict=True):
            yield each[0][0], [(tokens + lo, slots) for (_, tokens, slots), (lo, _) in zip(each, spans, strict=True)]

    def output(self, lo: int, hi: int) -> Tensor:
        """The bank's output for rows [lo, hi)."""
        assert self.total is not None
        return self.total.get(lo * self.per_row, hi * self.per_row).to(self.call.tokens.dtype)

    def drop_inputs(self) -> None:
        """Free what only the experts needed."""
        self.inputs.close()

    def close(self) -> None:
        """Free the sum of the outputs."""
        if self.total is not None:
            self.total.close()


def record_routed(
    name: str, block: nn.Module, store: ActivationStore, index: int, step: int, running: Callable[[], Any], prefix: str
) -> RoutedRows:
    """Replay the rows through a block up to the bank ``name``, in a read pass of the store (block ``index``, step: see ``Halving``).

    running: the context in which the block runs. prefix: the block's name, for messages. Raises UnsupportedModelError.
    """
    module = block.get_submodule(name)

    def run() -> RoutedRows:
        made: RoutedRows | None = None
        for hidden, call in store.batches(index):
            seen: list[BankCall] = []

            def forward(*args: Any, seen: list[BankCall] = seen, **kwargs: Any) -> Any:
                found = BankCall.of(args, kwargs)
                assert found is not None, "the probe has seen how the bank is called"
                seen.append(found)
                raise StopForward

            with running(), replace_forward(module, forward), contextlib.suppress(StopForward):
                call.run(block, hidden)
            lo, hi = store.at
            tokens = (hi - lo) * store.shape[1]
            if not seen or len(seen[0].tokens) != tokens:
                found = len(seen[0].tokens) if seen else 0
                raise UnsupportedModelError(
                    f"{prefix}.{name}: receives {found} of {tokens} tokens; banks that do not receive every token once are not supported"
                )
            if made is None:
                made = _empty(store, seen[0])
            at = slice(lo * store.shape[1], hi * store.shape[1])
            made.inputs.put(at.start, seen[0].tokens)
            made.experts[at], made.weights[at] = seen[0].experts, seen[0].weights
        assert made is not None
        return made

    return store.read_pass(index, step, run)


def _empty(store: ActivationStore, call: BankCall) -> RoutedRows:
    count = store.shape[0] * store.shape[1]
    one = BankCall(call.tokens[:1].clone(), call.experts[:1].clone(), call.weights[:1].clone(), call.places)
    return RoutedRows(
        call=one,
        inputs=store.token_buffer(count, call.tokens.shape[-1], call.tokens.dtype),
        experts=call.experts.new_empty(count, call.experts.shape[1]),
        weights=call.weights.new_empty(count, call.weights.shape[1]),
        per_row=store.shape[1],
    )
