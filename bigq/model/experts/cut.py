"""Cutting a block at its banks: they return what the caller gives instead of running.

While a block's structure is searched, a bank must not run: marks in the hidden states would reach the router and change which experts run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bigq.errors import UnsupportedModelError
from bigq.model.experts.bank import bank_modules
from bigq.model.experts.call import BankCall, bank_call
from bigq.model.forward.capture import replace_forwards


@contextlib.contextmanager
def banks_replaced(block: nn.Module, returns: Callable[[str, BankCall], Tensor]) -> Iterator[None]:
    """Let every bank of a block return ``returns(its name, its call)`` while the context is open.

    Raises UnsupportedModelError where a module that has the shape of a bank is called in another way.
    """
    banks = bank_modules(block)
    names = list(banks)

    def make(i: int) -> Callable[..., Any]:
        name = names[i]
        shape = next(iter(banks[name].parameters(recurse=False))).shape

        def forward(*args: Any, **kwargs: Any) -> Any:
            call = bank_call(args, kwargs, shape)
            if call is None:
                raise UnsupportedModelError(
                    f"{name}: a bank of experts that is not called with tokens, the experts of each token, and their weights, nor with "
                    "the tokens of all experts, nor with how many each has; this architecture is not supported yet"
                )
            return returns(name, call)

        return forward

    sorting = any(len(list(bank.parameters(recurse=False))) == 1 for bank in banks.values())
    with replace_forwards([banks[name] for name in names], make), _UnknownNumbers() if sorting else contextlib.nullcontext():
        yield


class _UnknownNumbers(TorchFunctionMode):
    """Lets tensors of whole numbers on meta become lists of zeros, for models that need such lists where nothing depends on them: the sizes
    of what a bank of experts receives, while it returns what it is given."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func is torch.Tensor.tolist and args[0].is_meta and args[0].ndim == 1 and not args[0].is_floating_point():
            return [0] * len(args[0])
        return func(*args, **(kwargs or {}))


def without_banks(block: nn.Module) -> AbstractContextManager[None]:
    """Let the banks of a block return 0 while the context is open: their weights need not be there."""
    return banks_replaced(block, lambda _, call: call.zeros)


def called_banks(block: nn.Module, run: Callable[[], Any]) -> Mapping[str, BankCall]:
    """The banks that ``run`` calls, with their calls. Their output is 0. A bank that is called twice counts by its last call."""
    found: dict[str, BankCall] = {}

    def see(name: str, call: BankCall) -> Tensor:
        found[name] = call
        return call.zeros

    with banks_replaced(block, see):
        run()
    return found


class _Choices(TorchFunctionMode):
    """Sees of how many values the largest are chosen, and how many. k: by the number of values."""

    def __init__(self) -> None:
        super().__init__()
        self.k: dict[int, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func in (torch.topk, Tensor.topk):
            self.k[args[0].shape[-1]] = found[1].shape[-1]
        return found


class MarkedChoices(TorchFunctionMode):
    """Sees whether the values of which the largest are chosen have a mark. is_marked: whether a tensor has it."""

    def __init__(self, is_marked: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self._is_marked = is_marked
        self._last: dict[int, bool] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func in (torch.topk, Tensor.topk):
            self._last[args[0].shape[-1]] = self._is_marked(args[0])
        return func(*args, **(kwargs or {}))

    def marked(self, values: int) -> bool:
        """Whether the last choice among so many values was a marked one."""
        return self._last.get(values, False)


def chosen_experts(block: nn.Module, run: Callable[[], Any]) -> Mapping[str, tuple[int, int]]:
    """How many experts a token has in each of the banks that ``run`` calls, and how many inputs these have of it.

    Values are not looked at, so the block may be on meta. Where the call does not tell, it is what the block chooses of as many values as
    there are experts; without such a choice, all.
    """
    with _Choices() as choices:
        calls = called_banks(block, run)
    found = {}
    for name, call in calls.items():
        count = call.slots() if call.sums else choices.k.get(call.choices, call.choices)
        found[name] = (count, 1 if call.sums else count)
    return found
