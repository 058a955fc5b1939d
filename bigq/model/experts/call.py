"""The ways in which blocks call a bank of experts, told apart by the arguments of one call.

- Routed: the tokens, the experts of each token, and their weights. The bank adds up what the experts return.
- Dense: one matrix that holds all tokens once for every expert, 0 where an expert is not chosen. The weights are in it already, and the
  block adds up what the bank returns for each expert. An expert without biases returns 0 for 0, so only the other rows need it.
- Sorted: a matrix that holds a token once for each of its experts, in the order of the experts, and how many tokens each expert has. The
  block does the rest. Such a bank has one matrix an expert.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bigq.errors import UnsupportedModelError


@dataclass(frozen=True, slots=True)
class Routing:
    """What the experts of a bank are to compute. inputs: [N, d]. experts: of each input, int [N, k]; a number that no expert has stands
    for none. weights: theirs, [N, k]."""

    inputs: Tensor
    experts: Tensor
    weights: Tensor


class BankCall(ABC):
    """The arguments of a bank. tokens: what the experts compute with. copies: how often a token of the block is in it."""

    tokens: Tensor
    copies: int

    @property
    @abstractmethod
    def choice(self) -> Tensor | None:
        """The weights of the chosen experts, if they are an argument of their own."""

    @property
    def zeros(self) -> Tensor:
        """0 in the shape of the bank's output."""
        return torch.zeros_like(self.tokens)

    @property
    def returned(self) -> int:
        """The features of what the bank returns for a token."""
        return self.tokens.shape[-1]

    @property
    def count(self) -> int:
        """The tokens that it is called with."""
        return len(self.tokens) // self.copies

    @property
    def repeats(self) -> bool:
        """Whether a token of the block is one of these for each of its experts."""
        return False

    @property
    def choices(self) -> int:
        """The number of experts of which some are chosen for each token, if the call itself does not tell how many."""
        return self.copies

    @property
    @abstractmethod
    def sums(self) -> bool:
        """Whether the bank adds up the outputs of a token's experts."""

    @abstractmethod
    def slots(self) -> int:
        """The experts of a token, at most."""

    @abstractmethod
    def routing(self, slots: int) -> Routing:
        """The inputs of experts. slots: the experts of a token, at most."""

    @abstractmethod
    def run(self, forward: Callable[..., Any]) -> Any:
        """Call a bank's forward with these arguments."""

    @abstractmethod
    def run_one(self, forward: Callable[..., Any], tokens: Tensor, weights: Tensor, *, idle: bool = False) -> Any:
        """Call the forward of a bank of one expert with tokens [t, d] that it has weights [t] for. idle: with a second one of weight 0."""

    @abstractmethod
    def together(self, inputs: Tensor, at: Tensor, count: int) -> tuple[Tensor, Tensor | None]:
        """What the model gives an expert at once for its inputs [t, d], and where they are in it; None if it is the inputs alone.

        at: the tokens of the block that they belong to, of ``count``. A product's bits may depend on where in its input a token is.
        """

    @abstractmethod
    def output(self, results: Tensor, experts: Tensor, count: int) -> Tensor:
        """A bank's output for ``count`` tokens of the block. results: the sums of what experts returned for each input of ``routing``.
        experts: of each of these inputs."""

    @abstractmethod
    def chosen_anew(self, experts: Tensor, count: int) -> BankCall:
        """The call of a smaller bank. experts: of each token, int [T, k], below ``count``; k is at most ``slots``."""

    @abstractmethod
    def shortened(self) -> BankCall:
        """The call with one token: its kinds of arguments."""


