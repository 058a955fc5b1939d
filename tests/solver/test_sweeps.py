"""Coordinate descent after the column loop, against a loop over single codes and scales in fp64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from damping_by_hand import usual_by_hand
from torch import Tensor

from bigq.kernels.grid import round_scale
from bigq.quantized_weight import QuantizedWeight
from bigq.scheme import QuantScheme
from bigq.solver.batch import Factors
from bigq.solver.gptq import column_order, quantize_linear, solve, solve_many
from bigq.solver.hessian import factorize
from bigq.vocabulary import ORDERS, OrderName

pytestmark = pytest.mark.usefixtures("one_thread", "poisoned")

SCHEMES = [
    pytest.param(QuantScheme(bits=2, group_size=32, sweeps=0), id="2-sym"),
    pytest.param(QuantScheme(bits=2, group_size=64, symmetric=False, sweeps=0), id="2-asym"),
    pytest.param(QuantScheme(bits=3, group_size=16, symmetric=False, order="natural", scales="minmax", sweeps=0), id="3-asym-natural"),
    pytest.param(QuantScheme(bits=4, group_size=32, scale_bits=8, sweeps=0), id="4-sym, scales of 8 bits"),
    pytest.param(QuantScheme(bits=3, group_size=32, order="activation", sweeps=0), id="3-sym-activation"),
    pytest.param(QuantScheme(bits=3, group_size=-1, sweeps=0), id="3-sym, whole rows"),
]


def problem(m: int = 12, n: int = 192) -> tuple[Tensor, Tensor]:
    """An fp64 weight [m, n], and the Hessian of correlated inputs of different sizes."""
    gen = torch.Generator().manual_seed(4)
    mix = torch.randn(n, n, dtype=torch.float64, generator=gen) * torch.rand(n, generator=gen).double().exp()
    x = torch.randn(3 * n, n, dtype=torch.float64, generator=gen) @ mix + torch.randn(3 * n, 1, dtype=torch.float64, generator=gen)
    return torch.randn(m, n, dtype=torch.float64, generator=gen), 2 / len(x) * x.T @ x


def damped(hessian: Tensor, scheme: QuantScheme) -> Tensor:
    return hessian + scheme.damping * usual_by_hand(hessian.diagonal()) * torch.eye(len(hessian), dtype=hessian.dtype)


def loss(weight: Tensor, result: QuantizedWeight, hessian: Tensor) -> float:
    error = weight - result.dequantize(torch.float64)
    return float(((error @ damped(hessian, result.scheme)) * error).sum())


def textbook_sweep(weight: Tensor, hessian: Tensor, start: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """One sweep from a result: codes and scales. Blocks of 128 columns, within which all scales come before all codes."""
    scheme, n = start.scheme, weight.shape[1]
    factor = factorize(hessian.clone(), order=column_order(scheme, n), damping=scheme.damping)
    perm = torch.arange(n) if factor.perm is None else factor.perm
    h, width = damped(hessian, scheme), scheme.group_width(n)
    codes, scales, zeros = start.codes.double(), start.scales.double(), start.zeros.double()
    group = torch.arange(n) // width
    refined = width <= 128 and scheme.order != "activation"
    step = 128 // width * width if refined else 128
    for a in range(0, n, step):
        columns = perm[a : a + step]
        for g in dict.fromkeys(group[columns].tolist()) if refined else []:
            mine = group == g
            c = (codes - zeros[:, group])[:, mine]
            error = weight - (codes - zeros[:, group]) * scales[:, group]
            along, curve = (c * (error @ h)[:, mine]).sum(1), ((c @ h[mine][:, mine]) * c).sum(1)
            sign = scales[:, g].sign()
            new = sign * round_scale((sign * (scales[:, g] + along / curve)).clamp(min=0), scheme.grid.scale_bits)
            change = new - scales[:, g]
            scales[:, g] = torch.where(2 * change * along > change**2 * curve, new, scales[:, g])
        for j in columns.tolist():
            g = int(group[j])
            error = weight - (codes - zeros[:, group]) * scales[:, group]
            want = codes[:, j] + (error @ h[:, j]) / h[j, j] / scales[:, g]
            codes[:, j] = (torch.round(want - zeros[:, g]) + zeros[:, g]).clamp(0, scheme.grid.max_code)
    return codes, scales


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_sweep_equals_the_textbook(scheme: QuantScheme) -> None:
    weight, hessian = problem()
    start = quantize_linear(weight, hessian, scheme)
    codes, scales = textbook_sweep(weight, hessian, start)
    result = quantize_linear(weight, hessian, dataclasses.replace(scheme, sweeps=1))
    assert torch.equal(result.codes.double(), codes) and torch.equal(result.scales.double(), scales)
    assert torch.equal(result.zeros, start.zeros)
    assert not torch.equal(result.codes, start.codes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_loss_falls_with_each_sweep_and_is_that_of_the_result(scheme: QuantScheme, dtype: torch.dtype) -> None:
    weight, hessian = problem(m=40)
    before = torch.inf
    for count in (0, 1, 2, 5):
        result = quantize_linear(weight.to(dtype), hessian.to(dtype), dataclasses.replace(scheme, sweeps=count))
        assert result.loss == pytest.approx(loss(weight, result, hessian), rel=1e-9 if dtype == torch.float64 else 1e-4)
        assert result.loss < before
        before = result.loss


def test_in_the_end_no_single_code_can_be_better() -> None:
    weight, hessian = problem(m=4, n=64)
    result = quantize_linear(weight, hessian, QuantScheme(bits=2, group_size=32, symmetric=False, sweeps=100))
    reached = loss(weight, result, hessian)
    for i in range(4):
        for j in range(64):
            for code in range(4):
                codes = result.codes.clone()
                codes[i, j] = code
                assert loss(weight, dataclasses.replace(result, codes=codes), hessian) >= reached - 1e-9


@pytest.mark.parametrize("order", ORDERS)
def test_linears_side_by_side_have_the_bits_of_single_ones(order: OrderName) -> None:
    scheme = QuantScheme(bits=2, group_size=32, order=order, sweeps=2)
    weights = [[problem(m)[0].float()] for m in (16, 16)]
    weights[1][0] = weights[1][0].flip(1).contiguous()
    hessians = [problem()[1].float(), problem()[1].float().flip(0, 1).contiguous()]
    factors = [factorize(h.clone(), order=column_order(scheme, len(h)), damping=scheme.damping) for h in hessians]
    r = torch.stack([factor.r for factor in factors])
    each = tuple(dataclasses.replace(factor, r=r[i]) for i, factor in enumerate(factors))
    together = solve_many(weights, Factors(r, each), scheme, ["a", "b"])
    for one, weight, factor in zip(together, weights, factors, strict=True):
        assert isinstance(one, list)
        alone = solve(weight, factor, scheme)[0]
        assert all(torch.equal(getattr(one[0], name), getattr(alone, name)) for name in ("codes", "scales", "zeros"))
        assert one[0].loss == alone.loss


@pytest.mark.long  # the searches take ten seconds each in the interpreter
@pytest.mark.parametrize("scheme", SCHEMES)
def test_on_triton_the_result_is_the_same(scheme: QuantScheme, device: torch.device, request: pytest.FixtureRequest) -> None:
    weight, hessian = (t.float() for t in problem(m=8))
    scheme = dataclasses.replace(scheme, sweeps=2)
    own = quantize_linear(weight, hessian, scheme)
    request.getfixturevalue("triton_path")
    result = quantize_linear(weight.to(device), hessian.to(device), scheme)
    assert result.loss == pytest.approx(own.loss, rel=2e-2)
    assert result.loss == pytest.approx(loss(weight.double(), result, hessian.double()), rel=1e-3)


def test_a_group_of_zeros_keeps_its_scale() -> None:
    weight, hessian = problem(m=4, n=64)
    weight[:, 32:] = 0
    result = quantize_linear(weight, hessian, QuantScheme(bits=3, group_size=32, sweeps=3))
    assert bool(torch.isfinite(result.scales).all()) and bool((result.scales != 0).all())
    assert result.loss == pytest.approx(loss(weight, result, hessian), rel=1e-9)
