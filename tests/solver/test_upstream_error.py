"""Asymmetric calibration against brute force and normal equations in fp64, and against the paper's column-by-column rule."""

from __future__ import annotations

import itertools

import pytest
import torch
from paper_rule import solve_by_columns
from torch import Tensor

from bigq.errors import NumericsError, UsageError
from bigq.quantized_weight import QuantizedWeight
from bigq.scheme import QuantScheme
from bigq.solver.gptq import column_order, quantize_linear
from bigq.solver.hessian import ACTIVATION, NATURAL, HessianSum, Order, factorize
from bigq.solver.upstream_error import Correction, CrossSum
from bigq.vocabulary import ORDERS, OrderName

pytestmark = pytest.mark.usefixtures("one_thread", "poisoned")

CPU = torch.device("cpu")
DEAD = 7


def problem(m: int, n: int, seed: int = 0, drift: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    """An fp64 weight [m, n], and inputs [3n, n] in the original and in the quantized model; one input is dead only in the latter."""
    gen = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, dtype=torch.float64, generator=gen) / n**0.5
    x = torch.randn(3 * n, n, dtype=torch.float64, generator=gen) @ mix
    now = x + drift * (0.5 * x.roll(1, 1) + torch.randn(x.shape, dtype=torch.float64, generator=gen) @ mix)
    if n > DEAD:
        now[:, DEAD] = 0
    return torch.randn(m, n, dtype=torch.float64, generator=gen), x, now


def matrices(x: Tensor, now: Tensor) -> tuple[Tensor, Tensor]:
    return 2 / len(x) * now.T @ now, 2 / len(x) * (x - now).T @ now


def objective(q: Tensor, w: Tensor, x: Tensor, now: Tensor) -> float:
    """``‖Q·X̂ − W·X‖²``."""
    return float((now @ q.T - x @ w.T).square().sum())


def solved(w: Tensor, x: Tensor, now: Tensor, scheme: QuantScheme, alpha: float = 1.0) -> QuantizedWeight:
    h, d = matrices(x, now)
    return quantize_linear(w, h, scheme, d, alpha)


def values(weight: QuantizedWeight) -> Tensor:
    return weight.dequantize(torch.float64)


def by_columns(w: Tensor, x: Tensor, now: Tensor, scheme: QuantScheme) -> Tensor:
    """The weight that the paper's rule gives."""
    h, d = matrices(x, now)
    factor = factorize(h, order=column_order(scheme, len(h)), damping=scheme.damping)
    return values(solve_by_columns([w], factor, scheme, correction=Correction(d, 1.0))[0])


