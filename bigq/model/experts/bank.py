"""Banks of experts: modules that hold the weights of many experts, of which every token runs a few.

A bank is found by shape and by one call, not by a table of families: its own parameters have the experts as their first dimension, at
least two of them are 3-D, and it is called in one of the ways of ``experts.call``. One expert is computed by the family's own forward,
given an object that holds that expert's parameters only. What it adds to the output is seen where the forward adds it. ``find_bank``
proves on a probe that what all experts return has the bits of the module's own output.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bigq.errors import UnsupportedModelError
from bigq.model.experts.call import BankCall
from bigq.model.experts.spare import spare_experts

#: Functions that multiply a matrix of tokens by a weight stored as [outputs, inputs], and by one stored as [inputs, outputs].
#: What the input of a product becomes.
Rounding = Callable[[Tensor], Tensor]

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
    """A bank of a block. name: of the module in the block. experts: how many. spare: those without weights, with the numbers behind.

    products: in the order in which an expert computes them. parameters: all that an expert has a part of, biases included.
    counts, totals: attributes of the module that hold the number of experts, without and with spare ones. total: the dtype in which outputs
    of experts are added.
    by_slot: whether an expert takes its tokens in the order of their position among each token's experts; otherwise by token. A product's
    bits may depend on where in its input a token is. idle: whether a token needs a second expert, since the bank runs with two at least:
    then a spare one with the weight 0.
    """

    name: str
    experts: int
    products: tuple[Product, ...]
    parameters: tuple[str, ...]
    counts: tuple[str, ...]
    total: torch.dtype
    by_slot: bool = False
    spare: int = 0
    totals: tuple[str, ...] = ()
    idle: bool = False

    @property
    def every(self) -> int:
        """The numbers that tokens may be routed to."""
        return self.experts + self.spare

    def sizes(self, experts: int, spare: int) -> dict[str, int]:
        """The attributes of a bank with so many experts."""
        return {**dict.fromkeys(self.totals, experts + spare), **dict.fromkeys(self.counts, experts)}


def reading_products(bank: Bank) -> tuple[Product, ...]:
    """The products that multiply what the bank receives: all but the last one, which multiplies what the others return."""
    return bank.products[: max(1, len(bank.products) - 1)]


class Expert:
    """One expert of a bank, on any device. parameters: its slices, without the dimension of the experts; they can be replaced. Without
    any, a spare expert. rounded: what the inputs of products become, fp32; products are computed in fp32 then.

    What products return is kept for the next call with the same tensor of tokens, so that each product is computed once.
    """

    def __init__(
        self, module: nn.Module, bank: Bank, call: BankCall, parameters: Mapping[str, Tensor], rounded: Rounding | None = None
    ) -> None:
        self._call, self._idle, self._rounded = call, bank.idle, rounded
        self._held = {name: nn.Parameter(value[None], requires_grad=False) for name, value in parameters.items()}
        # The family's forward sees an object of its own class, with a bank of one expert.
        self._module: nn.Module = object.__new__(type(module))
        self._module.__dict__.update(module.__dict__)
        self._module.__dict__["_parameters"] = self._held or dict.fromkeys(bank.parameters)
        self._module.__dict__.update(bank.sizes(1, int(bank.idle)) if parameters else bank.sizes(0, 1 + bank.idle))
        self._kept: tuple[Tensor, dict[str, _Result]] | None = None

    def weight(self, product: Product) -> Tensor:
        """The weight of a product, [outputs, inputs]: a view of the expert's parameter, to be changed before the next call at most."""
        if self._kept is not None and product.parameter in self._kept[1]:
            self._kept = None
        value = self._held[product.parameter][0]
        return value.T if product.transposed else value

    def run(self, tokens: Tensor, weights: Tensor) -> Tensor:
        """What the expert adds to the output for tokens [t, d] that it has weights [t] for: [t, d], in the dtype of the sum."""
        output = self._watch(tokens, weights).output(sums=self._call.sums, idle=self._idle)
        self._kept = None
        return output

    def input_of(self, product: Product, tokens: Tensor) -> Tensor:
        """The input of a product for tokens [t, d]: [t, inputs], which do not change. What comes after the product does not run."""
        seen = self._watch(tokens, torch.ones(len(tokens), dtype=tokens.dtype, device=tokens.device), stop=product.parameter)
        self._kept = (tokens, seen.results)
        return seen.inputs[product.parameter].reshape(len(tokens), -1)

    def products(self, tokens: Tensor, weights: Tensor) -> tuple[tuple[Product, ...], torch.dtype]:
        """The expert's products in their order, and the dtype in which its output is added.

        Raises UnsupportedModelError if an input of a product depends on the weights.
        """
        seen = self._watch(tokens, weights)
        others = self._watch(tokens, weights + 1)
        if any(not torch.equal(x, others.inputs[name]) for name, x in seen.inputs.items()):
            raise UnsupportedModelError("what its matrices multiply depends on the weights of the experts")
        output = seen.output(sums=self._call.sums, idle=self._idle)
        return tuple(Product(name, name in seen.transposed) for name in seen.inputs), output.dtype

    def _watch(self, tokens: Tensor, weights: Tensor, stop: str | None = None) -> _Watch:
        if self._kept is not None and self._kept[0] is not tokens:
            self._kept = None  # before more memory is needed
        known = self._kept[1] if self._kept is not None else {}
        watch = _Watch(self._held, stop, {name: result.value for name, result in known.items() if result.unchanged}, self._rounded)
        try:
            with watch:
                watch.returned = self._call.run_one(self._module.forward, tokens, weights, idle=self._idle)
        except _Reached:
            pass
        return watch


