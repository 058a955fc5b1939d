"""Scales that rows of a block share, and weights that are solved with them, against plain fp64 computations."""

from __future__ import annotations

import math

import pytest
import torch
from damping_by_hand import usual_by_hand
from torch import Tensor

from bigq.kernels.grid_spec import BOOKS
from bigq.methods.rtn import Rtn
from bigq.scheme import QuantScheme
from bigq.solver.batch import HessianSums
from bigq.solver.gptq import column_order, quantize_linear, solve, solve_many
from bigq.solver.hessian import factorize
from bigq.solver.rtn import round_to_nearest
from bigq.solver.scaling import Reader, _output_error
from bigq.solver.settling import of_blocks, settled_

SCHEME = QuantScheme(bits=8, group_size=128, points="e4m3", scale_form="block", order="natural", sweeps=0)
POINTS = torch.tensor(BOOKS["e4m3"], dtype=torch.float64)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def scales_by_hand(w: Tensor) -> Tensor:
    """fp64 [⌈m/128⌉, n/128]: the largest magnitude of each block over 448, as a bf16 number."""
    m, n = w.shape
    found = torch.empty(math.ceil(m / 128), n // 128, dtype=torch.float64)
    for i in range(found.shape[0]):
        for g in range(found.shape[1]):
            block = w[128 * i : 128 * i + 128, 128 * g : 128 * g + 128]
            found[i, g] = float((block.abs().max().float() / 448).bfloat16()) or 1.0
    return found


def nearest_by_hand(x: Tensor) -> Tensor:
    """The point of E4M3 that is nearest to each number, by comparing with all of them."""
    return POINTS[(x[..., None] - POINTS).abs().argmin(-1)]


def test_rows_of_a_block_share_the_largest_scale() -> None:
    scale = randn(3, 300).abs() * 1e-3
    scale[1, :128] = 0
    found = of_blocks(scale)
    for g in range(3):
        for first in (0, 128, 256):
            part = scale[g, first : first + 128]
            expected = 1.0 if not part.any() else float(part.max().bfloat16())
            assert found[g, first : first + 128].tolist() == [expected] * len(part)
    assert torch.equal(of_blocks(scale.double()).float(), found)
    tiny = torch.full((1, 4), 1e-36)  # far below the smallest fp16 number
    assert torch.equal(of_blocks(tiny), tiny.bfloat16().float())


def test_matrices_are_settled_by_themselves() -> None:
    """Of Linears that are solved together, and in a batch: none shares a block with the next one."""
    scale = randn(2, 3, 340).abs()
    found = scale.clone()
    assert list(settled_(found, [200, 140], "block")) == [None, None]
    for i in range(2):
        assert torch.equal(found[i], torch.cat([of_blocks(scale[i, :, :200]), of_blocks(scale[i, :, 200:])], 1))


@pytest.mark.parametrize("m", [128, 200, 16])
def test_rounding_equals_a_plain_computation(m: int) -> None:
    """Two rows of a block are far larger than the others."""
    w = randn(m, 256) * 0.02
    w[3] *= 30
    w[5, 128:] *= 9
    found = round_to_nearest(w, SCHEME)
    scale = scales_by_hand(w).repeat_interleave(128, 0)[:m].repeat_interleave(128, 1)
    expected = nearest_by_hand((w.double() / scale).clamp(-448, 448)) * scale
    assert found.scales.dtype == torch.float32 and found.scales.shape == (m, 2)
    same = found.dequantize().double() == expected
    halfway = ((w.double() / scale - found.dequantize().double() / scale).abs() - (w.double() / scale - expected / scale).abs()).abs()
    assert float((~same).double().mean()) < 1e-3 and float(halfway.max()) < 1e-4  # ties, and quotients in fp32
    assert found.loss == pytest.approx(float((w.double() - expected).square().sum()), rel=1e-4)
    assert torch.equal(Rtn().quantize(w, SCHEME, "x").codes, found.codes)


def problem(m: int, n: int) -> tuple[Tensor, Tensor]:
    common = randn(2 * n, n // 8, seed=1, dtype=torch.float64) @ randn(n // 8, n, seed=3, dtype=torch.float64)
    x = (common + randn(2 * n, n, seed=4, dtype=torch.float64)) * torch.logspace(-1, 0.5, n, dtype=torch.float64)
    return randn(m, n, seed=2, dtype=torch.float64) * 0.03, 2 / len(x) * x.T @ x


def gptq_by_hand(w: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """(weights, their scales) of the algorithm as it is published, column by column with the inverse Hessian."""
    m, n = w.shape
    damped = h + 0.01 * usual_by_hand(h.diagonal()) * torch.eye(n, dtype=torch.float64)
    u = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    scale = scales_by_hand(w).repeat_interleave(128, 0)[:m]
    left, q = w.clone(), torch.empty_like(w)
    for j in range(n):
        own = scale[:, j // 128]
        q[:, j] = nearest_by_hand((left[:, j] / own).clamp(-448, 448)) * own
        left[:, j:] -= ((left[:, j] - q[:, j]) / u[j, j])[:, None] * u[j, j:]
    return q, scale


@pytest.mark.parametrize("m", [200, 128])
def test_gptq_equals_the_published_algorithm(m: int) -> None:
    w, h = problem(m, 256)
    found = quantize_linear(w, h, SCHEME)
    expected, scale = gptq_by_hand(w, h)
    assert torch.equal(found.scales.double(), scale)
    assert float((found.dequantize().double() - expected).abs().max()) == 0
    error = w - expected
    loss = float((error @ (h + 0.01 * usual_by_hand(h.diagonal()) * torch.eye(256, dtype=torch.float64)) * error).sum())
    assert found.loss == pytest.approx(loss, rel=1e-9)
    nearest = round_to_nearest(w.float(), SCHEME).dequantize().double() - w
    assert loss < 0.8 * float((nearest @ h * nearest).sum())


@pytest.mark.parametrize("order", ["natural", "activation", "group"])
def test_linears_solved_together_equal_those_solved_apart(order: str) -> None:
    """With sweeps too, whose scales stay those of blocks."""
    scheme = QuantScheme(bits=8, group_size=128, points="e4m3", scale_form="block", order=order, sweeps=1)
    w, h = problem(340, 256)
    factor = factorize(h.clone(), order=column_order(scheme, 256), damping=0.01)
    together = solve([w[:200], w[200:]], factor, scheme)
    for found, part in zip(together, (w[:200], w[200:]), strict=True):
        alone = quantize_linear(part, h, scheme)
        assert torch.equal(found.codes, alone.codes) and torch.equal(found.scales, alone.scales)
        assert torch.equal(found.scales.double(), scales_by_hand(part).repeat_interleave(128, 0)[: len(part)])


def test_a_batch_has_the_bits_of_each() -> None:
    sums = HessianSums.zeros(2, 256, torch.device("cpu"))
    for i, one in enumerate(sums.each):
        one.add(randn(600, 256, seed=i))
    factors, failures = sums.factorize(order=column_order(SCHEME, 256), damping=0.01, names=["a", "b"])
    assert factors is not None and failures == [None, None]
    weights = [[randn(144, 256, seed=5 + i)] for i in range(2)]
    many = solve_many(weights, factors, SCHEME, ["a", "b"])
    for each, one, factor in zip(many, weights, factors.each, strict=True):
        assert isinstance(each, list)
        (alone,) = solve(one, factor, SCHEME)
        assert torch.equal(each[0].codes, alone.codes) and torch.equal(each[0].scales, alone.scales)


def test_scales_of_inputs_are_judged_on_the_grid_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever number of rows is judged at once."""
    w, x = randn(300, 256) * torch.logspace(-3, 0, 300)[:, None], randn(20, 256, seed=1)
    scales = torch.logspace(-0.5, 0.5, 256)
    rounded = round_to_nearest(w * scales, SCHEME).dequantize() / scales
    expected = float(((rounded - w).double() @ x.double().T).square().sum())
    for piece in (1, 256 * 130, 10**9):
        monkeypatch.setattr("bigq.solver.scaling.piece", lambda piece=piece, **_: piece)
        assert _output_error(scales, [Reader(w, SCHEME)], x) == pytest.approx(expected, rel=1e-4)
