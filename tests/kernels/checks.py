"""Shared by the kernel tests: both versions of a kernel, memory layouts, and tolerances."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

#: Triton's interpreter truncates where a GPU rounds fp32 to bf16.
INTERPRETED = not torch.cuda.is_available()

#: How much larger than torch's own errors those of fp32 products may be. On tensor cores each factor is split into TF32 numbers
#: (tf32x3), whose products keep about 22 of fp32's 24 bits.
FACTOR = 2.0 if INTERPRETED else 5.0
#: The share of codes that may differ between two ways to compute them: of weights that are as close to one code as to the next.
OTHER_CODES = 0.0 if INTERPRETED else 1e-3

#: Both versions of a kernel are tested in the same way.
VERSIONS = ["reference", "triton"]

#: Memory layouts of a matrix.
ORDERS = ["by rows", "by columns", "within a larger one"]


def kernel(name: str, version: str) -> Callable[..., Any]:
    """A version of the function ``name`` (which may end in ``_``) from the module of that name."""
    function = f"{name.rstrip('_')}_{version}{'_' if name.endswith('_') else ''}"
    home = {"unpack": "pack", "dequantize_packed": "dequantize"}.get(name, name.rstrip("_"))
    module = pytest.importorskip(f"bigq.kernels.{'gpu.' if version == 'triton' else ''}{home}")
    return getattr(module, function)


def rubbish(dtype: torch.dtype) -> float:
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max


def stored(x: Tensor, order: str) -> Tensor:
    """A copy of x in its own memory. ``within``: rows at a distance, with fill values between and around them; see ``untouched``."""
    if order == "by rows":
        return x.clone(memory_format=torch.contiguous_format)
    if order == "by columns":
        return x.mT.clone(memory_format=torch.contiguous_format).mT
    *outer, rows, columns = x.shape
    buffer = torch.full((*outer, rows + 3, columns + 5), rubbish(x.dtype), dtype=x.dtype, device=x.device)
    view = buffer[..., 2:-1, 3:-2]
    return view.copy_(x)


def untouched(view: Tensor) -> bool:
    """Whether the fill values around a view from ``stored`` are unchanged."""
    assert view._base is not None
    base = view._base.clone()
    base.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(rubbish(view.dtype))
    return bool((base.isnan() if base.is_floating_point() else base == rubbish(base.dtype)).all())


def same_bytes(x: Tensor, y: Tensor) -> bool:
    """Equality in which NaN equals NaN, but −0 does not equal 0."""
    return x.dtype == y.dtype and torch.equal(*(t.contiguous().view(torch.uint8) for t in (x, y)))


def distance(x: Tensor, exact: Tensor) -> float:
    """Root mean square of the error, relative to that of the exact values."""
    x, exact = x.double(), exact.double()
    return float((x - exact).norm() / exact.norm().clamp(min=1e-300))


def as_good(x: Tensor, own: Tensor, exact: Tensor, factor: float = FACTOR, floor: float = 2.0**-24) -> bool:
    """Whether the error of x is at most ``factor`` times that of torch's result ``own``. False if x contains NaN."""
    return x.shape == exact.shape and distance(x, exact) <= factor * distance(own, exact) + floor