@dataclass(frozen=True, slots=True)
class _Result:
    """What a product returned. version: of the tensor then; a later one shows that it was overwritten."""

    value: Tensor
    version: int

    @property
    def unchanged(self) -> bool:
        return self.value._version == self.version


class _Reached(Exception):
    """Ends a forward at the product that was asked for."""


class _Watch(TorchFunctionMode):
    """Sees the products that parameters take part in, and what is added to the output.

    inputs: of each product, by parameter, in order. transposed: parameters stored as [inputs, outputs]. stop: end before its product.
    known: results of products that are not computed again. results: those of all products that were reached. returned: what the forward
    returned. rounded: see ``Expert``.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], stop: str | None, known: Mapping[str, Tensor], rounded: Rounding | None = None
    ) -> None:
        super().__init__()
        self._known, self._rounded = known, rounded
        self._names = {p.untyped_storage().data_ptr(): name for name, p in parameters.items() if p.ndim > 2}
        self._stop = stop
        self._added: list[Tensor] = []
        self.inputs: dict[str, Tensor] = {}
        self.transposed: set[str] = set()
        self.results: dict[str, _Result] = {}
        self.returned: Any = None

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _LINEAR or func in _PRODUCTS:
            name = self._see_product(func, [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)])
            if name is None:
                return func(*args, **kwargs)
            if name in self._known:
                result = self._known[name]
            elif self._rounded is not None:
                result = self._of_rounded(self._rounded, self.inputs[name], func, args, kwargs)
            else:
                result = func(*args, **kwargs)
            self.results[name] = _Result(result, result._version)
            return result
        if func in _ADDITIONS:
            self._added.append(kwargs["source"] if "source" in kwargs else args[3])
        return func(*args, **kwargs)

    @staticmethod
    def _of_rounded(rounded: Rounding, x: Tensor, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """A product with another input than x, in fp32; returned in x's dtype."""

        def wide(given: Any) -> Any:
            return rounded(x) if given is x else given.float() if isinstance(given, Tensor) else given

        result: Tensor = func(*map(wide, args), **{key: wide(value) for key, value in kwargs.items()})
        return result.to(x.dtype)

    def _see_product(self, func: Any, operands: list[Tensor]) -> str | None:
        """The parameter that takes part, if one does."""
        for weight in operands:
            name = self._names.get(weight.untyped_storage().data_ptr())
            if name is None:
                continue
            if name in self.inputs:
                raise UnsupportedModelError(f"an expert multiplies by {name} more than once")
            # The last operand that is not the weight: addmm has the summand first, linear the bias last but one of the weight's size.
            others = [x for x in operands if x is not weight and x.ndim >= 2]
            self.inputs[name] = others[-1]
            if func in _PRODUCTS and weight.stride(-1) == 1:  # else it is a transpose of what is stored
                self.transposed.add(name)
            if name == self._stop:
                raise _Reached
            return name
        return None

    def output(self, *, sums: bool, idle: bool) -> Tensor:
        """What was added to the output, if the bank ``sums``; else what it returned. idle: whether a spare expert behind adds 0.

        Raises UnsupportedModelError unless there is one such tensor.
        """
        if not sums:
            if isinstance(self.returned, Tensor) and not self._added:
                return self.returned
            raise UnsupportedModelError("an expert returns something else than its outputs")
        if len(self._added) != 1 + idle:
            raise UnsupportedModelError(f"an expert adds to the output {len(self._added)} times instead of once")
        return self._added[0]


