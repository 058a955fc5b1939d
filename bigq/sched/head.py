"""Quantizing the output head, from the hidden states that leave the last block.

The head is the one Linear outside the blocks that is worth it. Its Hessian is as small as the hidden states are wide, and its rows,
one for each word of the vocabulary, are solved some at a time: they share the factor, and a row does not know of the others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bigq.config import JobConfig
from bigq.io.index import TensorInfo
from bigq.job.settle import head_scheme
from bigq.model import skeleton
from bigq.model.capture import StopForward, all_replaced
from bigq.model.pager import Pager
from bigq.progress.clock import Clock, Lap
from bigq.quantized_weight import QuantizedWeight
from bigq.sched.block import Solved
from bigq.sched.plan.cost import HEAD_CHUNK
from bigq.sched.rows.probe import Probe
from bigq.sched.rows.store import ActivationStore
from bigq.scheme import QuantScheme
from bigq.solver.gptq import solve
from bigq.solver.hessian import HessianSum, factorize
from bigq.solver.rtn import round_to_nearest


@dataclass(frozen=True, slots=True)
class Head:
    """The output head that is to be quantized: its module name and where its weight [V, d] comes from."""

    name: str
    module: nn.Linear
    source: TensorInfo
    scheme: QuantScheme


def head_of(pager: Pager, config: JobConfig) -> Head | None:
    """None where the head stays as it is. Raises UsageError where it cannot be quantized although it should be."""
    scheme = head_scheme(pager, config)
    name, module = pager.head_name, pager.head
    if scheme is None or not isinstance(module, nn.Linear):
        return None
    return Head(name, module, pager.sources[f"{name}.weight"], scheme)


def solve_head(
    head: Head, pager: Pager, clock: Clock, inputs: tuple[ActivationStore, Tensor, Probe] | None, *, finite_only: bool = False
) -> Solved:
    """Quantize the head, which is loaded here for so long.

    inputs: the hidden states behind the last block, the tokens [N, T] that they come from, and how blocks return them; None for rounding
    to nearest. finite_only: leave tokens that are not finite out. Raises NumericsError.
    """
    if inputs is None:
        with pager.head_loaded(), clock.phase("solve") as solving:
            return Solved(head.name, _by_rows(head, lambda rows: round_to_nearest(rows, head.scheme, head.name)), {"solve": solving})
    total = _hessian(head, pager, clock, *inputs, finite_only=finite_only)
    with clock.phase("hessian"):
        h = total.finish(head.name)
    seconds: dict[str, Lap] = {}
    with clock.phase("factor") as seconds["factor"]:
        factor = factorize(h, act_order=head.scheme.act_order, damping=head.scheme.damping, name=head.name)
    with pager.head_loaded(), clock.phase("solve") as seconds["solve"]:
        weight = _by_rows(head, lambda rows: solve([rows], factor, head.scheme, head.name)[0])
    return Solved(head.name, weight, seconds, total.left_out)


def _hessian(
    head: Head, pager: Pager, clock: Clock, store: ActivationStore, rows: Tensor, probe: Probe, *, finite_only: bool
) -> HessianSum:
    """What the head receives, by the model's own forward behind its blocks. The head itself is not there and does not compute."""
    inputs = skeleton.linear_weight(head.module).shape[1]

    def run() -> HessianSum:
        total = HessianSum(inputs, pager.device, finite_only=finite_only)

        def see(x: Tensor) -> Tensor:
            with clock.phase("hessian"):
                total.add(x)
            raise StopForward

        for lo, hi in store.spans():
            store.pause()
            hidden = store.take(lo, hi)

            def make(i: int, hidden: Tensor = hidden) -> Callable[..., Any]:
                return see if i == len(pager.blocks) else lambda *args, **kwargs: probe.form.wrap(hidden)

            with all_replaced([*pager.blocks, head.module], make), contextlib.suppress(StopForward):
                pager.model(input_ids=rows[lo:hi].to(pager.device), use_cache=False)
        return total

    with clock.phase("replay"), pager.rest_loaded(), pager.embedding_rows(rows):
        return store.afresh(len(pager.blocks), 1, run)


def _by_rows(head: Head, quantize: Callable[[Tensor], QuantizedWeight]) -> QuantizedWeight:
    """The head's weight, some rows at a time."""
    weight = skeleton.linear_weight(head.module)
    parts = [quantize(rows) for rows in weight.split(max(1, HEAD_CHUNK // weight.shape[1]))]
    return QuantizedWeight(
        codes=torch.cat([part.codes for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        zeros=torch.cat([part.zeros for part in parts]),
        scheme=head.scheme,
        loss=sum(part.loss for part in parts),
        energy=sum(part.energy for part in parts),
        damping=parts[0].damping,
    )
