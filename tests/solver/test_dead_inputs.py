"""Inputs that are 0 in every calibration token: they change nothing for the others, and their weights are rounded to nearest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bigq.quantized_weight import QuantizedWeight
from bigq.scheme import QuantScheme
from bigq.solver.gptq import quantize_linear
from bigq.solver.rtn import round_to_nearest
from bigq.vocabulary import ORDERS, OrderName

INPUTS, DEAD = 256, 64
IN_ALL_ORDERS = pytest.mark.parametrize("order", ORDERS)


def problem(dead: Tensor) -> tuple[Tensor, Tensor]:
    """A weight [64, 256], and the Hessian of correlated inputs of very different sizes, some of which are always 0. fp32."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.rand(INPUTS, generator=generator) ** 3
    x = torch.randn(1024, INPUTS, generator=generator) @ (torch.randn(INPUTS, INPUTS, generator=generator) * sizes[:, None])
    x[:, dead] = 0
    return torch.randn(64, INPUTS, generator=generator) * 0.02, 2 / len(x) * x.T @ x


def error(weight: Tensor, hessian: Tensor, result: QuantizedWeight) -> float:
    """The relative error of outputs, without damping."""
    e, w, h = result.dequantize(torch.float64) - weight, weight.double(), hessian.double()
    return float(((e @ h) * e).sum() / ((w @ h) * w).sum())


@IN_ALL_ORDERS
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("units", [2.0**14, 2.0**-14, 2.0**-27])
def test_the_units_of_the_inputs_change_nothing(units: float, bits: int, order: OrderName) -> None:
    """A constant on the diagonal of dead inputs would dominate the mean, which damping is a fraction of."""
    weight, hessian = problem(torch.arange(16))
    scheme = QuantScheme(bits=bits, group_size=128, order=order, sweeps=0)
    plain, other = quantize_linear(weight, hessian, scheme), quantize_linear(weight, hessian * units**2, scheme)
    assert torch.equal(plain.codes, other.codes) and torch.equal(plain.scales, other.scales)
    assert other.relative_error == pytest.approx(plain.relative_error, rel=1e-6)
    assert error(weight, hessian, plain) < 0.5 * error(weight, hessian, round_to_nearest(weight, scheme))


@IN_ALL_ORDERS
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group_size", [64, -1])
def test_their_weights_are_rounded_to_nearest(group_size: int, symmetric: bool, order: OrderName) -> None:
    dead = torch.arange(10, 10 + DEAD)
    weight, hessian = problem(dead)
    result = quantize_linear(weight, hessian, QuantScheme(bits=4, group_size=group_size, symmetric=symmetric, order=order, sweeps=0))
    groups = torch.arange(INPUTS) // (INPUTS if group_size == -1 else group_size)
    scale, zero = result.scales.float()[:, groups], result.zeros.float()[:, groups]
    nearest = ((weight / scale).round() + zero).clamp(0, 15)
    assert torch.equal(result.codes[:, dead].float(), nearest[:, dead])
    live = torch.ones(INPUTS, dtype=torch.bool)
    live[dead] = False
    assert not torch.equal(result.codes[:, live].float(), nearest[:, live])
    assert result.dead_inputs == DEAD
    assert float((result.dequantize()[:, dead] - weight[:, dead]).norm() / weight[:, dead].norm()) < 0.15


@IN_ALL_ORDERS
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [3, 4])
def test_a_linear_without_live_inputs_is_rounded_to_nearest(bits: int, symmetric: bool, order: OrderName) -> None:
    weight, hessian = problem(torch.arange(INPUTS))
    scheme = QuantScheme(bits=bits, group_size=32, symmetric=symmetric, order=order, scales="minmax", sweeps=0)
    result, expected = quantize_linear(weight, hessian, scheme), round_to_nearest(weight, scheme)
    for field in ("codes", "scales", "zeros"):
        assert torch.equal(getattr(result, field), getattr(expected, field)), field
    assert result.dead_inputs == INPUTS
    assert result.relative_error == pytest.approx(expected.loss / expected.energy, rel=1e-4)


def test_live_inputs_are_quantized_as_if_the_others_were_not_there() -> None:
    dead = torch.arange(INPUTS // 2)
    weight, hessian = problem(dead)
    scheme = QuantScheme(bits=3, group_size=32, sweeps=0)
    whole = quantize_linear(weight, hessian, scheme)
    alone = quantize_linear(weight[:, INPUTS // 2 :].contiguous(), hessian[INPUTS // 2 :, INPUTS // 2 :].contiguous(), scheme)
    assert torch.equal(whole.codes[:, INPUTS // 2 :], alone.codes)


def test_an_input_that_was_nearly_always_0_is_treated_in_nearly_the_same_way() -> None:
    weight, hessian = problem(torch.tensor([5]))
    rare = hessian.clone()
    rare[5, 5] = 1e-9 * hessian.diagonal().mean()
    scheme = QuantScheme(bits=3, group_size=32, sweeps=0)
    one, other = quantize_linear(weight, hessian, scheme), quantize_linear(weight, rare, scheme)
    assert (one.dead_inputs, other.dead_inputs) == (1, 0)
    assert float((one.codes == other.codes).float().mean()) > 0.95
