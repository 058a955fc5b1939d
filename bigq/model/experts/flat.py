"""Banks whose matrices are in a module within them, those of all experts one behind the other: DBRX's.

The skeleton moves them to the bank itself, as [experts, outputs, inputs], so that it is one like others. When it runs, the module within
sees them in their place, one behind the other, as before.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

#: Where a bank's module has the name of the module within that the matrices are moved from.
_WITHIN = "_bigq_matrices_within"


def gather_banks(model: nn.Module) -> None:
    """Move matrices on meta to their banks: a module of experts that counts them, with parameters in the one module within it only, all of
    which have rows for each expert."""
    for module in list(model.modules()):
        children, name = dict(module.named_children()), type(module).__name__.lower()
        holders = {key: child for key, child in children.items() if any(True for _ in child.parameters())}
        if "expert" not in name or len(holders) != 1 or module._parameters or list(module.buffers()):
            continue
        ((within, holder),) = holders.items()
        own = dict(holder.named_parameters(recurse=False))
        counts = {value for key, value in vars(module).items() if type(value) is int and "expert" in key}
        flat = len(own) > 1 and all(p.ndim == 2 for p in own.values()) and len(counts) == 1
        if not flat or len(own) != len(list(holder.parameters())) or any(len(p) % min(counts) for p in own.values()):
            continue
        (experts,) = counts
        for key, param in own.items():
            module.register_parameter(key, nn.Parameter(param.detach().unflatten(0, (experts, -1)), requires_grad=False))
            del holder._parameters[key]
        module.__dict__[_WITHIN] = within
        module.__class__ = _gathered(type(module))


def moved_names(model: nn.Module) -> dict[str, str]:
    """The names that parameters had before ``gather_banks`` → their names."""
    found = {}
    for path, module in model.named_modules():
        within = vars(module).get(_WITHIN)
        for key in module._parameters if within is not None else ():
            found[f"{path}.{within}.{key}"] = f"{path}.{key}"
    return found


#: The classes of banks that were made.
_MADE: dict[type[nn.Module], type[nn.Module]] = {}


def _gathered(cls: type[nn.Module]) -> type[nn.Module]:
    """A class of banks whose forward has the matrices in the module within. One for each class, so that equal banks are of one class."""
    if cls in _MADE:
        return _MADE[cls]

    @functools.wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return cls.forward(_as_built(self, cls), *args, **kwargs)

    _MADE[cls] = type(cls.__name__, (cls,), {"forward": forward})
    return _MADE[cls]


def _as_built(module: nn.Module, cls: type[nn.Module]) -> nn.Module:
    """A bank as its class built it, which shares its matrices."""
    within = vars(module)[_WITHIN]
    holder = _like(module._modules[within], {key: p.flatten(0, 1) for key, p in module._parameters.items() if p is not None})
    bank = _like(module, {}, cls)
    bank.__dict__["_modules"] = {**module._modules, within: holder}
    return bank


def _like(module: nn.Module | None, parameters: Mapping[str, Tensor], cls: type[nn.Module] | None = None) -> nn.Module:
    """A module with the attributes of another, and these parameters; views of parameters may be among them."""
    assert module is not None
    made: nn.Module = object.__new__(cls or type(module))
    made.__dict__.update({**module.__dict__, "_parameters": dict(parameters)})
    return made
