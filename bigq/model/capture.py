"""Captures the input of block 0 and the arguments of every block from a model's own forward.

The caller provides a block's hidden states. The other arguments (masks, rotary tables, ALiBi) are recorded once per batch size and
reused, since calibration rows have one length and no padding. ``check_block_calls`` tests by running the model that this is valid.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bigq.errors import BigqError, UnsupportedModelError
from bigq.io.json_file import show_name
from bigq.machine.device import out_of_memory
from bigq.model.pager import replace_forward


class StopForward(Exception):
    """Raised in a replaced forward to end the model's forward early."""


@dataclass(frozen=True, slots=True)
class BlockCall:
    """The arguments of a block besides the hidden states, which always come first."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's new hidden states."""
        return hidden_of(block(hidden, *self.args, **self.kwargs))


@dataclass(frozen=True, slots=True)
class OutputForm:
    """How a block returns its hidden states: as a tensor (extras None), or first in a tuple. extras: which other items are not None."""

    extras: tuple[bool, ...] | None

    @staticmethod
    def fits(output: Any) -> bool:
        """Whether an output has one of the two forms."""
        return isinstance(output, Tensor) or (isinstance(output, tuple) and bool(output) and isinstance(output[0], Tensor))

    @classmethod
    def of(cls, output: Any) -> OutputForm:
        if isinstance(output, Tensor):
            return cls(None)
        if not cls.fits(output):
            raise UnsupportedModelError(f"a decoder block returns a {type(output).__name__}; this architecture is not supported")
        return cls(tuple(extra is not None for extra in output[1:]))

    def wrap(self, hidden: Tensor) -> Any:
        """``hidden`` in the block's form of output, with sentinels as extra outputs."""
        if self.extras is None:
            return hidden
        return (hidden, *(_Sentinel() if present else None for present in self.extras))


class _Sentinel:
    """Stands for a block's extra output, which no later block may use."""


def hidden_of(output: Any) -> Tensor:
    """The hidden states in a block's output."""
    hidden = output if isinstance(output, Tensor) else output[0]
    assert isinstance(hidden, Tensor)
    return hidden


@contextlib.contextmanager
def forward_errors() -> Iterator[None]:
    """Turn what a model's own forward raises into an UnsupportedModelError. BigqError and out-of-memory errors pass unchanged.

    For the first forward: a config that a model can be built from may still make its forward fail, with any exception.
    """
    try:
        yield
    except (BigqError, MemoryError):
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        raise UnsupportedModelError(
            f"the model's own forward fails with this config.json: {type(error).__name__}: {show_name(' '.join(str(error).split())[:300])}"
        ) from error


def first_input(model: nn.Module, blocks: nn.ModuleList, ids: Tensor) -> tuple[Tensor, BlockCall]:
    """The arguments of block 0 for token ids [B, T]: hidden states [B, T, d] and the others. Raises UnsupportedModelError."""
    seen: list[tuple[Tensor, BlockCall]] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        seen.append(_split(args, kwargs))
        raise StopForward

    with replace_forward(blocks[0], forward), contextlib.suppress(StopForward):
        model(input_ids=ids, use_cache=False)
    if not seen:
        raise UnsupportedModelError(f"{type(model).__name__}: its forward never calls its first decoder block")
    return seen[0]


def record_calls(model: nn.Module, blocks: nn.ModuleList, ids: Tensor, form: OutputForm, perturb: float = 0.0) -> list[BlockCall]:
    """The call of every block for token ids [B, T]. Blocks do not run: each returns its input plus ``perturb``.

    Raises UnsupportedModelError where anything but the hidden states passes from one block to the next.
    """
    calls: list[BlockCall] = []
    handed_on: list[Tensor] = []

    def patched(i: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, call = _split(args, kwargs)
            if i != len(calls):
                raise UnsupportedModelError(f"decoder blocks are called out of order or more than once (block {i})")
            if handed_on and hidden is not handed_on[-1]:
                raise UnsupportedModelError(
                    f"the input of block {i} is not the output of block {i - 1}; this architecture is not supported"
                )
            if any(isinstance(leaf, _Sentinel) for leaf in _leaves((call.args, call.kwargs))):
                raise UnsupportedModelError(f"block {i} receives an extra output of an earlier block; this architecture is not supported")
            calls.append(call)
            if i == len(blocks) - 1:
                raise StopForward
            handed_on.append(hidden + perturb)
            return form.wrap(handed_on[-1])

        return forward

    with replace_forwards(list(blocks), patched), contextlib.suppress(StopForward):
        model(input_ids=ids, use_cache=False)
    if len(calls) != len(blocks):
        raise UnsupportedModelError(f"only {len(calls)} of {len(blocks)} decoder blocks are called; this architecture is not supported")
    return calls


def check_block_calls(model: nn.Module, blocks: nn.ModuleList, ids: Tensor, form: OutputForm) -> None:
    """Check that the blocks' arguments depend only on the shape of the batch.

    ids: two different probes of one shape, [2, B, T]. Raises UnsupportedModelError.
    """
    one = record_calls(model, blocks, ids[0], form)
    other = record_calls(model, blocks, ids[1], form, perturb=1.0)
    for i, (a, b) in enumerate(zip(one, other, strict=True)):
        if not _same((a.args, a.kwargs), (b.args, b.kwargs)):
            raise UnsupportedModelError(f"the arguments of block {i} depend on the tokens; this architecture is not supported")


@contextlib.contextmanager
def replace_forwards(modules: Sequence[nn.Module], make: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
    """Replace the forward of several module instances; ``make(i)`` returns that of the i-th."""
    with contextlib.ExitStack() as stack:
        for i, module in enumerate(modules):
            stack.enter_context(replace_forward(module, make(i)))
        yield


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, BlockCall]:
    if args:
        return args[0], BlockCall(args[1:], kwargs)
    rest = dict(kwargs)
    return rest.pop("hidden_states"), BlockCall((), rest)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _same(a: Any, b: Any) -> bool:
    one, other = list(_leaves(a)), list(_leaves(b))
    return len(one) == len(other) and all(
        torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else type(x) is type(y)
        for x, y in zip(one, other, strict=True)
    )
