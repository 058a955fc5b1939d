"""Tuning the scales of a solved block by gradients, so that its outputs on the calibration rows come near those of the original block.

The target is what the original block makes of the original model's rows, so errors of earlier blocks are corrected too. The scales that
are kept are those with the least loss over all rows, those of the solver among them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bigq.model.skeleton import is_transposed, linear_weight, set_linear_weight
from bigq.sched.rows.reference import REFERENCE_STEP
from bigq.sched.rows.store import ActivationStore
from bigq.sched.solve.block import BlockJob
from bigq.sched.solve.results import Solved
from bigq.tuning.scales import MEASURED, TunedScales, order_of, rate_at, relative_loss

#: The step (see ``batches.Halving``) of tuning: after the pass that gives its targets.
TUNING_STEP = REFERENCE_STEP + 1

#: The rate of the first step. Chosen with ``tiny-llama`` of the quality benchmark at 2 bits: 0.001 leaves a greater loss, 0.004 does not.
FIRST_RATE = 0.004


@dataclass(frozen=True, slots=True)
class Tuned:
    """before, after: the block's loss, see ``relative_loss``: a mean over tokens; NaN if no token is finite."""

    linears: Sequence[Solved]
    before: float
    after: float


def tune_block(
    job: BlockJob, solved: Sequence[Solved], store: ActivationStore, targets: ActivationStore, steps: int, pause: Callable[[], None]
) -> Tuned:
    """Tune the scales of a block's Linears, which hold their dequantized weights, before and afterwards.

    store: the rows that enter the block in the quantized model. targets: what the original block makes of the original model's rows.
    pause: called before each step. If the device runs out of memory, all begins anew with half the batch.
    """
    with job.clock.phase("tune"):
        run = functools.partial(_tuned, job, solved, store, targets, steps, pause)
        scales, before, after = store.read_pass(job.index, TUNING_STEP, run)
        linears = [
            dataclasses.replace(one, weight=dataclasses.replace(one.weight, scales=new)) for one, new in zip(solved, scales, strict=True)
        ]
        for one in linears:
            module = job.block.get_submodule(_inside(job, one))
            set_linear_weight(module, one.weight.dequantize(linear_weight(module).dtype))
    return Tuned(linears, before, after)


def _tuned(
    job: BlockJob, solved: Sequence[Solved], store: ActivationStore, targets: ActivationStore, steps: int, pause: Callable[[], None]
) -> tuple[list[Tensor], float, float]:
    """The best scales of each Linear, and the loss at first and with them."""
    block = _Weights(job, solved)
    before = best = _whole_loss(job, block, store, targets)
    spans = store.spans()
    if not math.isfinite(before):
        return [scales.best() for scales in block.scales], before, best
    part = -(-steps // MEASURED)
    for number, batch in enumerate(order_of(len(spans), steps, job.index)):
        pause()
        store.at = spans[batch]
        gradients = _gradients(job, block, store, targets)
        # A batch whose outputs overflow teaches nothing.
        if bool(torch.stack([torch.isfinite(g).all() for g in gradients]).all()):
            rate = rate_at(number, steps, FIRST_RATE)
            for scales, gradient in zip(block.scales, gradients, strict=True):
                scales.step(gradient, number + 1, rate)
        del gradients
        measured = (number + 1) % part == 0 or number + 1 == steps
        if measured and (loss := _whole_loss(job, block, store, targets)) < best:
            best = loss
            for scales in block.scales:
                scales.keep()
    return [scales.best() for scales in block.scales], before, best


def _gradients(job: BlockJob, block: _Weights, store: ActivationStore, targets: ActivationStore) -> Sequence[Tensor]:
    """Of the mean loss of the store's current batch, by the logarithms of the scales of each Linear."""
    lo, hi = store.at
    with torch.enable_grad():
        output = store.call(job.index, lo, hi).run(block.bound(), store.rows(lo, hi))
        total, tokens = relative_loss(output, targets.rows(lo, hi))
        return torch.autograd.grad(total / tokens.clamp(min=1), [scales.tuned for scales in block.scales])


def _whole_loss(job: BlockJob, block: _Weights, store: ActivationStore, targets: ActivationStore) -> float:
    """The mean loss over the tokens of all rows."""
    total = tokens = 0.0
    bound = block.bound()
    for hidden, call in store.batches(job.index):
        one, count = relative_loss(call.run(bound, hidden), targets.rows(*store.at))
        total, tokens = total + float(one), tokens + int(count)
    return total / tokens if tokens else math.nan


class _Weights:
    """The block with weights from the scales that are being tuned."""

    def __init__(self, job: BlockJob, solved: Sequence[Solved]) -> None:
        self._block = job.block
        self._names = [_inside(job, one) for one in solved]
        self.scales = [TunedScales(one.weight) for one in solved]

    def bound(self) -> Callable[..., object]:
        """The block as a function, with the weights as the scales are now."""
        weights = dict(self._made())

        def forward(hidden: Tensor, *args: object, **kwargs: object) -> object:
            return functional_call(self._block, weights, (hidden, *args), dict(kwargs))

        return forward

    def _made(self) -> Iterator[tuple[str, Tensor]]:
        for name, scales in zip(self._names, self.scales, strict=True):
            module: nn.Module = self._block.get_submodule(name)
            weight = scales.value(linear_weight(module).dtype)
            yield f"{name}.weight", weight.T if is_transposed(module) else weight


def _inside(job: BlockJob, one: Solved) -> str:
    """A Linear's name in the block."""
    return one.name.removeprefix(f"{job.prefix}.")
