"""Banks of experts: modules that hold the weights of many experts, of which every token runs a few.

A bank is found by shape and by one call, not by a table of families: its own parameters have the experts as their first dimension, at
least two of them are 3-D, and it is called with the tokens, the experts of each token and their weights. One expert is computed by the
family's own forward, given an object that holds that expert's parameters only. What it adds to the output is seen where the forward adds
it. ``find_bank`` proves on a probe that the sum over all experts has the bits of the module's own output.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bigq.errors import UnsupportedModelError

#: Functions that multiply a matrix of tokens by a weight stored as [outputs, inputs], and by one stored as [inputs, outputs].
_LINEAR = frozenset({nn.functional.linear})
_PRODUCTS = frozenset(
    {torch.matmul, torch.mm, torch.bmm, torch.addmm, Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm, Tensor.addmm}
)
_ADDITIONS = frozenset({torch.index_add, Tensor.index_add, Tensor.index_add_})


@dataclass(frozen=True, slots=True)
class Product:
    """A product with one of a bank's parameters. transposed: the parameter is stored as [experts, inputs, outputs]."""

    parameter: str
    transposed: bool


@dataclass(frozen=True, slots=True)
class Bank:
    """A bank of a block. name: of the module in the block. experts: how many.

    products: in the order in which an expert computes them. parameters: all that an expert has a part of, biases included.
    counts: attributes of the module that hold the number of experts. total: the dtype in which outputs of experts are added.
    by_slot: whether an expert takes its tokens in the order of their position among each token's experts; otherwise by token. A product's
    bits may depend on where in its input a token is.
    """

    name: str
    experts: int
    products: tuple[Product, ...]
    parameters: tuple[str, ...]
    counts: tuple[str, ...]
    total: torch.dtype
    by_slot: bool = False


@dataclass(frozen=True, slots=True)
class BankCall:
    """The arguments of a bank. tokens: [T, d]. experts: of each token, int [T, k]. weights: theirs, [T, k].

    places: the position or the name of each of the three.
    """

    tokens: Tensor
    experts: Tensor
    weights: Tensor
    places: tuple[int | str, int | str, int | str]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> BankCall | None:
        """The call with these arguments; None if they are not one matrix of tokens and two of equal shape [T, k], one of integers."""
        given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        tensors = {place: x for place, x in given if isinstance(x, Tensor)}
        if len(tensors) != 3 or any(x is not None for place, x in given if place not in tensors):
            return None
        chosen = [place for place, x in tensors.items() if not x.is_floating_point()]
        if len(chosen) != 1:
            return None
        experts = tensors[chosen[0]]
        weights = [p for p, x in tensors.items() if x.is_floating_point() and x.shape == experts.shape]
        tokens = [p for p, x in tensors.items() if x.is_floating_point() and p not in weights]
        if experts.ndim != 2 or len(weights) != 1 or len(tokens) != 1 or tensors[tokens[0]].shape[:-1] != experts.shape[:1]:
            return None
        return cls(tensors[tokens[0]], experts, tensors[weights[0]], (tokens[0], chosen[0], weights[0]))

    def call(self, forward: Callable[..., Any], tokens: Tensor, experts: Tensor, weights: Tensor) -> Any:
        """Call a forward with other values in the same places."""
        given = dict(zip(self.places, (tokens, experts, weights), strict=True))
        positions = sorted(place for place in given if isinstance(place, int))
        return forward(*(given[i] for i in positions), **{k: v for k, v in given.items() if isinstance(k, str)})


