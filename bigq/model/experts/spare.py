"""Banks with spare experts: numbers that tokens may be routed to, behind those of the experts, whose outputs need no weights.

LongCat's return their tokens as they are. transformers makes the first matrix of its banks as large as if they had weights; nothing
computes with these rows. The skeleton leaves them out, so that a bank's parameters agree in the number of experts, as those of others do.
"""

from __future__ import annotations

from torch import nn

#: Where a bank's module has their number.
_SPARE = "_bigq_spare_experts"


def trim_banks(model: nn.Module) -> None:
    """Leave out what parameters on meta have for spare experts: those of one module that counts both kinds, and says what it is."""
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        if sum(p.ndim == 3 for p in own.values()) < 2 or "expert" not in type(module).__name__.lower():
            continue
        sizes = {p.shape[0] for p in own.values()}
        numbers = {value for value in vars(module).values() if type(value) is int}
        if len(sizes) != 2 or not sizes <= numbers:
            continue
        experts, total = sorted(sizes)
        for key, param in own.items():
            if param.shape[0] == total:
                module._parameters[key] = nn.Parameter(param[:experts].detach(), requires_grad=False)
        module.__dict__[_SPARE] = total - experts


def spare_experts(module: nn.Module) -> int:
    """How many spare experts a bank has."""
    return int(vars(module).get(_SPARE, 0))
