"""Probing the structure of a model, and computing the inputs of its first block for the calibration rows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bigq.errors import UnsupportedModelError
from bigq.job.batches import Batches
from bigq.model.architecture import max_positions
from bigq.model.experts.cut import without_banks
from bigq.model.forward.arguments import first_difference
from bigq.model.forward.block_call import BlockCall, OutputForm, fill_from_first
from bigq.model.forward.capture import first_input, forward_errors, on_its_input, record_calls
from bigq.model.forward.checks import BlockCheck, probe_blocks
from bigq.model.pager import Pager
from bigq.sched.rows.row_values import TokenArguments
from bigq.sched.rows.store import ActivationStore
from bigq.sched.rows.tiers import Tier

#: Tokens in each random row that a model is probed with.
PROBE_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Probe:
    """A short random batch to probe blocks with. hidden: the inputs of block 0 [1, T, d]. calls: of each block. form: of their output.

    check: checks other loaded blocks.
    """

    hidden: Tensor
    calls: list[BlockCall]
    form: OutputForm
    check: BlockCheck

    @property
    def of_tokens(self) -> tuple[tuple[int, ...], ...]:
        return self.check.of_tokens


def probe_model(pager: Pager) -> Probe:
    """Run a few random tokens through the model's own forward, to record the arguments and outputs of its blocks.

    Raises UnsupportedModelError if the model cannot be run block by block.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = pager.embedding.num_embeddings
    length = min(PROBE_TOKENS, max_positions(pager.config) or PROBE_TOKENS)
    ids = torch.randint(0, vocabulary, (3, 2, length), generator=generator)
    ids[2] = torch.stack([ids[0, 0], ids[1, 1]])
    with pager.rest_loaded(), pager.embedding_rows(ids):
        ids = ids.to(pager.device)
        with forward_errors(on_its_input(pager.model)):
            hidden, call = first_input(pager.model, pager.blocks, ids[0, :1])
        block = pager.load_block(0)
        with forward_errors(), without_banks(block):
            form = OutputForm.of(block(hidden, *call.args, **call.kwargs))
        check = probe_blocks(pager.model, pager.blocks, ids, form, pager.blocks_path)
        check.run(0, block)
        # Blocks may have changed what they were given: first_input and record_calls give it anew.
        hidden, _ = first_input(pager.model, pager.blocks, ids[0, :1])
        calls = record_calls(pager.model, pager.blocks, ids[0, :1], form)
        with without_banks(block):
            calls = fill_from_first(calls, lambda call: call.outputs(block, hidden.clone()))
        pager.evict_block(0)
    return Probe(hidden, calls, form, check)


def activations_for(pager: Pager, rows: Tensor, batches: Batches, probe: Probe, tier: Tier) -> ActivationStore:
    """The inputs of block 0 for the token ids ``rows`` [N, T]."""
    store = store_for(pager, rows, batches, probe, tier)
    with contextlib.ExitStack() as stack:
        stack.callback(store.close)
        embed(pager, rows, probe, store)
        stack.pop_all()
    return store


def store_for(pager: Pager, rows: Tensor, batches: Batches, probe: Probe, tier: Tier) -> ActivationStore:
    """An uninitialized store for the hidden states of the token ids ``rows`` [N, T]."""

    def record(size: int) -> list[BlockCall]:
        """Any tokens work, as ``probe_calls`` has checked, but for the arguments that are computed from them."""
        ids = rows[:1].expand(size, -1)
        with pager.rest_loaded(), pager.embedding_rows(ids):
            return _opened(record_calls(pager.model, pager.blocks, ids.to(pager.device), probe.form), probe)

    def compute(spans: Sequence[tuple[int, int]], block: int) -> Iterator[dict[int, Tensor]]:
        with pager.rest_loaded(), pager.embedding_rows(rows):
            for lo, hi in spans:
                leaves = record_calls(pager.model, pager.blocks, rows[lo:hi].to(pager.device), probe.form)[block].leaves()
                yield {place: leaves[place] for place in probe.of_tokens[block]}

    shape = (len(rows), rows.shape[1], *probe.hidden.shape[2:])
    arguments = TokenArguments(tier, len(rows), lambda: batches.at(0, 0), compute) if any(probe.of_tokens) else None
    return ActivationStore(shape, probe.hidden.dtype, batches, tier, record, arguments)


def _opened(calls: list[BlockCall], probe: Probe) -> list[BlockCall]:
    return [call.opened(places) for call, places in zip(calls, probe.of_tokens, strict=True)]


def embed(pager: Pager, rows: Tensor, probe: Probe, store: ActivationStore) -> None:
    """Fill the store with the inputs of block 0, and record the arguments of the blocks."""

    def run() -> None:
        for lo, hi in store.spans():
            ids = rows[lo:hi].to(pager.device)
            hidden, _ = first_input(pager.model, pager.blocks, ids)
            calls = _opened(record_calls(pager.model, pager.blocks, ids, probe.form), probe)
            differing = first_difference(store.calls.setdefault(len(ids), calls), calls)
            if differing is not None:
                raise UnsupportedModelError(
                    f"the arguments of block {differing} for rows {lo + 1} to {hi} differ from those for the rows before: they depend on "
                    "the tokens; this architecture is not supported"
                )
            store.put(lo, hidden)

    with pager.rest_loaded(), pager.embedding_rows(rows):
        store.read_pass(0, 0, run)