@pytest.mark.parametrize("order", ORDERS)
def test_the_corrected_target_solves_the_normal_equations(order: OrderName) -> None:
    """Without rounding, W* is the least-squares fit of the original outputs on the inputs X̂."""
    w, x, now = problem(5, 40)
    now[:, DEAD] = torch.randn(len(now), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    h, d = matrices(x, now)
    factor = factorize(h, order=Order(order, 1), damping=0.0)
    target = Correction(d, 1.0).apply(w.clone(), factor)
    assert torch.allclose(target, torch.linalg.lstsq(now, x @ w.T).solution.T, rtol=1e-9, atol=1e-9)
    best = objective(target, w, x, now)
    assert best < 0.9 * objective(w, w, x, now)
    for alpha in (0.9, 1.1):
        assert objective(Correction(d, alpha).apply(w.clone(), factor), w, x, now) > best


def test_damping_is_that_of_the_factor() -> None:
    w, x, now = problem(3, 12)
    h, d = matrices(x, now)
    damped = h.clone()
    damped += 0.1 * damped.diagonal().sum() / 11 * torch.eye(12, dtype=torch.float64)
    expected = w + 0.5 * w @ d @ torch.linalg.inv(damped)
    assert torch.allclose(Correction(d, 0.5).apply(w.clone(), factorize(h, order=ACTIVATION, damping=0.1)), expected, atol=1e-12)


def test_the_objective_is_the_loss_to_the_corrected_target_plus_a_constant() -> None:
    """The identity that makes it GPTQ on another weight, for any Q."""
    w, x, now = problem(4, 24)
    h, d = matrices(x, now)
    dead = h.diagonal() == 0
    factor = factorize(h.clone(), order=NATURAL, damping=1e-12)
    target = Correction(d, 1.0).apply(w.clone(), factor)
    target[:, dead] = 0
    constant = objective(target, w, x, now)
    q = target + 0.1 * torch.randn(4, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    q[:, dead] = 0
    loss = float((((q - target) @ h) * (q - target)).sum()) * len(x) / 2
    assert objective(q, w, x, now) == pytest.approx(constant + loss, rel=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_close_to_the_best_of_all_codes(seed: int) -> None:
    """Exhaustive: a row of 6 weights at 2 bits has 4096 codes. The corrected target is closer to the best than GPTQ."""
    w, x, now = problem(24, 6, seed, drift=1.0)
    scheme = QuantScheme(bits=2, group_size=-1, symmetric=True, damping=1e-6, sweeps=0)
    with_it = solved(w, x, now, scheme)
    h, _ = matrices(x, now)
    without = quantize_linear(w, h, scheme)
    points = torch.tensor(list(itertools.product(range(4), repeat=6)), dtype=torch.float64) - 2
    best = 0.0
    for row, scale in zip(w, with_it.scales.double()[:, 0], strict=True):
        outputs = now @ (points * scale).T - (x @ row)[:, None]
        best += float(outputs.square().sum(0).min())
    reached = objective(values(with_it), w, x, now)
    assert best <= reached * (1 + 1e-12)
    assert reached < 1.7 * best
    assert reached < 0.75 * objective(values(without), w, x, now)


@pytest.mark.parametrize(
    "scheme",
    [
        QuantScheme(bits=3, group_size=-1, scales="minmax", sweeps=0),
        QuantScheme(bits=2, group_size=-1, order="activation", symmetric=False, scales="minmax", sweeps=0),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_lower_objective_than_gptq_and_than_the_column_by_column_rule(scheme: QuantScheme, seed: int) -> None:
    w, x, now = problem(48, 96, seed)
    h, _ = matrices(x, now)
    ours = objective(values(solved(w, x, now, scheme)), w, x, now)
    gptq = objective(values(quantize_linear(w, h, scheme)), w, x, now)
    theirs = objective(by_columns(w, x, now, scheme), w, x, now)
    assert ours < theirs < gptq


@pytest.mark.parametrize(
    "scheme",
    [
        QuantScheme(bits=3, group_size=-1, order="activation", scales="minmax", sweeps=0),
        QuantScheme(group_size=32, symmetric=False, order="activation", scales="minmax", sweeps=0),
    ],
)
def test_the_column_by_column_rule_without_drift_is_gptq(scheme: QuantScheme) -> None:
    """So the reference is right."""
    w, x, _ = problem(16, 64)
    h, _ = matrices(x, x)
    assert torch.equal(by_columns(w, x, x, scheme), values(quantize_linear(w, h, scheme)))


@pytest.mark.parametrize(
    "scheme",
    [
        QuantScheme(group_size=32, sweeps=0),
        QuantScheme(bits=2, group_size=-1, order="activation", sweeps=0),
        QuantScheme(bits=3, group_size=16, scales="search", sweeps=0),
    ],
)
def test_without_drift_or_strength_the_codes_are_those_of_gptq(scheme: QuantScheme) -> None:
    w, x, now = problem(32, 64)
    h, d = matrices(x, now)
    plain = quantize_linear(w.float(), h.float(), scheme)
    for cross, alpha in ((d, 0.0), (torch.zeros_like(d), 1.0)):
        same = quantize_linear(w.float(), h.float(), scheme, cross.float(), alpha)
        assert torch.equal(same.codes, plain.codes) and torch.equal(same.scales, plain.scales) and torch.equal(same.zeros, plain.zeros)
        assert same.loss == plain.loss
    assert not torch.equal(quantize_linear(w.float(), h.float(), scheme, d.float()).codes, plain.codes)


def test_a_dead_input_is_rounded_to_nearest_and_compensated() -> None:
    w, x, now = problem(8, 24)
    weight = solved(w, x, now, QuantScheme(bits=8, group_size=-1, damping=1e-6, sweeps=0))
    step = weight.scales[:, 0].double().abs()
    assert bool(((values(weight)[:, DEAD] - w[:, DEAD]).abs() <= 0.501 * step).all())
    alive = w.clone()
    alive[:, DEAD] = 0
    assert objective(values(weight), w, x, now) < objective(
        values(solved(alive, x, now, QuantScheme(bits=8, group_size=-1, damping=1e-6, sweeps=0))), w, x, now
    )


def test_fp32_is_close_to_fp64() -> None:
    w, x, now = problem(32, 256)
    h, d = matrices(x, now)
    factor = factorize(h.clone(), order=ACTIVATION, damping=0.01)
    exact = Correction(d, 1.0).apply(w.clone(), factor)
    single = Correction(d.float(), 1.0).apply(w.float(), factorize(h.float(), order=ACTIVATION, damping=0.01))
    assert float((single - exact).norm() / (exact - w).norm()) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cross_sum_equals_the_sum_of_products(dtype: torch.dtype) -> None:
    _, x, now = problem(1, 40)
    x, now = x.to(dtype), now.to(dtype)
    total, kept = CrossSum(40, CPU), (x.clone(), now.clone())
    for a, b in ((0, 30), (30, 120)):
        total.add(x[None, a:b], now[None, a:b])
    assert torch.equal(x, kept[0]) and torch.equal(now, kept[1])
    expected = 2 / 120 * (x.double() - now.double()).T @ now.double()
    assert torch.allclose(total.finish(120).double(), expected, atol=1e-5)


def test_equal_inputs_give_exactly_0() -> None:
    _, x, _ = problem(1, 40)
    total = CrossSum(40, CPU)
    total.add(x.bfloat16(), x.bfloat16())
    assert not total.finish(120).any()


def test_numbers_whose_difference_overflows_16_bits() -> None:
    x = torch.full((4, 32), 60000.0, dtype=torch.float16)
    total = CrossSum(32, CPU)
    total.add(x, -x)
    assert torch.allclose(total.finish(8), torch.full((32, 32), -120000.0 * 60000.0))


@pytest.mark.parametrize("where", [0, 1], ids=["original", "quantized"])
def test_tokens_that_are_not_finite(where: int) -> None:
    _, x, now = problem(1, 40)
    expected = CrossSum(40, CPU)
    expected.add(x[1:].float(), now[1:].float())
    pair = [x.float(), now.float()]
    pair[where][0, 3] = torch.inf
    spoilt, masked = CrossSum(40, CPU), CrossSum(40, CPU, finite_only=True)
    spoilt.add(*pair)
    masked.add(*pair)
    with pytest.raises(NumericsError, match=r"^the Linear: its inputs in the original model contain NaN or Inf"):
        spoilt.finish(120)
    assert torch.allclose(masked.finish(120), expected.finish(120), atol=1e-6)
    hessian = HessianSum(40, CPU, finite_only=True)
    hessian.add(pair[1])
    assert hessian.left_out == where


def test_errors_name_the_argument() -> None:
    w, x, now = problem(4, 32)
    h, d = matrices(x, now)
    with pytest.raises(UsageError, match="cross: must be 32 × 32 for a weight of 4 × 32"):
        quantize_linear(w, h, QuantScheme(group_size=32, sweeps=0), d[:16])
    d[0, 0] = torch.nan
    with pytest.raises(NumericsError, match="cross matrix"):
        quantize_linear(w, h, QuantScheme(group_size=32, sweeps=0), d)
