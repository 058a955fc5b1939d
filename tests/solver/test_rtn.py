"""Rounding to nearest, against a scalar version of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from bigq.errors import NumericsError, UsageError
from bigq.scheme import QuantScheme
from bigq.solver.rtn import round_to_nearest


def weight(m: int = 12, n: int = 96, dtype: torch.dtype = torch.float32) -> Tensor:
    gen = torch.Generator().manual_seed(3)
    return (0.02 * torch.randn(m, n, generator=gen)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group_size", [-1, 32, 48, 96])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_weight_becomes_its_nearest_point(bits: int, symmetric: bool, group_size: int, dtype: torch.dtype) -> None:
    w = weight(dtype=dtype)
    result = round_to_nearest(w, QuantScheme(bits=bits, group_size=group_size, symmetric=symmetric, scales="minmax"))
    width = 96 if group_size == -1 else group_size
    top = 2**bits - 1
    values = w.float().numpy()
    loss = 0.0
    for i in range(12):
        for g in range(96 // width):
            columns = slice(g * width, (g + 1) * width)
            group = values[i, columns]
            low, high = min(group.min(), np.float32(0)), max(group.max(), np.float32(0))
            reach = 2 * max(-low, high) if symmetric else high - low
            scale = np.float16(np.float32(reach) / np.float32(top))
            zero = 2 ** (bits - 1) if symmetric else int(np.clip(np.rint(-low / np.float32(scale)), 0, top))
            assert result.scales[i, g].item() == float(scale) and result.zeros[i, g].item() == zero
            codes = result.codes[i, columns].numpy().astype(np.int64)
            points = (np.arange(top + 1) - zero) * float(scale)
            distance = np.abs(points[codes] - group.astype(np.float64))
            nearest = np.abs(points[None] - group.astype(np.float64)[:, None]).min(1)
            assert (distance <= nearest + 1e-6 * float(scale)).all()
            loss += float((distance**2).sum())
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert result.energy == pytest.approx(float((values.astype(np.float64) ** 2).sum()), rel=1e-6)
    assert result.damping == 0


def test_types_and_shapes() -> None:
    result = round_to_nearest(weight(), QuantScheme(group_size=32))
    assert (result.codes.dtype, result.scales.dtype, result.zeros.dtype) == (torch.uint8, torch.float16, torch.uint8)
    assert result.codes.shape == (12, 96) and result.scales.shape == result.zeros.shape == (12, 3)


def test_weights_on_the_grid_are_unchanged() -> None:
    codes = torch.arange(16).repeat(4, 2).float()
    w = (codes - 5) * 0.25
    result = round_to_nearest(w, QuantScheme(bits=4, group_size=32, symmetric=False))
    assert torch.equal(result.dequantize(), w) and result.loss == 0 and result.relative_error == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name(bad: float) -> None:
    w = weight()
    w[5, 5] = bad
    with pytest.raises(NumericsError, match=r"model\.layers\.3\.up: the weight contains NaN or Inf"):
        round_to_nearest(w, QuantScheme(group_size=32), "model.layers.3.up")


def test_a_group_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UsageError, match="group size 64 does not divide 96"):
        round_to_nearest(weight(), QuantScheme(group_size=64))