class Expert:
    """One expert of a bank, on any device. parameters: its slices, without the dimension of the experts; they can be replaced."""

    def __init__(self, module: nn.Module, bank: Bank, call: BankCall, parameters: Mapping[str, Tensor]) -> None:
        self._call = call
        self._held = {name: nn.Parameter(value[None], requires_grad=False) for name, value in parameters.items()}
        # The family's forward sees an object of its own class, with a bank of one expert.
        self._module: nn.Module = object.__new__(type(module))
        self._module.__dict__.update(module.__dict__)
        self._module.__dict__["_parameters"] = self._held
        self._module.__dict__.update(dict.fromkeys(bank.counts, 1))

    def weight(self, product: Product) -> Tensor:
        """The weight of a product, [outputs, inputs]: a view of the expert's parameter."""
        value = self._held[product.parameter][0]
        return value.T if product.transposed else value

    def run(self, tokens: Tensor, weights: Tensor) -> Tensor:
        """What the expert adds to the output for tokens [t, d] that it has weights [t] for: [t, d], in the dtype of the sum."""
        return self._watch(tokens, weights).added()

    def input_of(self, product: Product, tokens: Tensor) -> Tensor:
        """The input of a product for tokens [t, d]: [t, inputs]. What comes after the product does not run."""
        seen = self._watch(tokens, torch.ones(len(tokens), dtype=tokens.dtype, device=tokens.device), stop=product.parameter)
        return seen.inputs[product.parameter].reshape(len(tokens), -1)

    def products(self, tokens: Tensor, weights: Tensor) -> tuple[tuple[Product, ...], torch.dtype]:
        """The expert's products in their order, and the dtype in which its output is added."""
        seen = self._watch(tokens, weights)
        return tuple(Product(name, name in seen.transposed) for name in seen.inputs), seen.added().dtype

    def _watch(self, tokens: Tensor, weights: Tensor, stop: str | None = None) -> _Watch:
        watch = _Watch(self._held, stop)
        experts = torch.zeros(len(tokens), 1, dtype=self._call.experts.dtype, device=tokens.device)
        try:
            with watch:
                self._call.call(self._module.forward, tokens, experts, weights[:, None].to(self._call.weights.dtype))
        except _Reached:
            pass
        return watch


class _Reached(Exception):
    """Ends a forward at the product that was asked for."""


class _Watch(TorchFunctionMode):
    """Sees the products that parameters take part in, and what is added to the output.

    inputs: of each product, by parameter, in order. transposed: parameters stored as [inputs, outputs]. stop: end before its product.
    """

    def __init__(self, parameters: Mapping[str, Tensor], stop: str | None) -> None:
        super().__init__()
        self._names = {p.untyped_storage().data_ptr(): name for name, p in parameters.items() if p.ndim > 2}
        self._stop = stop
        self._added: list[Tensor] = []
        self.inputs: dict[str, Tensor] = {}
        self.transposed: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _LINEAR or func in _PRODUCTS:
            self._see_product(func, [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)])
        elif func in _ADDITIONS:
            self._added.append(kwargs["source"] if "source" in kwargs else args[3])
        return func(*args, **kwargs)

    def _see_product(self, func: Any, operands: list[Tensor]) -> None:
        for weight in operands:
            name = self._names.get(weight.untyped_storage().data_ptr())
            if name is None:
                continue
            if name in self.inputs:
                raise UnsupportedModelError(f"an expert multiplies by {name} more than once")
            # The last operand that is not the weight: addmm has the summand first, linear the bias last but one of the weight's size.
            others = [x for x in operands if x is not weight and x.ndim >= 2]
            self.inputs[name] = others[-1]
            if func in _PRODUCTS:
                self.transposed.add(name)
            if name == self._stop:
                raise _Reached
            return

    def added(self) -> Tensor:
        """What was added to the output. Raises UnsupportedModelError unless that happened once."""
        if len(self._added) != 1:
            raise UnsupportedModelError(f"an expert adds to the output {len(self._added)} times instead of once")
        return self._added[0]


def bank_modules(block: nn.Module) -> dict[str, nn.Module]:
    """Modules of a block that have the shape of a bank, by name: their own parameters agree in the first dimension, and two are 3-D.

    A convolution has one such parameter. A Mamba layer with several heads may have two; but it needs one argument, not three, and its
    class does not say that it is of experts.
    """
    found = {}
    for name, module in block.named_modules():
        own = list(module.parameters(recurse=False))
        alike = len({p.shape[0] for p in own if p.ndim}) == 1 and all(p.ndim >= 2 for p in own)
        if alike and sum(p.ndim == 3 for p in own) > 1 and _may_be_called_so(name, module):
            found[name] = module
    return found


