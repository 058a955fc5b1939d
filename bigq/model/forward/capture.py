"""Captures the input of block 0 and the arguments of every block from a model's own forward.

The caller provides a block's hidden states. The other arguments (masks, rotary tables, ALiBi) are recorded once per batch size and
reused, since calibration rows have one length and no padding; for those that have a value for every row see ``block_call``.
``checks`` tests by running the model that this is valid.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from bigq.errors import BigqError, UnsupportedModelError
from bigq.io.json_file import show_name
from bigq.machine.device import out_of_memory
from bigq.model.architecture import is_composite
from bigq.model.description import replace_forward
from bigq.model.forward.block_call import BlockCall, HandedOn, OutputForm, with_handed_on


class StopForward(Exception):
    """Raised in a replaced forward to end the model's forward early."""


def on_its_input(model: nn.Module) -> str:
    """Where the first forward of a model fails, for ``forward_errors``: composite models may need more than text."""
    return "on text alone, without images or audio" if is_composite(model.config) else "with this config.json"


@contextlib.contextmanager
def forward_errors(where: str = "with this config.json") -> Iterator[None]:
    """Turn what a model's own forward raises into an UnsupportedModelError. BigqError and out-of-memory errors pass unchanged.

    For the first forward: a config that a model can be built from may still make its forward fail, with any exception.
    where: a part of the message.
    """
    try:
        yield
    except (BigqError, MemoryError):
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        said = f"{type(error).__name__}: {show_name(' '.join(str(error).split())[:300])}"
        if re.search(r"(?<![a-z])meta(?![a-z])", str(error)):
            raise UnsupportedModelError(
                "the model's own forward depends on weights or values that are not there when blocks are looked at one by one "
                f"({said}); this architecture is not supported"
            ) from error
        raise UnsupportedModelError(f"the model's own forward fails {where}: {said}") from error


def first_input(model: nn.Module, blocks: nn.ModuleList, ids: Tensor) -> tuple[Tensor, BlockCall]:
    """The arguments of block 0 for token ids [B, T]: hidden states [B, T, d] and the others. Raises UnsupportedModelError."""
    seen: list[tuple[Tensor, BlockCall]] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        seen.append(split_call(args, kwargs))
        raise StopForward

    with replace_forward(blocks[0], forward), contextlib.suppress(StopForward):
        model(input_ids=ids, use_cache=False)
    if not seen:
        raise UnsupportedModelError(f"{type(model).__name__}: its forward never calls its first decoder block")
    _require_vectors(seen[0][0], ids)
    return seen[0]


def _require_vectors(hidden: Tensor, ids: Tensor) -> None:
    """Raise UnsupportedModelError unless the hidden states for token ids [B, T] are one or several vectors a token."""
    if hidden.ndim < 3 or hidden.shape[:2] != ids.shape:
        raise UnsupportedModelError(
            f"block 0 receives hidden states {list(hidden.shape)} for {ids.shape[0]} x {ids.shape[1]} tokens, not vectors for each token "
            "(such as a prompt that the model adds, or another order of dimensions); this architecture is not supported"
        )


def as_it_is(hidden: Tensor) -> Tensor:
    """Hidden states in the same memory as another tensor object, so that a block's input and its output cannot be mixed up."""
    return hidden.view_as(hidden)


def record_calls(
    model: nn.Module, blocks: nn.ModuleList, ids: Tensor, form: OutputForm, returned: Callable[[Tensor], Tensor] = as_it_is
) -> list[BlockCall]:
    """The call of every block for token ids [B, T]. Blocks do not run: each returns ``returned`` of its hidden states.

    What a block takes of the extra outputs of the one before is a placeholder. The forward ends at the output head, so that everything
    that happens before it is seen. Raises UnsupportedModelError where a block is not called exactly once and in order, or where anything
    but unchanged hidden states and extra outputs passes from one block to the next.
    """
    recorder = _Recorder(len(blocks), form, returned)
    with replace_forwards([*blocks, output_head(model)], recorder.forward), contextlib.suppress(StopForward):
        model(input_ids=ids, use_cache=False)
    recorder.end()
    return with_handed_on(recorder.calls)


