"""What the arguments of blocks depend on, tried out by running the model around its blocks with other tokens and other hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from bigq.errors import UnsupportedModelError
from bigq.model.forward.block_call import BlockCall, OutputForm
from bigq.model.forward.capture import record_calls
from bigq.model.forward.compare import agree, same_value


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbedCalls:
    """The calls of all blocks for three batches of two rows.

    of_tokens: of each block, which leaves of its arguments are computed from the tokens of each row (see ``OfTokens``).
    """

    batches: tuple[list[BlockCall], ...]
    of_tokens: tuple[tuple[int, ...], ...]


def probe_calls(model: nn.Module, blocks: nn.ModuleList, ids: Tensor, form: OutputForm) -> ProbedCalls:
    """Find out what the blocks' arguments depend on: the shape of the batch, or the tokens of the same row.

    ids: [3, 2, T]; the third batch has its first row from the first batch, and its second row from the second.
    Raises UnsupportedModelError where they depend on anything else.
    """
    one, other, mixed = (record_calls(model, blocks, batch, form) for batch in ids)
    perturbed = record_calls(model, blocks, ids[0], form, lambda hidden: hidden + 1.0)
    differing = first_difference(one, perturbed)
    if differing is not None:
        raise UnsupportedModelError(
            f"the arguments of block {differing} depend on what earlier blocks computed; this architecture is not supported"
        )
    places = tuple(_differing(a, b) for a, b in zip(one, other, strict=True))
    differing = first_difference(*([call.opened(at) for call, at in zip(calls, places, strict=True)] for calls in (one, other)))
    if differing is not None:
        raise UnsupportedModelError(f"the arguments of block {differing} depend on the tokens; this architecture is not supported")
    for i, at in enumerate(places):
        for a, b, c in zip(*(_leaves_at(calls[i], at) for calls in (one, other, mixed)), strict=True):
            if a.ndim == 0 or len(a) != ids.shape[1] or not (agree(a[0], c[0]) and agree(b[1], c[1])):
                raise UnsupportedModelError(
                    f"the arguments of block {i} depend on the tokens, and not row by row; this architecture is not supported"
                )
    return ProbedCalls(batches=(one, other, mixed), of_tokens=places)


def first_difference(one: Sequence[BlockCall], other: Sequence[BlockCall]) -> int | None:
    """The first block whose arguments differ between two forwards."""
    pairs = enumerate(zip(one, other, strict=True))
    return next((i for i, (a, b) in pairs if not same_value((a.args, a.kwargs), (b.args, b.kwargs))), None)


def _differing(one: BlockCall, other: BlockCall) -> tuple[int, ...]:
    """The tensors among the arguments that differ in values alone."""
    pairs = list(enumerate(zip(one.leaves(), other.leaves(), strict=False)))
    tensors = [(place, a, b) for place, (a, b) in pairs if isinstance(a, Tensor) and isinstance(b, Tensor)]
    return tuple(place for place, a, b in tensors if (a.shape, a.dtype) == (b.shape, b.dtype) and not same_value(a, b))


def _leaves_at(call: BlockCall, places: Sequence[int]) -> list[Tensor]:
    leaves = call.leaves()
    return [leaves[place] for place in places]
