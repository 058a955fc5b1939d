"""Scales and zero points, against a scalar version in numpy that handles one group at a time."""

from __future__ import annotations

import math

import pytest
import torch
from by_hand import TINY, reference_grid, rounding_error
from torch import Tensor

from bigq.kernels.grid import GridSpec, find_grid

pytestmark = pytest.mark.usefixtures("poisoned", "one_thread")


def groups(seed: int, g: int = 24, count: int = 40) -> Tensor:
    """fp64 [g, count]: groups of all sizes and offsets, including some of one sign only."""
    gen = torch.Generator().manual_seed(seed)
    w = torch.randn(g, count, dtype=torch.float64, generator=gen)
    w += torch.linspace(-6, 6, count, dtype=torch.float64)
    return w * torch.logspace(-3, 1, count, dtype=torch.float64)[torch.randperm(count, generator=gen)]


@pytest.mark.parametrize("min_zero", [0, 1])
@pytest.mark.parametrize("search", ["none", "plain", "weighted"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_grid_equals_the_scalar_reference(bits: int, symmetric: bool, search: str, min_zero: int) -> None:
    w = groups(seed=bits)
    spec = GridSpec(bits=bits, symmetric=symmetric, search=search != "none", min_zero=min_zero)
    before = w.clone()
    weights = torch.logspace(-2, 2, len(w), dtype=w.dtype) if search == "weighted" else torch.ones(len(w), dtype=w.dtype)
    scale, zero = find_grid(w, spec, weights if search == "weighted" else None)
    expected = [reference_grid(column, spec, weights.numpy()) for column in w.T.numpy()]
    assert list(zip(scale.tolist(), zero.tolist(), strict=True)) == expected
    assert torch.equal(w, before), "find_grid changed its argument"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
def test_grid_is_rounded_to_its_stored_precision(symmetric: bool, dtype: torch.dtype) -> None:
    scale, zero = find_grid(groups(0).to(dtype).reshape(24, 8, 5), GridSpec(bits=4, symmetric=symmetric, search=True))
    assert scale.dtype == zero.dtype == dtype and scale.shape == zero.shape == (8, 5)
    assert torch.equal(scale, scale.half().to(dtype)), "scales are not fp16 numbers"
    assert torch.equal(zero, zero.to(torch.uint8).to(dtype)), "zeros are not whole"
    assert bool((scale > 0).all()) != symmetric and bool((scale != 0).all()) and bool(((zero >= 0) & (zero <= 15)).all())


@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_grid_search_is_never_worse_than_the_full_range(bits: int, symmetric: bool) -> None:
    w = groups(seed=9)
    full, searched = (find_grid(w, GridSpec(bits=bits, symmetric=symmetric, search=search)) for search in (False, True))
    for i, column in enumerate(w.T.numpy()):
        errors = [rounding_error(column, float(scale[i]), int(zero[i]), bits) for scale, zero in (searched, full)]
        assert errors[0] <= errors[1] * (1 + 1e-12)
    if bits <= 4:
        assert int((searched[0].abs() < full[0]).sum()) > 5, "hardly any range was shrunk"


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_longer_side_of_a_symmetric_grid_is_where_the_largest_weight_is(bits: int) -> None:
    """The scale is negative if that weight is positive. The other weights are small."""
    w = torch.randn(24, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 0.02
    w[5] = torch.linspace(1, 2, 40, dtype=torch.float64) * torch.tensor([1, -1], dtype=torch.float64).repeat(20)
    scale, _ = find_grid(w, GridSpec(bits=bits, symmetric=True, search=True))
    assert torch.equal(scale < 0, w[5] > 0)


def test_weights_may_differ_between_groups() -> None:
    w, spec = groups(seed=4).reshape(24, 8, 5), GridSpec(bits=3, symmetric=True, search=True)
    weights = torch.rand(24, 8, dtype=w.dtype, generator=torch.Generator().manual_seed(1)) ** 4
    scale, zero = find_grid(w, spec, weights)
    for g in range(8):
        own = find_grid(w[:, g], spec, weights[:, g])
        assert torch.equal(scale[g], own[0]) and torch.equal(zero[g], own[1])
    assert not torch.equal(scale, find_grid(w, spec)[0])


def test_weights_beyond_every_grid_have_an_infinite_scale() -> None:
    scale, _ = find_grid(torch.full((16, 2), 1e30), GridSpec(bits=4, symmetric=True, search=True))
    assert scale.isinf().all()


@pytest.mark.parametrize("search", [False, True], ids=["full", "search"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
def test_a_group_of_zeros_gets_scale_one(symmetric: bool, search: bool) -> None:
    scale, zero = find_grid(torch.zeros(16, 3), GridSpec(bits=4, symmetric=symmetric, search=search))
    assert scale.tolist() == [1, 1, 1]
    assert zero.tolist() == [8 if symmetric else 0] * 3


@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
def test_a_scale_below_fp16_becomes_its_smallest_number(symmetric: bool) -> None:
    scale, _ = find_grid(torch.full((16, 1), 1e-9), GridSpec(bits=4, symmetric=symmetric))
    assert scale.tolist() == [TINY]


def test_a_scale_above_fp16_is_infinite() -> None:
    w = torch.ones(16, 4)
    w[3, 2] = 65504.0 * 15
    assert find_grid(w, GridSpec(bits=4, symmetric=True))[0].isinf().tolist() == [False, False, True, False]
    assert math.isfinite(float(find_grid(w / 2, GridSpec(bits=4, symmetric=True))[0].max()))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_min_zero_keeps_a_positive_group_in_reach(bits: int) -> None:
    """A group without negative weights has zero 0. For storage as zero − 1 it must be 1, and the maximum must still be in range."""
    w = torch.linspace(0, 3, 32, dtype=torch.float64)[:, None]
    scale, zero = find_grid(w, GridSpec(bits=bits, symmetric=False, min_zero=1))
    assert zero.item() == 1
    reach = float(scale) * (2**bits - 2)
    assert reach == pytest.approx(3, rel=2**-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize("bits", [7, 8, 9, 10, 11])
def test_scales_have_the_requested_significant_bits(bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    """And each is the nearest such number to the fp16 scale."""
    w = groups(3).to(dtype)
    scale, _ = find_grid(w, GridSpec(bits=4, symmetric=symmetric, scale_bits=bits))
    fine, _ = find_grid(w, GridSpec(bits=4, symmetric=symmetric))
    for coarse, stored in zip(scale.tolist(), fine.tolist(), strict=True):
        step = 2.0 ** (math.frexp(stored)[1] - bits)
        assert coarse == round(stored / step) * step, "Python rounds to even, too"
    assert len(set(scale.tolist())) > 30, "scales of all sizes"
    assert torch.equal(scale, fine) == (bits == 11)


def test_scales_of_8_bits_are_exact_in_bf16_and_of_7_bits_times_a_zero_in_fp16() -> None:
    w = torch.randn(32, 4000, generator=torch.Generator().manual_seed(1))
    eight, _ = find_grid(w, GridSpec(bits=4, symmetric=True, scale_bits=8))
    assert torch.equal(eight.bfloat16().float(), eight)
    seven, zero = find_grid(w, GridSpec(bits=4, symmetric=False, scale_bits=7))
    least = seven * zero
    assert torch.equal(least.half().float(), least)
    eleven, zero = find_grid(w, GridSpec(bits=4, symmetric=False))
    assert not torch.equal((eleven * zero).half().float(), eleven * zero), "which takes the coarser scales"


def test_rounding_scales_keeps_underflow_and_overflow() -> None:
    spec = GridSpec(bits=4, symmetric=True, scale_bits=8)
    w = torch.tensor([[0.0, 1e-9, 65504.0 * 15, 65500.0 * 7.5]]).expand(16, 4)
    assert find_grid(w, spec)[0].tolist() == [1.0, TINY, math.inf, math.inf], "the last is rounded up out of fp16"