def bank_modules(block: nn.Module) -> dict[str, nn.Module]:
    """Modules of a block that have the shape of a bank, by name: their own parameters agree in the first dimension, and two are 3-D; or one
    is, of a class of experts that takes tokens and how many each expert has.

    A convolution has one such parameter. A Mamba layer with several heads may have two; but it needs one argument, not three, and its
    class does not say that it is of experts. Shared experts, which every token runs, need two.
    """
    found = {}
    for name, module in block.named_modules():
        own = list(module.parameters(recurse=False))
        alike = len({p.shape[0] for p in own if p.ndim}) == 1 and all(p.ndim >= 2 for p in own)
        if alike and _may_be_called_so(name, module, sum(p.ndim == 3 for p in own)):
            found[name] = module
    return found


def _may_be_called_so(name: str, module: nn.Module, matrices: int) -> bool:
    """Whether a module with so many 3-D parameters may be called as a bank: its forward needs three arguments; or one at most, or with a
    single matrix two, while its names say that it is of experts."""
    if not matrices:
        return False
    given = list(inspect.signature(type(module).forward).parameters.values())[1:]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [parameter for parameter in given if parameter.kind in kinds and parameter.default is inspect.Parameter.empty]
    named = "expert" in f"{name} {type(module).__name__}".lower()
    if matrices == 1:
        return len(needed) == 2 and named
    return len(needed) == 3 or (len(needed) < 2 and named)


def find_bank(name: str, module: nn.Module, call: BankCall, output: Tensor) -> Bank:
    """What one call of a bank shows, with the output that it returned. name: of the module, for the result and for messages.

    Raises UnsupportedModelError, with the reason, if an expert cannot be computed by itself or the sum of all has other bits.
    """
    parameters = dict(module.named_parameters(recurse=False))
    experts = next(iter(parameters.values())).shape[0]
    by_slot, reason, routing = _takes_by_slot(module, call), "", call.routing(call.slots())
    spare = spare_experts(module), total_attributes(module, experts)
    for counts, idle in itertools.product(count_attributes(module, experts), (False, True) if spare[0] else (False,)):
        bank = Bank(name, experts, (), tuple(parameters), counts, output.dtype, by_slot, *spare, idle)
        try:
            one = Expert(module, bank, call, {key: p[0] for key, p in parameters.items()})
            products, total = one.products(routing.inputs[:2], routing.weights[:2, 0])
            bank = Bank(name, experts, products, tuple(parameters), counts, total, by_slot, *spare, idle)
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
    """A bank's output, expert by expert in ascending order."""
    routing, count = call.routing(call.slots()), call.count
    inputs, per_token = routing.inputs, len(routing.inputs) // count
    total = torch.zeros(len(inputs), call.returned, dtype=bank.total, device=inputs.device)
    for e, at, slots in routed(routing.experts, bank.every, by_slot=bank.by_slot):
        if len(at):
            own = bank.parameters if e < bank.experts else ()
            expert = Expert(module, bank, call, {key: getattr(module, key)[e] for key in own})
            tokens, places = call.together(inputs[at], at // per_token, count)
            output = expert.run(tokens, routing.weights[at, slots])
            total.index_add_(0, at, output if places is None else output[places])
    return call.output(total, routing.experts, count)


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
        call.run(module.forward)
    return any(bool((index[1:] < index[:-1]).any()) for index in order.indices)


def count_attributes(module: nn.Module, experts: int) -> Iterator[tuple[str, ...]]:
    """Sets of attributes to set to 1 for a bank of one expert, the likely ones first. With none, a forward looks for all experts."""
    equal = [key for key, value in vars(module).items() if type(value) is int and value == experts]
    named = tuple(key for key in equal if "expert" in key)
    yield named
    for more in (tuple(equal), ()):
        if more != named:
            yield more


def total_attributes(module: nn.Module, experts: int) -> tuple[str, ...]:
    """Attributes that hold the number of a bank's experts with its spare ones, if it has such."""
    spare = spare_experts(module)
    total = experts + spare
    return tuple(key for key, value in vars(module).items() if spare and type(value) is int and value == total and "expert" in key)