def _may_be_called_so(name: str, module: nn.Module) -> bool:
    """Whether a module's forward needs three arguments, or its names say that it is of experts."""
    given = list(inspect.signature(type(module).forward).parameters.values())[1:]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [parameter for parameter in given if parameter.kind in kinds and parameter.default is inspect.Parameter.empty]
    return len(needed) == 3 or "expert" in f"{name} {type(module).__name__}".lower()


def find_bank(name: str, module: nn.Module, call: BankCall, output: Tensor) -> Bank:
    """What one call of a bank shows, with the output that it returned. name: of the module, for the result and for messages.

    Raises UnsupportedModelError, with the reason, if an expert cannot be computed by itself or the sum of all has other bits.
    """
    parameters = dict(module.named_parameters(recurse=False))
    experts = next(iter(parameters.values())).shape[0]
    by_slot, reason = _takes_by_slot(module, call), ""
    for counts in count_attributes(module, experts):
        bank = Bank(name, experts, (), tuple(parameters), counts, output.dtype, by_slot)
        try:
            one = Expert(module, bank, call, {key: p[0] for key, p in parameters.items()})
            products, total = one.products(call.tokens[:2], call.weights[:2, 0])
            bank = Bank(name, experts, products, tuple(parameters), counts, total, by_slot)
            if {p.parameter for p in products} != {key for key, p in parameters.items() if p.ndim == 3}:
                reason = "an expert does not multiply by each of its matrices"
            elif torch.equal(run_bank(module, bank, call), output):
                return bank
            else:
                reason = "the sum over single experts has other bits than its own output"
        except UnsupportedModelError as error:
            reason = str(error)
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            reason = f"one expert by itself fails: {type(error).__name__}: {error}"
    raise UnsupportedModelError(f"{name}: a bank of {experts} experts that cannot be run expert by expert: {reason}")


def run_bank(module: nn.Module, bank: Bank, call: BankCall) -> Tensor:
    """A bank's output [T, d], expert by expert in ascending order."""
    total = torch.zeros(call.tokens.shape, dtype=bank.total, device=call.tokens.device)
    for e, tokens, slots in routed(call.experts, bank.experts, by_slot=bank.by_slot):
        if len(tokens):
            expert = Expert(module, bank, call, {key: getattr(module, key)[e] for key in bank.parameters})
            total.index_add_(0, tokens, expert.run(call.tokens[tokens], call.weights[tokens, slots]))
    return total.to(call.tokens.dtype)


def routed(experts: Tensor, count: int, *, by_slot: bool = False) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For every expert in order: (its number, its tokens, the position of the expert among each token's).

    experts: int [T, k], below ``count``; larger numbers stand for no expert. Tokens are in ascending order, with ``by_slot`` for each
    position anew. One sort for all experts.
    """
    flat = (experts.T if by_slot else experts).reshape(-1)
    order = flat.argsort(stable=True)
    ends = torch.searchsorted(flat[order].contiguous(), torch.arange(count + 1, device=flat.device, dtype=flat.dtype)).tolist()
    tokens, k = experts.shape
    for e in range(count):
        at = order[ends[e] : ends[e + 1]]
        yield (e, at % tokens, at // tokens) if by_slot else (e, at // k, at % k)


class _Order(TorchFunctionMode):
    """Sees in which order a bank adds tokens to its output."""

    def __init__(self) -> None:
        super().__init__()
        self.indices: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _ADDITIONS:
            self.indices.append(kwargs["index"] if "index" in kwargs else args[2])
        return func(*args, **kwargs)


def _takes_by_slot(module: nn.Module, call: BankCall) -> bool:
    """Whether some expert of a bank takes its tokens in another than ascending order."""
    order = _Order()
    with order:
        call.call(module.forward, call.tokens, call.experts, call.weights)
    return any(bool((index[1:] < index[:-1]).any()) for index in order.indices)


def count_attributes(module: nn.Module, experts: int) -> Iterator[tuple[str, ...]]:
    """Sets of attributes to set to 1 for a bank of one expert, the likely ones first. With none, a forward looks for all experts."""
    equal = [key for key, value in vars(module).items() if type(value) is int and value == experts]
    named = tuple(key for key in equal if "expert" in key)
    yield named
    for more in (tuple(equal), ()):
        if more != named:
            yield more
