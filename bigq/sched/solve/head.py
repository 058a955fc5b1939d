"""Quantizing the output head, from the hidden states that leave the last block.

The head is the only large Linear outside the blocks. Its Hessian [d, d] is small, where d is the width of the hidden states. Its rows,
one for each token of the vocabulary, are solved in chunks: they share the factor, and are independent of each other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bigq.machine.ranks import Ranks
from bigq.methods.base import CalibratedMethod, DataFreeMethod
from bigq.model import skeleton
from bigq.model.forward.capture import StopForward, replace_forwards
from bigq.model.pager import Pager
from bigq.progress.clock import Clock, Lap
from bigq.quantized_weight import QuantizedWeight
from bigq.sched.plan.costs.head import HEAD_CHUNK
from bigq.sched.rows.calibration import CalibrationRows
from bigq.sched.solve.collected import Collected
from bigq.sched.solve.results import Solved
from bigq.sched.solve.shared import failing_together, sharing_of, solve_shared
from bigq.scheme import QuantScheme


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadJob:
    """The output head and how it is quantized. name, module: its Linear, weight [V, d]. finite_only: leave out tokens with NaN or Inf.
    largest_inputs: whether its largest input is needed."""

    name: str
    module: nn.Linear
    scheme: QuantScheme
    pager: Pager
    clock: Clock
    finite_only: bool = False
    largest_inputs: bool = False


def quantize_head(job: HeadJob, method: DataFreeMethod) -> Solved:
    """Quantize the head from its weight alone. The weight is loaded for this only. Raises NumericsError."""
    with job.pager.head_loaded(), job.clock.phase("solve") as solving:
        return Solved(job.name, _by_rows(job, lambda rows: method.quantize(rows, job.scheme, job.name)), {"solve": solving})


def solve_head(job: HeadJob, rows: CalibrationRows, method: CalibratedMethod, ranks: Ranks) -> Solved:
    """Quantize the head on the hidden states after the last block. The weight is loaded for this only. Raises NumericsError."""
    collector = _collect(job, rows, method)
    collector.reduce(ranks)
    with failing_together(ranks), job.clock.phase("hessian"):
        solver = collector.finish(job.name)
    seconds: dict[str, Lap] = {}
    with failing_together(ranks), job.clock.phase("factor") as seconds["factor"]:
        factor = solver.factor(job.scheme, job.name, last=True, sharing=sharing_of(ranks))
    with job.pager.head_loaded(), job.clock.phase("solve") as seconds["solve"]:
        weight = _by_rows(job, lambda part: solve_shared(factor, [part], job.scheme, job.name, ranks)[0])
    return Solved(job.name, weight, seconds, collector.left_out, collector.largest_input)


def _collect(job: HeadJob, rows: CalibrationRows, method: CalibratedMethod) -> Collected:
    """Collect the head's inputs with the model's own forward after its blocks. The head itself is not loaded and does not compute."""
    inputs = skeleton.linear_weight(job.module).shape[1]
    pager, store = job.pager, rows.quantized

    def run() -> Collected:
        collector = Collected(method, inputs, pager.device, finite_only=job.finite_only, largest=job.largest_inputs)

        def see(x: Tensor) -> Tensor:
            with job.clock.phase("hessian"):
                collector.add(x)
            raise StopForward

        for lo, hi in store.spans():
            store.before_batch()
            hidden = store.fetch(lo, hi)

            def make(i: int, hidden: Tensor = hidden) -> Callable[..., Any]:
                return see if i == len(pager.blocks) else lambda *args, **kwargs: rows.probe.form.wrap(hidden)

            with replace_forwards([*pager.blocks, job.module], make), contextlib.suppress(StopForward):
                pager.model(input_ids=rows.tokens[lo:hi].to(pager.device), use_cache=False)
        return collector

    with job.clock.phase("replay"), pager.rest_loaded(), pager.embedding_rows(rows.tokens):
        return store.read_pass(len(pager.blocks), 1, run)


def _by_rows(job: HeadJob, quantize: Callable[[Tensor], QuantizedWeight]) -> QuantizedWeight:
    """Quantize the head's weight in chunks of rows."""
    weight = skeleton.linear_weight(job.module)
    parts = [quantize(rows) for rows in weight.split(max(1, HEAD_CHUNK // weight.shape[1]))]
    return QuantizedWeight(
        codes=torch.cat([part.codes for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        zeros=torch.cat([part.zeros for part in parts]),
        scheme=job.scheme,
        loss=sum(part.loss for part in parts),
        energy=sum(part.energy for part in parts),
        damping=parts[0].damping,
        dead_inputs=parts[0].dead_inputs,
    )
