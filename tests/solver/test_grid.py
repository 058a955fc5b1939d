"""Scales and zero points, against a scalar version in numpy that handles one group at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from bigq.errors import NumericsError
from bigq.scheme import QuantScheme
from bigq.solver.grid import find_grid

TINY = 2.0**-24


def as_fp16(value: float) -> float:
    stored = float(np.float16(value))
    if value == 0:
        return 1.0
    return stored if stored > 0 else TINY


def range_grid(low: float, high: float, bits: int, symmetric: bool, min_zero: int) -> tuple[float, int]:
    top = 2**bits - 1
    if symmetric:
        return as_fp16(2 * max(-low, high) / top), 2 ** (bits - 1)
    scale = as_fp16((high - low) / top)
    zero = min(max(int(np.rint(-low / scale)), 0), top)
    if zero < min_zero:
        if high > 0:
            scale = max(scale, as_fp16(high / (top - min_zero)))
        zero = min_zero
    return scale, zero


def rounding_error(group: np.ndarray, scale: float, zero: int, bits: int) -> float:
    codes = np.clip(np.rint(group / scale) + zero, 0, 2**bits - 1)
    return float((np.abs(group - (codes - zero) * scale) ** 2.4).sum())


def reference_grid(group: np.ndarray, scheme: QuantScheme) -> tuple[float, int]:
    low, high = min(0.0, float(group.min())), max(0.0, float(group.max()))
    shrinks = [1 - i / 100 for i in range(80 if scheme.mse else 1)]
    grids = [range_grid(low * s, high * s, scheme.bits, scheme.symmetric, scheme.min_zero) for s in shrinks]
    return min(grids, key=lambda grid: rounding_error(group, *grid, scheme.bits))


def groups(seed: int, g: int = 24, count: int = 40) -> Tensor:
    """fp64 [g, count]: groups of all sizes and offsets, among them some of one sign only."""
    gen = torch.Generator().manual_seed(seed)
    w = torch.randn(g, count, dtype=torch.float64, generator=gen)
    w += torch.linspace(-6, 6, count, dtype=torch.float64)
    return w * torch.logspace(-3, 1, count, dtype=torch.float64)[torch.randperm(count, generator=gen)]


@pytest.mark.parametrize("min_zero", [0, 1])
@pytest.mark.parametrize("mse", [False, True], ids=["full", "mse"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_grid_equals_the_scalar_reference(bits: int, symmetric: bool, mse: bool, min_zero: int) -> None:
    w = groups(seed=bits)
    scheme = QuantScheme(bits=bits, symmetric=symmetric, mse=mse, min_zero=min_zero)
    before = w.clone()
    scale, zero = find_grid(w, scheme)
    expected = [reference_grid(column, scheme) for column in w.T.numpy()]
    assert list(zip(scale.tolist(), zero.tolist(), strict=True)) == expected
    assert torch.equal(w, before), "find_grid changed its argument"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
def test_grid_is_what_will_be_stored(symmetric: bool, dtype: torch.dtype) -> None:
    scale, zero = find_grid(groups(0).to(dtype).reshape(24, 8, 5), QuantScheme(bits=4, symmetric=symmetric, mse=True))
    assert scale.dtype == zero.dtype == dtype and scale.shape == zero.shape == (8, 5)
    assert torch.equal(scale, scale.half().to(dtype)), "scales are not fp16 numbers"
    assert torch.equal(zero, zero.to(torch.uint8).to(dtype)), "zeros are not whole"
    assert bool((scale > 0).all()) and bool(((zero >= 0) & (zero <= 15)).all())


@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_grid_search_never_loses_to_the_full_range(bits: int, symmetric: bool) -> None:
    w = groups(seed=9)
    full, searched = (find_grid(w, QuantScheme(bits=bits, symmetric=symmetric, mse=mse)) for mse in (False, True))
    for i, column in enumerate(w.T.numpy()):
        errors = [rounding_error(column, float(scale[i]), int(zero[i]), bits) for scale, zero in (searched, full)]
        assert errors[0] <= errors[1] * (1 + 1e-12)
    if bits <= 4:
        assert int((searched[0] < full[0]).sum()) > 10, "hardly any range was shrunk"


@pytest.mark.parametrize("mse", [False, True], ids=["full", "mse"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
def test_a_group_of_zeros_gets_scale_one(symmetric: bool, mse: bool) -> None:
    scale, zero = find_grid(torch.zeros(16, 3), QuantScheme(bits=4, symmetric=symmetric, mse=mse))
    assert scale.tolist() == [1, 1, 1]
    assert zero.tolist() == [8 if symmetric else 0] * 3


@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
def test_a_scale_below_fp16_becomes_its_smallest_number(symmetric: bool) -> None:
    scale, _ = find_grid(torch.full((16, 1), 1e-9), QuantScheme(bits=4, symmetric=symmetric))
    assert scale.tolist() == [TINY]


def test_a_scale_above_fp16_is_refused() -> None:
    w = torch.ones(16, 4)
    w[3, 2] = 65504.0 * 15
    with pytest.raises(NumericsError, match="above fp16's largest number 65504"):
        find_grid(w, QuantScheme(bits=4))
    assert math.isfinite(float(find_grid(w / 2, QuantScheme(bits=4))[0].max()))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_min_zero_keeps_a_positive_group_in_reach(bits: int) -> None:
    """A group without negative weights would take zero 0; stored as zero − 1 it must become 1 and still reach the top."""
    w = torch.linspace(0, 3, 32, dtype=torch.float64)[:, None]
    scale, zero = find_grid(w, QuantScheme(bits=bits, symmetric=False, min_zero=1))
    assert zero.item() == 1
    reach = float(scale) * (2**bits - 2)
    assert reach == pytest.approx(3, rel=2**-10)
