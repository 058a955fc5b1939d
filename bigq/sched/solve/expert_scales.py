"""Scales of the inputs of each expert's last matrix, chosen as its turn comes and folded into its other matrices before it is solved.

An expert is in memory once: what its last matrix receives is computed from its unquantized weights, for the tokens that are routed to it,
and then its matrices are solved. All of it is within the expert, so an expert that is committed needs nothing of it, and one that is made
again gets the same scales.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bigq.machine.memory import return_freed_memory
from bigq.machine.ranks import Ranks
from bigq.methods.base import Scaling
from bigq.model.experts.bank import Expert
from bigq.model.folding.apply import fold_expert_
from bigq.model.folding.fold import ExpertFold
from bigq.progress.clock import Clock
from bigq.sched.solve.shared import agreed
from bigq.scheme import QuantScheme
from bigq.solver.scaling import LEAST_TOKENS, InputStatistics, Reader

#: Tokens that are added to the statistics at a time: copies of them are made.
COUNTED_TOKENS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenTokens:
    """The tokens that are routed to an expert. count: by all ranks. parts: the numbers of this rank's, as many at a time as the expert
    takes. inputs: what the last matrix receives for some of them."""

    count: int
    parts: Sequence[Tensor]
    inputs: Callable[[Tensor], Tensor]


def is_scaled(fold: ExpertFold | None, scaling: Scaling | None, tokens: int) -> bool:
    """Whether an expert with so many tokens is scaled. With few of them, scales would follow these and not the text."""
    return _may_be_scaled(fold, scaling) and tokens >= LEAST_TOKENS


def has_too_few(fold: ExpertFold | None, scaling: Scaling | None, tokens: int | None) -> bool:
    """Whether only its few tokens keep an expert from being scaled."""
    return _may_be_scaled(fold, scaling) and tokens is not None and tokens < LEAST_TOKENS


def few_tokens_warning(experts: int) -> str:
    """experts: that had too few tokens."""
    one = experts == 1
    return (
        f"{experts} expert{'' if one else 's'} of a layer {'has' if one else 'have'} fewer than {LEAST_TOKENS} calibration tokens: the "
        f"inputs of {'its last matrix' if one else 'their last matrices'} are not scaled, since scales from so few make errors larger"
    )


def _may_be_scaled(fold: ExpertFold | None, scaling: Scaling | None) -> bool:
    return fold is not None and scaling is not None and scaling.takes("expert")


def scale_inside(
    fold: ExpertFold,
    scaling: Scaling,
    scheme: QuantScheme,
    experts: Sequence[Expert],
    given: GivenTokens,
    clock: Clock,
    ranks: Ranks,
) -> None:
    """Choose the scales of an expert and fold them into it.

    scheme: of the last matrix. experts: the expert with its unquantized weights, and its copy in the unquantized model if there is one.
    """
    weight = experts[0].weight(fold.reader)
    statistics = InputStatistics(weight.shape[1], weight.device, given.count)
    for part in given.parts:
        with clock.phase("replay"):
            for some in given.inputs(part).split(COUNTED_TOKENS):
                statistics.add(some)
    statistics.reduce(ranks)
    if len(given.parts) > 1:  # what it ran on was large
        return_freed_memory()
    with clock.phase("scale"):
        if statistics.tokens < LEAST_TOKENS:  # others are not finite
            return
        every = torch.arange(len(fold.rows), device=weight.device)
        scales = agreed(scaling.choose(statistics, [Reader(weight, scheme)], every), ranks)
        for expert in experts:
            fold_expert_(expert, fold, scales)
