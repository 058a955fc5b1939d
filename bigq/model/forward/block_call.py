"""How a block is called and what it returns, apart from the hidden states that streaming carries from block to block.

Most arguments, such as masks and rotary tables, are the same for all batches of a size, and are recorded once. Two kinds have a value for
every row of calibration tokens, a *row value*. In a recorded call a placeholder is in its place:

- ``HandedOn``: an extra output of the block before, such as the tokens that its indexer chose;
- ``OfTokens``: what the model computes from the row's tokens before the blocks, such as embeddings of a block's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from bigq.errors import UnsupportedModelError


@dataclass(frozen=True)
class HandedOn:
    """Stands for an extra output of block ``block``: the one at ``index``, counted after the hidden states."""

    block: int
    index: int


@dataclass(frozen=True)
class OfTokens:
    """Stands for an argument that is computed from tokens. place: its number among the leaves of a call's arguments."""

    place: int


@dataclass(frozen=True, slots=True)
class BlockCall:
    """The arguments of a block besides the hidden states, which always come first.

    hands_on: which extra outputs of the block the next one takes.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    hands_on: tuple[int, ...] = ()

    def run(self, block: Callable[..., Any], hidden: Tensor) -> Tensor:
        """The block's new hidden states."""
        return self.outputs(block, hidden)[0]

    def outputs(self, block: Callable[..., Any], hidden: Tensor) -> tuple[Tensor, ...]:
        """The block's new hidden states, and the extra outputs that the next block takes."""
        output = block(hidden, *self.args, **self.kwargs)
        return (hidden_of(output), *extras_of(output, self.hands_on))

    @property
    def row_values(self) -> tuple[HandedOn | OfTokens, ...]:
        """The placeholders among the arguments."""
        return tuple(leaf for leaf in self.leaves() if isinstance(leaf, (HandedOn, OfTokens)))

    def leaves(self) -> list[Any]:
        """The values in all arguments."""
        return tree_leaves((self.args, dict(self.kwargs)))

    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in self.leaves() if isinstance(leaf, Tensor)]

    def replaced(self, value: Callable[[int, Any], Any]) -> BlockCall:
        """The call with ``value(place, leaf)`` for each leaf."""
        leaves, form = tree_flatten((self.args, dict(self.kwargs)))
        args, kwargs = tree_unflatten([value(place, leaf) for place, leaf in enumerate(leaves)], form)
        return dataclasses.replace(self, args=args, kwargs=kwargs)

    def opened(self, places: Iterable[int]) -> BlockCall:
        """The call with placeholders for the arguments that are computed from tokens."""
        opened = frozenset(places)
        return self.replaced(lambda place, leaf: OfTokens(place) if place in opened else leaf) if opened else self

    def filled(self, value: Callable[[HandedOn | OfTokens], Tensor]) -> BlockCall:
        """The call with values for its placeholders."""
        if not self.row_values:
            return self
        return self.replaced(lambda _, leaf: value(leaf) if isinstance(leaf, (HandedOn, OfTokens)) else leaf)


@dataclass(frozen=True, slots=True)
class OutputForm:
    """How a block returns its hidden states: as a tensor (extras None), or first in a tuple or list.

    extras: which other items are not None.
    """

    extras: tuple[bool, ...] | None
    as_list: bool = False

    @staticmethod
    def fits(output: Any) -> bool:
        """Whether an output has one of these forms."""
        return isinstance(output, Tensor) or (isinstance(output, (tuple, list)) and bool(output) and isinstance(output[0], Tensor))

    @classmethod
    def of(cls, output: Any) -> OutputForm:
        if isinstance(output, Tensor):
            return cls(None)
        if not cls.fits(output):
            raise UnsupportedModelError(f"a decoder block returns a {type(output).__name__}; this architecture is not supported")
        return cls(tuple(extra is not None for extra in output[1:]), isinstance(output, list))

    def wrap(self, hidden: Tensor, block: int = -1) -> Any:
        """``hidden`` in the form of output of block ``block``, with placeholders as extra outputs."""
        if self.extras is None:
            return hidden
        items = (hidden, *(HandedOn(block, i) if present else None for i, present in enumerate(self.extras)))
        return list(items) if self.as_list else items


def hidden_of(output: Any) -> Tensor:
    """The hidden states in a block's output."""
    hidden = output if isinstance(output, Tensor) else output[0]
    assert isinstance(hidden, Tensor)
    return hidden


def extras_of(output: Any, indices: Iterable[int]) -> tuple[Tensor, ...]:
    """Extra outputs of a block by their indices. Raises UnsupportedModelError if one is no tensor."""
    found = tuple(output[1 + index] for index in indices)
    if not all(isinstance(extra, Tensor) for extra in found):
        raise UnsupportedModelError(
            "a block takes an extra output of the block before that is no tensor; this architecture is not supported"
        )
    return found


def with_handed_on(calls: Sequence[BlockCall]) -> list[BlockCall]:
    """The calls of all blocks, where each knows what it hands on to the next."""
    taken = [tuple(sorted({leaf.index for leaf in call.leaves() if isinstance(leaf, HandedOn)})) for call in calls[1:]]
    return [dataclasses.replace(call, hands_on=later) for call, later in zip(calls, [*taken, ()], strict=True)]


def fill_from_first(calls: Sequence[BlockCall], run: Callable[[BlockCall], Sequence[Tensor]]) -> list[BlockCall]:
    """Calls in which every block takes what block 0 hands on: for probes, which all run on its inputs.

    run: the outputs of block 0 by its call; used only if it hands anything on.
    """
    first = calls[0]
    values = dict(zip(first.hands_on, run(first)[1:], strict=True)) if first.hands_on else {}

    def value(leaf: HandedOn | OfTokens) -> Tensor:
        if isinstance(leaf, HandedOn) and leaf.index in values:
            return values[leaf.index]
        raise UnsupportedModelError(
            "blocks take other extra outputs of the block before than block 1 does; this architecture is not supported"
        )

    return [call.filled(value) for call in calls]
