"""What tuning the scales of a block takes (see ``sched.solve.tune``). Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bigq.kernels.pick import piece
from bigq.sched.plan.shape import BlockShape, GroupShape, LinearShape
from bigq.scheme import QuantScheme
from bigq.tuning.scales import MEASURED

#: Bytes of a scale while it is tuned: the start, its logarithm, two moments, its gradient and the temporary results of a step, in fp32.
SCALE_BYTES = 10 * 4

#: Per token, hidden states that a forward keeps for its gradients besides inputs and outputs of Linears: norms in fp32, residuals, loss.
KEPT_STATES = 16

#: Forwards and gradients of a step, in units of a forward.
STEP_FORWARDS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneTerms:
    """steps: of tuning. itemsize: bytes of a number in the compute dtype. width: of the hidden states. batch: tokens in a step.

    tokens: of all rows.
    """

    steps: int
    itemsize: int
    width: int
    batch: int
    tokens: int
    on_gpu: bool


def solved_bytes(linear: LinearShape, scheme: QuantScheme) -> int:
    """Bytes of a solved Linear until it is packed: a code is one byte, a scale with its zero point three."""
    return linear.m * linear.n + 3 * linear.m * (linear.n // scheme.group_width(linear.n))


def tune_bytes(linears: Sequence[tuple[LinearShape, QuantScheme]], groups: Sequence[GroupShape], terms: TuneTerms) -> int:
    """Bytes in addition to the block, its solved Linears and a forward.

    There are a second copy of all weights, the gradient of one, and what a forward keeps for the gradients of its batch: the inputs and
    outputs of Linears, products of outputs such as the one behind a gate, and hidden states.
    """
    weights = sum(linear.m * linear.n for linear, _ in linears) * terms.itemsize
    largest = max((linear.m * linear.n for linear, _ in linears), default=0)
    gradient = largest * terms.itemsize + 2 * 4 * min(piece(on_gpu=terms.on_gpu), largest)
    scales = sum(linear.m * (linear.n // scheme.group_width(linear.n)) for linear, scheme in linears) * SCALE_BYTES
    widths = sum(group.n + 2 * sum(linear.m for linear in group.linears) for group in groups)
    kept = terms.batch * terms.itemsize * (widths + KEPT_STATES * terms.width)
    return weights + gradient + scales + kept


def tune_flops(block: BlockShape, attention: float, terms: TuneTerms) -> float:
    """Operations of all steps and measurements. attention: per token of a forward, besides the Linears."""
    forward = 2.0 * sum(linear.m * linear.n for linear in block.linears) + attention
    return forward * (terms.steps * STEP_FORWARDS * min(terms.batch, terms.tokens) + (1 + MEASURED) * terms.tokens)