class _Recorder:
    """Stands in for the blocks and the output head of a model during one forward. calls: of the blocks so far."""

    def __init__(self, count: int, form: OutputForm, returned: Callable[[Tensor], Tensor]) -> None:
        self._count, self._form, self._returned = count, form, returned
        self.calls: list[BlockCall] = []
        self._handed_on: Tensor | None = None
        self._version = 0

    def forward(self, i: int) -> Callable[..., Any]:
        """The forward that replaces that of block i, or of the output head for i = the number of blocks."""
        if i == self._count:
            return self._at_head
        return lambda *args, **kwargs: self._at_block(i, *split_call(args, kwargs))

    def _at_block(self, i: int, hidden: Tensor, call: BlockCall) -> Any:
        done = len(self.calls)
        if i < done:
            after = "itself" if i == done - 1 else f"block {done - 1}"
            raise UnsupportedModelError(
                f"block {i} is called again after {after}: the model runs blocks more than once (a looped model), "
                "and bigq runs each block once; this architecture is not supported"
            )
        if i > done:
            raise UnsupportedModelError(
                f"decoder blocks are called out of order: block {i} "
                + (f"comes after block {done - 1}" if done else "comes first")
                + "; this architecture is not supported"
            )
        if self._handed_on is not None:
            if hidden is not self._handed_on:
                raise UnsupportedModelError(
                    f"the input of block {i} is not the output of block {i - 1}: the model changes or replaces the hidden states between "
                    "its blocks; this architecture is not supported"
                )
            self._require_unchanged(f"block {i}")
        if any(isinstance(leaf, HandedOn) and leaf.block != i - 1 for leaf in call.leaves()):
            raise UnsupportedModelError(
                f"block {i} receives an extra output of an earlier block than the one before; this architecture is not supported"
            )
        self.calls.append(call)
        self._handed_on = self._returned(hidden)
        self._version = self._handed_on._version
        return self._form.wrap(self._handed_on, i)

    def _require_unchanged(self, where: str) -> None:
        assert self._handed_on is not None
        if self._handed_on._version != self._version:
            raise UnsupportedModelError(
                f"the output of block {len(self.calls) - 1} is changed in place before {where}; this architecture is not supported"
            )

    def _at_head(self, *_: Any, **__: Any) -> Any:
        self.end(" before its output head")
        raise StopForward

    def end(self, where: str = "") -> None:
        """Check that all blocks have been called."""
        if len(self.calls) != self._count:
            raise UnsupportedModelError(
                f"only {len(self.calls)} of {self._count} decoder blocks are called{where}; this architecture is not supported"
            )


def output_head(model: nn.Module) -> nn.Module:
    """The model's output head. Raises UnsupportedModelError if it has none."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(head, nn.Module):
        raise UnsupportedModelError(f"{type(model).__name__}: has no output head")
    return head


@contextlib.contextmanager
def replace_forwards(modules: Sequence[nn.Module], make: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
    """Replace the forward of several module instances; ``make(i)`` returns that of the i-th."""
    with contextlib.ExitStack() as stack:
        for i, module in enumerate(modules):
            stack.enter_context(replace_forward(module, make(i)))
        yield


def split_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, BlockCall]:
    """A block's arguments as its hidden states and the others. Raises UnsupportedModelError where it is not clear which they are."""
    if args:
        hidden, call = args[0], BlockCall(args[1:], kwargs)
    else:
        rest = dict(kwargs)
        hidden, call = rest.pop("hidden_states", None), BlockCall((), rest)
    if not isinstance(hidden, Tensor):
        given = ", ".join(kwargs) or "nothing"
        raise UnsupportedModelError(
            f"decoder blocks do not take hidden states first (they take {given}); this architecture is not supported"
        )
    return hidden, call
