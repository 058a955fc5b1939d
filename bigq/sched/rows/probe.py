"""Probing the structure of a model, and computing the inputs of its first block for the calibration rows."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor

from bigq.job.batches import Batches
from bigq.model import skeleton
from bigq.model.capture import BlockCall, OutputForm, check_block_calls, first_input, forward_errors, record_calls
from bigq.model.pager import Pager
from bigq.sched.rows.store import ActivationStore
from bigq.sched.rows.tiers import Tier

#: Tokens in each random row that a model is probed with.
PROBE_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Probe:
    """A short random batch to probe blocks with. hidden: the inputs of block 0 [1, T, d]. calls: of each block. form: of their output."""

    hidden: Tensor
    calls: list[BlockCall]
    form: OutputForm


def probe_model(pager: Pager) -> Probe:
    """Run a few random tokens through the model's own forward, to record the arguments and outputs of its blocks.

    Raises UnsupportedModelError if the model cannot be run block by block.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = pager.embedding.num_embeddings
    length = min(PROBE_TOKENS, skeleton.max_positions(pager.config) or PROBE_TOKENS)
    ids = torch.randint(0, vocabulary, (2, 1, length), generator=generator)
    with pager.rest_loaded(), pager.embedding_rows(ids):
        ids = ids.to(pager.device)
        with forward_errors():
            hidden, call = first_input(pager.model, pager.blocks, ids[0])
        block = pager.load_block(0)
        with forward_errors():
            form = OutputForm.of(block(hidden, *call.args, **call.kwargs))
        check_block_calls(pager.model, pager.blocks, ids, form)
        calls = record_calls(pager.model, pager.blocks, ids[0], form)
        pager.evict_block(0)
    return Probe(hidden, calls, form)


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
        """Any tokens work, as ``check_block_calls`` has checked."""
        ids = rows[:1].expand(size, -1)
        with pager.rest_loaded(), pager.embedding_rows(ids):
            return record_calls(pager.model, pager.blocks, ids.to(pager.device), probe.form)

    shape = (len(rows), rows.shape[1], probe.hidden.shape[-1])
    return ActivationStore(shape, probe.hidden.dtype, batches, tier, record)


def embed(pager: Pager, rows: Tensor, probe: Probe, store: ActivationStore) -> None:
    """Fill the store with the inputs of block 0, and record the arguments of the blocks."""

    def run() -> None:
        for lo, hi in store.spans():
            ids = rows[lo:hi].to(pager.device)
            hidden, _ = first_input(pager.model, pager.blocks, ids)
            if len(ids) not in store.calls:
                store.calls[len(ids)] = record_calls(pager.model, pager.blocks, ids, probe.form)
            store.put(lo, hidden)

    with pager.rest_loaded(), pager.embedding_rows(rows):
        store.read_pass(0, 0, run)
