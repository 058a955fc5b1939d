"""When two tensors, or two arguments of a block, count as the same."""

from __future__ import annotations

import enum
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

#: Differences that count as rounding, relative to the largest value: this, or four times the dtype's epsilon if that is more.
ROUNDING = 1e-4
#: How deep objects among a block's arguments are compared.
_DEPTH = 8


def agree(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal up to rounding; NaN and Inf are equal to each other."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point() or torch.equal(a, b):
        return torch.equal(a, b)
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()):
        return False
    x, y = a[finite].double(), b[finite].double()
    share = max(ROUNDING, 4 * torch.finfo(a.dtype).eps)
    return not x.numel() or float((x - y).abs().max()) <= share * float(x.abs().max())


def same_value(a: Any, b: Any, depth: int = _DEPTH) -> bool:
    """Whether two arguments are equal. Objects are compared by their attributes, functions by their code and what they hold on to."""
    if a is b or depth == 0:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same_value(a[key], b[key], depth - 1) for key in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(same_value(x, y, depth - 1) for x, y in zip(a, b, strict=True))
    if isinstance(a, (int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device, torch.Size)):
        return bool(a == b)
    if isinstance(a, types.FunctionType):
        cells = [[cell.cell_contents for cell in f.__closure__ or ()] for f in (a, b)]
        return a.__code__ is b.__code__ and same_value(cells[0], cells[1], depth - 1)
    return isinstance(a, nn.Module) or same_value(getattr(a, "__dict__", None), getattr(b, "__dict__", None), depth - 1)