@dataclass(frozen=True, slots=True)
class RoutedCall(BankCall):
    """tokens: [T, d]. experts: of each token, int [T, k]. weights: theirs, [T, k].

    places: the position or the name of each of the three. inner: the dimensions of the bank's tokens between rows and features, if it takes
    and returns rows of tokens: then a bank of one expert gets rows of one token.
    """

    tokens: Tensor
    experts: Tensor
    weights: Tensor
    places: tuple[int | str, int | str, int | str]
    copies: int = 1
    inner: tuple[int, ...] = ()

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> RoutedCall | None:
        """The call with these arguments; None if they are not tokens [T, d] or [B, T / B, d] and two matrices of equal shape [T, k], one of
        integers."""
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
        if experts.ndim != 2 or len(weights) != 1 or len(tokens) != 1:
            return None
        x = tensors[tokens[0]]
        if x.ndim < 2 or math.prod(x.shape[:-1]) != len(experts):
            return None
        places = (tokens[0], chosen[0], weights[0])
        return cls(x.flatten(0, -2), experts, tensors[weights[0]], places, inner=tuple(x.shape[1:-1]))

    @property
    def zeros(self) -> Tensor:
        return self._in_rows(torch.zeros_like(self.tokens))

    @property
    def choice(self) -> Tensor | None:
        return self.weights

    @property
    def sums(self) -> bool:
        return True

    def slots(self) -> int:
        return self.experts.shape[1]

    def routing(self, slots: int) -> Routing:
        return Routing(self.tokens, self.experts, self.weights)

    def run(self, forward: Callable[..., Any]) -> Any:
        return self._call(forward, self._in_rows(self.tokens), self.experts, self.weights)

    def run_one(self, forward: Callable[..., Any], tokens: Tensor, weights: Tensor, *, idle: bool = False) -> Any:
        experts = torch.arange(1 + idle, dtype=self.experts.dtype, device=tokens.device).expand(len(tokens), -1)
        given = torch.stack([weights, *[torch.zeros_like(weights)] * idle], dim=1)
        return self._call(forward, tokens.view(len(tokens), *[1] * len(self.inner), -1), experts, given.to(self.weights.dtype))

    def together(self, inputs: Tensor, at: Tensor, count: int) -> tuple[Tensor, Tensor | None]:
        return inputs, None

    def output(self, results: Tensor, experts: Tensor, count: int) -> Tensor:
        return self._in_rows(results.to(self.tokens.dtype))

    def chosen_anew(self, experts: Tensor, count: int) -> BankCall:
        weights = self.weights[:, : experts.shape[1]].contiguous()
        return dataclasses.replace(self, experts=experts.to(self.experts.dtype), weights=weights)

    def shortened(self) -> BankCall:
        return RoutedCall(self.tokens[:1].clone(), self.experts[:1].clone(), self.weights[:1].clone(), self.places, inner=self.inner)

    def _in_rows(self, tokens: Tensor) -> Tensor:
        """Tokens [T, d] as the bank takes and returns them."""
        return tokens.unflatten(0, (len(tokens) // math.prod(self.inner), *self.inner)) if self.inner else tokens

    def _call(self, forward: Callable[..., Any], tokens: Tensor, experts: Tensor, weights: Tensor) -> Any:
        given = dict(zip(self.places, (tokens, experts, weights), strict=True))
        positions = sorted(place for place in given if isinstance(place, int))
        return forward(*(given[i] for i in positions), **{k: v for k, v in given.items() if isinstance(k, str)})


@dataclass(frozen=True, slots=True)
class DenseCall(BankCall):
    """tokens: [experts · T, d], those of the first expert before those of the second. place: the position or the name of the argument."""

    tokens: Tensor
    copies: int
    place: int | str

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any], experts: int) -> DenseCall | None:
        """The call with these arguments; None if they are not one matrix with as many tokens for each expert."""
        every: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        given = [(place, x) for place, x in every if x is not None]
        if len(given) != 1 or not isinstance(given[0][1], Tensor):
            return None
        ((place, x),) = given
        return cls(x, experts, place) if x.ndim == 2 and x.is_floating_point() and len(x) % experts == 0 else None

    @property
    def choice(self) -> Tensor | None:
        return None

    @property
    def sums(self) -> bool:
        return False

    def slots(self) -> int:
        """Tokens that are not finite do not count: 0 times infinity is not 0."""
        chosen = self._chosen() & self._by_expert().isfinite().all(-1)
        return max(1, int(chosen.sum(0).max()))

    def routing(self, slots: int) -> Routing:
        """Every token of the block is ``slots`` inputs, in the order of its experts.

        Raises UnsupportedModelError if a token that is finite has more.
        """
        chosen, given = self._chosen(), self._by_expert()
        if bool(((chosen.sum(0) > slots) & given.isfinite().all(-1).all(0)).any()):
            raise UnsupportedModelError(f"a token goes to more than {slots} experts, as many as other tokens have")
        at = chosen.T.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :slots]
        experts = torch.where(chosen.T.gather(1, at), at, self.copies).reshape(-1, 1)
        inputs = given[at, torch.arange(len(at), device=at.device)[:, None]].flatten(0, 1)
        return Routing(inputs, experts, torch.ones_like(experts, dtype=inputs.dtype))

    def run(self, forward: Callable[..., Any]) -> Any:
        return self._call(forward, self.tokens)

    def run_one(self, forward: Callable[..., Any], tokens: Tensor, weights: Tensor, *, idle: bool = False) -> Any:
        return self._call(forward, tokens)

    def together(self, inputs: Tensor, at: Tensor, count: int) -> tuple[Tensor, Tensor | None]:
        whole = inputs.new_zeros(count, inputs.shape[-1])
        whole[at] = inputs
        return whole, at

    def output(self, results: Tensor, experts: Tensor, count: int) -> Tensor:
        whole = results.new_zeros(self.copies, count, results.shape[-1])
        tokens = torch.arange(len(experts), device=experts.device) // (len(experts) // count)
        known = experts[:, 0] < self.copies
        whole[experts[known, 0], tokens[known]] = results[known]
        return whole.flatten(0, 1).to(self.tokens.dtype)

    def chosen_anew(self, experts: Tensor, count: int) -> BankCall:
        inputs = self.routing(self.slots()).inputs[:: self.slots()]
        chosen = torch.zeros(count, len(inputs), dtype=torch.bool, device=inputs.device)
        chosen.scatter_(0, experts.T, torch.ones_like(experts.T, dtype=torch.bool))
        tokens = torch.where(chosen[:, :, None], inputs, inputs.new_zeros(()))
        return DenseCall(tokens.flatten(0, 1), count, self.place)

    def shortened(self) -> BankCall:
        return DenseCall(self._by_expert()[:, 0].clone(), self.copies, self.place)

    def _by_expert(self) -> Tensor:
        return self.tokens.view(self.copies, -1, self.tokens.shape[-1])

    def _chosen(self) -> Tensor:
        """Which inputs are not 0: [experts, T]."""
        return self._by_expert().ne(0).any(-1)

    def _call(self, forward: Callable[..., Any], tokens: Tensor) -> Any:
        return forward(**{self.place: tokens}) if isinstance(self.place, str) else forward(tokens)


