"""The entrance to the blocks: the structure of a model seen by a probe, and the calibration rows brought there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bigq import skeleton
from bigq.sched.activations import ActivationStore
from bigq.sched.capture import BlockCall, OutputForm, check_streamable, first_input, record_calls
from bigq.sched.pager import Pager
from bigq.sched.tiers import Tier

#: Length of the random rows on which a model's structure is probed.
PROBE_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Probe:
    """A short random batch at the entrance of the blocks; what the structure of a model is found out with."""

    hidden: Tensor
    calls: list[BlockCall]
    form: OutputForm


def probe_model(pager: Pager) -> Probe:
    """Run a few random tokens through the model's own forward to see how its blocks are called and what they return.

    Raises UnsupportedModelError where the model cannot be streamed block by block.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = pager.embedding.num_embeddings
    length = min(PROBE_TOKENS, skeleton.max_positions(pager.config) or PROBE_TOKENS)
    ids = torch.randint(0, vocabulary, (2, 1, length), generator=generator)
    with pager.rest_loaded(), pager.embedding_rows(ids):
        ids = ids.to(pager.device)
        hidden, call = first_input(pager.model, pager.blocks, ids[0])
        block = pager.load_block(0)
        form = OutputForm.of(block(hidden, *call.args, **call.kwargs))
        check_streamable(pager.model, pager.blocks, ids, form)
        calls = record_calls(pager.model, pager.blocks, ids[0], form)
        pager.evict_block(0)
    return Probe(hidden, calls, form)


def activations_for(pager: Pager, rows: Tensor, batch: int, form: OutputForm, tier: Tier) -> ActivationStore:
    """Embed the rows [N, T] and record how blocks are called; what blocks 0 … will be replayed on."""
    store: ActivationStore | None = None
    with pager.rest_loaded(), pager.embedding_rows(rows):
        for lo in range(0, len(rows), batch):
            ids = rows[lo : lo + batch].to(pager.device)
            hidden, _ = first_input(pager.model, pager.blocks, ids)
            if store is None:
                store = ActivationStore(len(rows), rows.shape[1], hidden.shape[-1], hidden.dtype, batch, tier)
            if len(ids) not in store.calls:
                store.calls[len(ids)] = record_calls(pager.model, pager.blocks, ids, form)
            store.put(lo, hidden)
    assert store is not None
    return store
