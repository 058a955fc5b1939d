"""Exact OBQ, the reference that GPTQ is compared with: its steps by the formulas of its paper, and what it must be better than."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import compare_obq
from compare_obq import SCHEME, loss, obq
from torch import Tensor

from bigq.solver.gptq import quantize_linear
from bigq.solver.rtn import round_to_nearest

M, N = 12, 20


def problem(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * N, N, generator=generator, dtype=torch.float64) @ torch.randn(N, N, generator=generator, dtype=torch.float64)
    h = 2 / len(x) * x.T @ x
    return torch.randn(M, N, generator=generator, dtype=torch.float64), h + 0.01 * h.diagonal().mean() * torch.eye(N, dtype=torch.float64)


def by_hand(row: Tensor, h: Tensor, scale: float, zero: float, most: int) -> Tensor:
    """One row, with the inverse of what is left formed anew at each step, as the method is derived."""
    w, left, done = row.clone(), list(range(len(row))), torch.zeros_like(row)
    while left:
        inverse = torch.linalg.inv(h[left][:, left])
        rounded = scale * torch.clamp(torch.round(w[left] / scale), -zero, most - zero)
        costs = (rounded - w[left]) ** 2 / inverse.diagonal()
        i = int(costs.argmin())
        done[left[i]] = rounded[i]
        w[left] -= (w[left[i]] - rounded[i]) / inverse[i, i] * inverse[:, i]
        del left[i]
    return done


@pytest.mark.parametrize("bits", [2, 4])
def test_all_rows_side_by_side_are_one_row_at_a_time(bits: int) -> None:
    weight, h = problem(bits)
    grid = round_to_nearest(weight.float(), dataclasses.replace(SCHEME, bits=bits))
    found = obq(weight, h, grid.scales, grid.zeros, 2**bits - 1)
    for i in range(M):
        expected = by_hand(weight[i], h, float(grid.scales[i, 0]), float(grid.zeros[i, 0]), 2**bits - 1)
        assert torch.allclose(found[i], expected, atol=1e-9)


def test_losses_are_what_the_methods_promise() -> None:
    """Over several problems OBQ and GPTQ are far below rounding to nearest, and near each other. OBQ's result is on the grid."""
    sums = dict.fromkeys(("rtn", "gptq", "obq"), 0.0)
    for seed in range(6):
        weight, h = problem(seed)
        scheme = dataclasses.replace(SCHEME, bits=3, damping=1e-9, order="natural")
        grid = round_to_nearest(weight.float(), scheme)
        found = obq(weight, h, grid.scales, grid.zeros, 7)
        codes = found / grid.scales.double() + grid.zeros.double()
        assert torch.allclose(codes, codes.round(), atol=1e-9) and codes.min() > -0.5 and codes.max() < 7.5
        sums["rtn"] += loss(weight, grid.dequantize(), h)
        sums["gptq"] += loss(weight, quantize_linear(weight, h, scheme).dequantize(), h)
        sums["obq"] += loss(weight, found, h)
    assert max(sums["obq"], sums["gptq"]) < 0.7 * sums["rtn"]
    assert 0.8 < sums["obq"] / sums["gptq"] < 1.25


def test_the_linears_compared_are_those_of_the_shipped_model() -> None:
    name, weight, h = next(compare_obq.hessians())
    assert name == "model.layers.0.self_attn.q_proj" and h.shape == (weight.shape[1],) * 2
    assert torch.linalg.eigvalsh(h.double()).min() > 0
