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
from bigq.model.description import replace_forward
from bigq.model.experts.bank import Bank, routed
from bigq.model.experts.call import BankCall, Routing, bank_call
from bigq.model.forward.capture import StopForward
from bigq.sched.rows.store import ActivationStore
from bigq.sched.rows.tiers import RowBuffer


@dataclass(slots=True)
class RoutedRows:
    """The tokens of all calibration rows at one bank.

    call: of the bank for one token; its kinds of arguments. inputs, experts, weights: see ``Routing``. per_row: inputs of a row.
    per_token: those of a token, which are more than one where experts of a token have different inputs. total: the sum of the outputs for
    each input so far, in the dtype of the bank's sum; None before it is begun.
    """

    call: BankCall
    inputs: RowBuffer
    experts: Tensor
    weights: Tensor
    per_row: int
    per_token: int = 1
    total: RowBuffer | None = None

    def begin_total(self, store: ActivationStore, bank: Bank) -> None:
        """Set the sum of the outputs to 0."""
        width = self.call.returned
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
        parts = [routed(self.experts[lo:hi], bank.every, by_slot=bank.by_slot) for lo, hi in spans]
        for each in zip(*parts, strict=True):
            yield each[0][0], [(tokens + lo, slots) for (_, tokens, slots), (lo, _) in zip(each, spans, strict=True)]

    def output(self, lo: int, hi: int) -> Tensor:
        """The bank's output for rows [lo, hi)."""
        assert self.total is not None
        lo, hi = lo * self.per_row, hi * self.per_row
        return self.call.output(self.total.get(lo, hi), self.experts[lo:hi], (hi - lo) // self.per_token)

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
    bank = next(iter(module.parameters(recurse=False))).shape

    def run() -> RoutedRows:
        made: RoutedRows | None = None
        slots: int | None = None
        for hidden, call in store.batches(index):
            seen: list[BankCall] = []

            def forward(*args: Any, seen: list[BankCall] = seen, **kwargs: Any) -> Any:
                found = bank_call(args, kwargs, bank)
                assert found is not None, "the probe has seen how the bank is called"
                seen.append(found)
                raise StopForward

            with running(), replace_forward(module, forward), contextlib.suppress(StopForward):
                call.run(block, hidden)
            lo, hi = store.at
            tokens = (hi - lo) * store.shape[1]
            received = seen[0].count if seen else 0
            if received % tokens if received and seen[0].repeats else received != tokens:
                raise UnsupportedModelError(
                    f"{prefix}.{name}: receives {received} of {tokens} tokens; banks that do not receive every token once are not supported"
                )
            slots = seen[0].slots() if slots is None else slots
            routing = seen[0].routing(slots)
            if made is None:
                made = _empty(store, seen[0], routing, len(routing.inputs) // tokens)
            at = slice(lo * made.per_row, hi * made.per_row)
            made.inputs.put(at.start, routing.inputs)
            made.experts[at], made.weights[at] = routing.experts, routing.weights
        assert made is not None
        return made

    return store.read_pass(index, step, run)


def _empty(store: ActivationStore, call: BankCall, routing: Routing, per_token: int) -> RoutedRows:
    count = store.shape[0] * store.shape[1] * per_token
    return RoutedRows(
        call=call.shortened(),
        inputs=store.token_buffer(count, routing.inputs.shape[-1], routing.inputs.dtype),
        experts=routing.experts.new_empty(count, routing.experts.shape[1]),
        weights=routing.weights.new_empty(count, routing.weights.shape[1]),
        per_row=store.shape[1] * per_token,
        per_token=per_token,
    )
