"""Running a block, or what is around the blocks, without its weights: stand-ins take the places of Linears and small parameters.

What a Linear has to do with the residual stream follows from the code around it, not from its weight. So a stand-in may be any linear
map that mixes its inputs, and one with two weights per output takes no memory to speak of. Rotations act on it as on the real weight.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bigq.model.blocks import block_linears, is_product
from bigq.model.experts.bank import bank_modules
from bigq.model.experts.call import BankCall
from bigq.model.experts.cut import banks_replaced
from bigq.model.forward.capture import replace_forwards
from bigq.model.rotation.roles import Turn
from bigq.model.skeleton import linear_weight

#: Called behind a module: its name, its first input, its output; returns the output to use.
After = Callable[[str, Tensor, Tensor], Tensor]


def generator_of(name: str) -> torch.Generator:
    """Random numbers that belong to a name."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


class LinearStandIn:
    """y = x · Wᵀ + b for a sparse random W [m, n]."""

    def __init__(self, name: str, m: int, n: int, *, bias: bool) -> None:
        generator = generator_of(name)
        self._at = torch.randint(0, n, (2, m), generator=generator)
        self._weights = 0.5 + torch.rand(2, m, generator=generator)
        self._weights[1] *= -1
        self._bias = 0.25 * torch.randn(m, generator=generator) if bias else None

    @classmethod
    def of(cls, name: str, module: nn.Module) -> LinearStandIn:
        m, n = linear_weight(module).shape
        return cls(name, m, n, bias=getattr(module, "bias", None) is not None)

    def __call__(self, x: Tensor, turn: Turn | None = None, scale: Tensor | None = None) -> Tensor:
        """turn: how the weight is turned. scale: that of the norm whose weight it takes over."""
        x = x.float()
        if turn is not None and turn.inputs is not None:
            x = turn.inputs.back(x)
        if scale is not None:
            x = x * scale
        weights = self._weights.to(x.device)
        y = x[..., self._at[0].to(x.device)] * weights[0] + x[..., self._at[1].to(x.device)] * weights[1]
        if self._bias is not None:
            y = y + self._bias.to(x.device)
        return y if turn is None or turn.outputs is None else turn.outputs.turn(y)


class Bare:
    """A module on meta, such as a block, that runs on stand-ins.

    width: of the residual stream. norms: modules whose only parameter is one vector of that width, with its name. tables: modules with a
    matrix of so many columns that are no Linears, such as routers, with its name. banks: of experts. parameters: the values of all that
    belong to neither Linears nor banks.
    """

    def __init__(
        self, module: nn.Module, name: str, width: int, device: torch.device, without: str | None = None, embedding: nn.Module | None = None
    ) -> None:
        """without: a path in the module whose contents do not run, such as the blocks of a model; neither does its ``embedding``."""
        self.module, self.name, self.width = module, name, width
        self.calls: dict[str, BankCall] = {}
        self.linears = {path: m for path, m in block_linears(module).items() if _is_plain(m) and not _inside(path, without)}
        self.banks = {path: m for path, m in bank_modules(module).items() if not _inside(path, without)}
        self._standins = {
            path: LinearStandIn(path, *linear_weight(m).shape, bias=getattr(m, "bias", None) is not None)
            for path, m in self.linears.items()
        }
        own = {f"{path}.{leaf}" for path, m in {**self.linears, **self.banks}.items() for leaf, _ in m.named_parameters(recurse=False)}
        self.parameters: dict[str, Tensor] = {}
        self.norms: dict[str, str] = {}
        self.tables: dict[str, str] = {}
        for path, param in module.named_parameters():
            if path in own or _inside(path, without) or (embedding is not None and param is embedding.weight):
                continue
            random = 0.5 + torch.rand(param.shape, generator=generator_of(path))
            self.parameters[path] = (random if param.ndim == 1 else random - 1).to(device)
            owner, _, leaf = path.rpartition(".")
            if tuple(param.shape) == (width,) and len(list(module.get_submodule(owner).parameters())) == 1:
                self.norms[owner] = leaf
            if param.ndim == 2 and param.shape[1] == width and owner:
                self.tables[owner] = leaf

    def run(
        self,
        call: Callable[[], Tensor],
        after: After | None = None,
        turns: Mapping[str, Turn] | None = None,
        values: Mapping[str, Tensor] | None = None,
        scales: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """What ``call`` returns while stand-ins are in place.

        after: is called behind Linears and norms. turns: of Linears. values: of parameters, in place of ``parameters``.
        scales: what norms multiplied by, for the Linears that take them over. calls: of banks, in the last run.
        """
        turns, names = turns or {}, [*self.linears, *self.norms, *self.tables]

        def scale(name: str) -> Tensor | None:
            turn = turns.get(name)
            return scales[turn.norm] if turn is not None and turn.norm is not None and scales is not None else None

        def make(i: int) -> Callable[..., Any]:
            name = names[i]
            module = self.module.get_submodule(name)

            def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
                if name in self._standins:
                    y = self._standins[name](x, turns.get(name), scale(name))
                else:
                    y = type(module).forward(module, x, *args, **kwargs)
                if after is None or name in self.tables:
                    if after is not None:
                        after(name, x, x)
                    return y
                return after(name, x, y)

            return forward

        def bank(name: str, call: BankCall) -> Tensor:
            self.calls[name] = call
            if name not in self._standins:  # how wide it is depends on how it is called
                self._standins[name] = LinearStandIn(name, call.returned, call.tokens.shape[-1], bias=False)
            y = self._standins[name](call.tokens, turns.get(name), scale(name))
            if after is not None:
                y = after(name, call.tokens, y)
                if call.choice is not None:
                    after(f"{name} choice", call.choice, call.choice)
            return y.reshape(call.zeros.shape)

        with (
            self._holding({**self.parameters, **(values or {})}),
            replace_forwards([self.module.get_submodule(n) for n in names], make),
            banks_replaced(self.module, bank) if self.banks else contextlib.nullcontext(),
        ):
            return call()

    @contextlib.contextmanager
    def _holding(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        before = {}
        for path, value in values.items():
            owner, _, leaf = path.rpartition(".")
            parameters = self.module.get_submodule(owner)._parameters
            before[path] = parameters[leaf]
            parameters[leaf] = nn.Parameter(value, requires_grad=False)
        try:
            yield
        finally:
            for path, param in before.items():
                owner, _, leaf = path.rpartition(".")
                self.module.get_submodule(owner)._parameters[leaf] = param


def _is_plain(linear: nn.Module) -> bool:
    """Whether a Linear returns what its class says. Some routers are Linears whose forward returns more. linear: on meta."""
    weight = linear_weight(linear)
    x = torch.empty(1, weight.shape[1], dtype=weight.dtype, device=weight.device)
    try:
        return is_product(linear, x, linear(x))
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False


def _inside(path: str, without: str | None) -> bool:
    return without is not None and path.startswith(f"{without}.")
