"""The folds of a whole model, found without any of its weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from bigq.errors import UnsupportedModelError
from bigq.model.description import ModelDescription
from bigq.model.folding.experts import bank_fold
from bigq.model.folding.find import BlockExperiments
from bigq.model.folding.fold import BlockFolds, ExpertFold
from bigq.model.forward.block_call import BlockCall
from bigq.model.forward.capture import forward_errors
from bigq.model.rotation.around import head_sizes
from bigq.model.rotation.calls import StandInModel

#: Tokens of the row that experiments run on: a feature that an activation function sets to 0 for one is seen at others.
TOKENS = 64


def model_folds(described: ModelDescription) -> tuple[BlockFolds, ...]:
    """The folds of every block. A block that takes more than hidden states from the rows, or cannot run on stand-ins, has none."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]), forward_errors():
        whole = StandInModel(described, TOKENS)
        hidden, first = whole.entering(whole.rows)
        calls = whole.calls(whole.rows, whole.form(hidden, first))
        found: dict[Any, BlockFolds] = {}
        folds: list[BlockFolds] = []
        for i, (block, call) in enumerate(zip(described.blocks, calls, strict=True)):
            key = (type(block), tuple((name, tuple(p.shape)) for name, p in block.named_parameters()), _kinds(call))
            if key not in found:
                found[key] = _block_folds(whole, i, block, call)
            folds.append(found[key])
        return tuple(folds)


def _block_folds(whole: StandInModel, i: int, block: nn.Module, call: BlockCall) -> BlockFolds:
    bare = whole.bare(i)
    none = BlockFolds(without=(*bare.linears, *bare.banks))
    if call.row_values:
        return none
    hidden, _ = whole.entering(whole.rows)
    try:
        with forward_errors():
            found = BlockExperiments(bare, lambda x: call.run(block, x.clone()), hidden, head_sizes(whole.described.config)).find()
    except UnsupportedModelError:
        return none
    inside = {name: bank_fold(bare, name) for name in bare.banks}
    last = [f"{name}.{fold}" for name, fold in inside.items() if isinstance(fold, str)]
    experts = tuple(fold for fold in inside.values() if isinstance(fold, ExpertFold))
    return dataclasses.replace(found, without=(*found.without, *last), experts=experts)


def _kinds(call: BlockCall) -> tuple[Any, ...]:
    """What tells calls of blocks apart, as of sliding and full attention: their arguments that are no tensors."""
    return tuple(sorted((k, str(v)) for k, v in call.kwargs.items() if isinstance(v, (bool, int, str))))