@dataclass(frozen=True, slots=True)
class SortedCall(BankCall):
    """tokens: [N, d], in the order of their experts. sizes: how many each expert has, a list or int [experts]; without values on meta.

    width: of what the bank returns for each. places: the position or the name of both arguments.
    """

    tokens: Tensor
    sizes: list[int] | Tensor
    width: int
    places: tuple[int | str, int | str]
    copies: int = 1

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any], matrices: Sequence[int]) -> SortedCall | None:
        """The call with these arguments; None if they are not a matrix of tokens, as wide as the matrices [experts, outputs, inputs], and a
        number for each expert."""
        experts, *sides = matrices
        every: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        given = [(place, x) for place, x in every if x is not None]
        tokens = [place for place, x in given if isinstance(x, Tensor) and x.is_floating_point() and x.ndim == 2]
        sizes = [place for place, x in given if _is_sizes(x, experts)]
        if len(given) != 2 or len(tokens) != 1 or len(sizes) != 1:
            return None
        named = dict(given)
        width = named[tokens[0]].shape[1]
        if len(sides) != 2 or width not in sides:
            return None
        call = cls(named[tokens[0]], named[sizes[0]], sides[0] if width == sides[1] else sides[1], (tokens[0], sizes[0]))
        return call if call.tokens.is_meta or int(call._numbers().sum()) == len(call.tokens) else None

    @property
    def zeros(self) -> Tensor:
        return self.tokens.new_zeros(len(self.tokens), self.width)

    @property
    def returned(self) -> int:
        return self.width

    @property
    def repeats(self) -> bool:
        return True

    @property
    def choices(self) -> int:
        return len(self.sizes)

    @property
    def choice(self) -> Tensor | None:
        return None

    @property
    def sums(self) -> bool:
        return False

    def slots(self) -> int:
        return 1

    def routing(self, slots: int) -> Routing:
        numbers = self._numbers()
        experts = torch.arange(len(numbers), device=self.tokens.device).repeat_interleave(numbers)[:, None]
        return Routing(self.tokens, experts, torch.ones_like(experts, dtype=self.tokens.dtype))

    def run(self, forward: Callable[..., Any]) -> Any:
        return self._call(forward, self.tokens, self.sizes)

    def run_one(self, forward: Callable[..., Any], tokens: Tensor, weights: Tensor, *, idle: bool = False) -> Any:
        return self._call(forward, tokens, self._alike(torch.tensor([len(tokens)])))

    def together(self, inputs: Tensor, at: Tensor, count: int) -> tuple[Tensor, Tensor | None]:
        return inputs, None

    def output(self, results: Tensor, experts: Tensor, count: int) -> Tensor:
        return results.to(self.tokens.dtype)

    def chosen_anew(self, experts: Tensor, count: int) -> BankCall:
        order = experts[:, 0].argsort(stable=True)
        numbers = self._alike(experts[:, 0].bincount(minlength=count))
        return SortedCall(self.tokens[order].contiguous(), numbers, self.width, self.places)

    def shortened(self) -> BankCall:
        first = torch.zeros(len(self.sizes), dtype=torch.long)
        first[0] = 1
        return SortedCall(self.tokens[:1].clone(), self._alike(first), self.width, self.places)

    def _numbers(self) -> Tensor:
        return self.sizes if isinstance(self.sizes, Tensor) else torch.tensor(self.sizes, device=self.tokens.device)

    def _alike(self, numbers: Tensor) -> list[int] | Tensor:
        """Numbers in the form of the sizes."""
        return numbers.to(self.sizes) if isinstance(self.sizes, Tensor) else numbers.tolist()

    def _call(self, forward: Callable[..., Any], tokens: Tensor, sizes: list[int] | Tensor) -> Any:
        given = dict(zip(self.places, (tokens, sizes), strict=True))
        positions = sorted(place for place in given if isinstance(place, int))
        return forward(*(given[i] for i in positions), **{k: v for k, v in given.items() if isinstance(k, str)})


def _is_sizes(x: Any, experts: int) -> bool:
    if isinstance(x, Tensor):
        return not x.is_floating_point() and x.shape == (experts,)
    return isinstance(x, (list, tuple)) and len(x) == experts and all(type(n) is int for n in x)


def bank_call(args: tuple[Any, ...], kwargs: Mapping[str, Any], shape: Sequence[int]) -> BankCall | None:
    """The call of a bank with these arguments, in one of the three ways; None if it is none of them. shape: of its first parameter."""
    return RoutedCall.of(args, kwargs) or DenseCall.of(args, kwargs, shape[0]) or SortedCall.of(args, kwargs, shape)
