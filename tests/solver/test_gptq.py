"""GPTQ against a textbook version in fp64, which forms the inverse and takes one column at a time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import pytest
import torch
from damping_by_hand import usual_by_hand
from torch import Tensor

from bigq.errors import NumericsError, UsageError
from bigq.kernels.grid_spec import REFINED
from bigq.scheme import QuantScheme
from bigq.solver import gptq
from bigq.solver.energy import ENERGY_ROWS
from bigq.solver.gptq import PANEL, column_order, quantize_linear, solve
from bigq.solver.hessian import NATURAL, factorize
from bigq.vocabulary import ORDERS, OrderName

DEAD = (7, 130)


pytestmark = pytest.mark.usefixtures("one_thread", "poisoned")


def problem(m: int, n: int, seed: int = 0, dead: tuple[int, ...] = DEAD) -> tuple[Tensor, Tensor]:
    """An fp64 weight [m, n] and the Hessian of correlated inputs, some of them always zero."""
    gen = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, dtype=torch.float64, generator=gen) / n**0.5
    x = torch.randn(3 * n, n, dtype=torch.float64, generator=gen) @ mix
    x *= torch.rand(n, dtype=torch.float64, generator=gen) * 3
    x[:, [d for d in dead if d < n]] = 0
    return 0.02 * torch.randn(m, n, dtype=torch.float64, generator=gen), 2 / len(x) * x.T @ x


def cheap_problem(m: int, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Like ``problem``, for large n: the inputs are a few common factors plus independent noise."""
    gen = torch.Generator().manual_seed(seed)
    causes = torch.randn(n, 24, dtype=torch.float64, generator=gen)
    own = 24 * torch.rand(n, dtype=torch.float64, generator=gen) + 1
    return 0.02 * torch.randn(m, n, dtype=torch.float64, generator=gen), causes @ causes.T + torch.diag(own)


def textbook_range_grid(low: Tensor, high: Tensor, scheme: QuantScheme, part: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """Of a part of the range. In a search, the spare step of a symmetric grid is on the longer side, or else, with a negative part."""
    top = 2**scheme.bits - 1
    above, low, high = (high > low.abs()) == torch.as_tensor(part > 0), abs(part) * low, abs(part) * high
    if scheme.symmetric:
        scale = (2 * torch.maximum(low.abs(), high) / top).half().double()
        return torch.where(above & (scheme.scales == "search"), -scale, scale), torch.full_like(scale, 2 ** (scheme.bits - 1))
    scale = ((high - low) / top).half().double()
    return scale, (-low / scale).round().clamp(0, top)


Solve = Callable[[Tensor, Tensor], Tensor]


def textbook_grid(w: Tensor, scheme: QuantScheme, error: Solve | None = None) -> tuple[Tensor, Tensor]:
    """Scale (rounded to fp16) and zero of every row of w [m, g]: of its range, or of the range with the least error, [m] for given grids.

    Without ``error``, the range.
    """
    low, high = w.amin(1).clamp(max=0), w.amax(1).clamp(min=0)
    if error is None:
        return textbook_range_grid(low, high, scheme)
    grids = [textbook_range_grid(low, high, scheme, i / 100) for i in scheme.grid.tried]
    return best_of(grids, torch.stack([error(*grid) for grid in grids]))


def best_of(grids: list[tuple[Tensor, Tensor]], errors: Tensor) -> tuple[Tensor, Tensor]:
    best = errors.min(0, keepdim=True).indices
    scales, zeros = (torch.stack(part).gather(0, best)[0] for part in zip(*grids, strict=True))
    return scales, zeros


def rounded(w: Tensor, scale: Tensor, zero: Tensor, scheme: QuantScheme) -> Tensor:
    """Codes of weights [m] or [m, g]."""
    scale, zero = (part if w.ndim == 1 else part[:, None] for part in (scale, zero))
    return ((w / scale).round() + zero).clamp(0, 2**scheme.bits - 1)


def squared_error(w: Tensor, weights: Tensor, scheme: QuantScheme) -> Solve:
    """Of weights [m, g], weighted by [g]."""

    def error(scale: Tensor, zero: Tensor) -> Tensor:
        values = scale[:, None] * (rounded(w, scale, zero, scheme) - zero[:, None])
        return ((w - values).square() * weights).sum(1)

    return error


def loss_in_group(w: Tensor, u: Tensor, scheme: QuantScheme) -> Solve:
    """Of GPTQ on the columns [m, g] of one group with a grid, and its part of U."""

    def error(scale: Tensor, zero: Tensor) -> Tensor:
        left, total = w.clone(), torch.zeros(len(w), dtype=w.dtype)
        for j in range(w.shape[1]):
            spread = (left[:, j] - scale * (rounded(left[:, j], scale, zero, scheme) - zero)) / u[j, j]
            total += spread.square()
            left[:, j:] -= spread[:, None] * u[j, j:]
        return total

    return error


def textbook_loss_grid(w: Tensor, u: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    """The grid of the least loss among the ranges that are tried first, then among those around each row's best."""
    low, high, error = w.amin(1).clamp(max=0), w.amax(1).clamp(min=0), loss_in_group(w, u, scheme)

    def best(parts: list[Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        grids = [textbook_range_grid(low, high, scheme, p) for p in parts]
        errors = torch.stack([error(*grid) for grid in grids])
        return torch.stack(parts).gather(0, errors.min(0, keepdim=True).indices)[0], best_of(grids, errors)

    part, grid = best([torch.full_like(low, i / 100) for i in scheme.grid.solved])
    for step in REFINED:
        part, grid = best([part, part - step / 100, part + step / 100])
    return grid


def textbook_order(diagonal: Tensor, width: int, order: OrderName) -> Tensor:
    n = len(diagonal)
    if order == "natural":
        return torch.arange(n)
    if order == "activation":
        return torch.argsort(diagonal, descending=True, stable=True)
    total = [float(diagonal[g * width : (g + 1) * width].sum()) for g in range(n // width)]
    groups = sorted(range(n // width), key=lambda g: -total[g])
    return torch.tensor([j for g in groups for j in sorted(range(g * width, (g + 1) * width), key=lambda j: -float(diagonal[j]))])


def textbook_gptq(weight: Tensor, hessian: Tensor, scheme: QuantScheme) -> tuple[Tensor, float]:
    """Codes and loss by Frantar et al. 2022, algorithm 1, without blocks.

    Scales are those of the original weights by activation order, with one group, at 2 bits without a search, and in groups wider than
    128 with one. These are searched for twice, the second time for the weights that the loop meets with the first.
    """
    w, h, n = weight.double(), hessian.double().clone(), weight.shape[1]
    width = n if scheme.group_size == -1 else scheme.group_size
    search = scheme.scales == "search"
    perm = textbook_order(h.diag(), width, scheme.order)
    h = h[perm][:, perm]
    h += scheme.damping * usual_by_hand(h.diag()) * torch.eye(n, dtype=torch.float64)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    u = torch.linalg.cholesky(inverse, upper=True)
    static = scheme.order == "activation" or width == n or (width > 128 if search else scheme.bits == 2)
    if not static:
        return textbook_loop(w, u, perm, None, scheme)[:2]
    met, found = w, {}
    for _ in range(2 if search else 1):
        for g in range(n // width):
            columns = slice(g * width, (g + 1) * width)
            pivots = torch.empty(n, dtype=torch.float64).index_copy_(0, perm, u.diag())[columns]
            error = squared_error(met[:, columns], pivots.square().reciprocal(), scheme) if search else None
            found[g] = textbook_grid(met[:, columns], scheme, error)
        codes, loss, met = textbook_loop(w, u, perm, found, scheme)
    if search:
        codes, loss, _ = textbook_loop(w, u, perm, found, scheme)
    return codes, loss


def textbook_loop(
    w: Tensor, u: Tensor, perm: Tensor, given: dict[int, tuple[Tensor, Tensor]] | None, scheme: QuantScheme
) -> tuple[Tensor, float, Tensor]:
    """Codes, loss and the weights that were rounded, columns in natural order. given: the grids; None: found when a group's turn comes."""
    n = w.shape[1]
    width = n if scheme.group_size == -1 else scheme.group_size
    left, met, grids = w[:, perm].clone(), torch.empty_like(w), dict(given or {})
    codes, loss = torch.zeros(w.shape, dtype=torch.uint8), 0.0
    for j in range(n):
        column = int(perm[j])
        if given is None and j % width == 0:
            group = slice(j, j + width)
            search = scheme.scales == "search"
            found = textbook_loss_grid(left[:, group], u[group, group], scheme) if search else textbook_grid(left[:, group], scheme)
            grids[column // width] = found
        scale, zero = grids[column // width]
        met[:, column] = left[:, j]
        code = rounded(left[:, j], scale, zero, scheme)
        codes[:, column] = code.to(torch.uint8)
        error = (left[:, j] - scale * (code - zero)) / u[j, j]
        loss += float(error.square().sum())
        left[:, j:] -= error[:, None] * u[j, j:]
    return codes, loss, met


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize("group_size", [-1, 32, 64, 128, 256])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_equal_the_textbook(bits: int, group_size: int, symmetric: bool, order: OrderName) -> None:
    weight, hessian = problem(16, 256)
    scheme = QuantScheme(bits=bits, group_size=group_size, symmetric=symmetric, order=order, scales="minmax", sweeps=0)
    codes, loss = textbook_gptq(weight, hessian, scheme)
    result = quantize_linear(weight, hessian, scheme)
    assert torch.equal(result.codes, codes)
    assert result.loss == pytest.approx(loss, rel=1e-9)
    assert result.scheme == scheme and result.damping == scheme.damping
    groups = 1 if group_size == -1 else 256 // group_size
    assert (result.codes.dtype, result.scales.dtype, result.zeros.dtype) == (torch.uint8, torch.float16, torch.uint8)
    assert result.scales.shape == result.zeros.shape == (16, groups)


@pytest.mark.parametrize(
    ("n", "group_size", "order"),
    [
        pytest.param(160, 32, "natural", id="short last block"),
        pytest.param(160, 32, "activation", id="short last block, act-order"),
        pytest.param(200, -1, "natural", id="whole row of odd length"),
        pytest.param(200, -1, "activation", id="whole row of odd length, act-order"),
        pytest.param(272, 136, "natural", id="groups wider than a block"),
        pytest.param(240, 48, "natural", id="groups that do not fill a block"),
        pytest.param(136, 8, "natural", id="smallest groups"),
        pytest.param(200, 40, "activation", id="groups of 40, act-order"),
        pytest.param(8, 8, "natural", id="one tiny group"),
        pytest.param(240, 48, "group", id="groups that do not fill a block, by importance"),
        pytest.param(272, 136, "group", id="groups wider than a block, by importance"),
    ],
)
@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
def test_odd_widths_equal_the_textbook(n: int, group_size: int, order: OrderName, symmetric: bool) -> None:
    weight, hessian = problem(12, n, seed=1)
    scheme = QuantScheme(bits=3, group_size=group_size, symmetric=symmetric, order=order, damping=0.05, scales="minmax", sweeps=0)
    codes, loss = textbook_gptq(weight, hessian, scheme)
    result = quantize_linear(weight, hessian, scheme)
    assert torch.equal(result.codes, codes)
    assert result.loss == pytest.approx(loss, rel=1e-9)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize("group_size", [-1, 32, 160])
@pytest.mark.parametrize("bits", [2, 3])
def test_grid_search_equals_the_textbook(bits: int, group_size: int, symmetric: bool, order: OrderName) -> None:
    weight, hessian = problem(12, 320, seed=2)
    scheme = QuantScheme(bits=bits, group_size=group_size, symmetric=symmetric, order=order, scales="search", sweeps=0)
    result = quantize_linear(weight, hessian, scheme)
    assert torch.equal(result.codes, textbook_gptq(weight, hessian, scheme)[0])
    assert not torch.equal(result.codes, textbook_gptq(weight, hessian, dataclasses.replace(scheme, scales="minmax"))[0])


@pytest.mark.parametrize(
    "scheme",
    [
        QuantScheme(bits=4, group_size=128, scales="minmax", sweeps=0),
        QuantScheme(bits=4, group_size=32, symmetric=False, order="activation", scales="minmax", sweeps=0),
        QuantScheme(bits=2, group_size=64, symmetric=False, scales="minmax", sweeps=0),
        QuantScheme(bits=3, group_size=-1, order="activation", scales="minmax", sweeps=0),
        QuantScheme(bits=8, group_size=256, symmetric=False, scales="minmax", sweeps=0),
    ],
    ids=lambda s: f"{s.bits}bit-g{s.group_size}",
)
def test_fp32_has_the_same_loss(scheme: QuantScheme) -> None:
    """In fp32 some weights near the middle of two codes are rounded differently. Over enough rows the loss is the same."""
    weight, hessian = problem(1024, 256, seed=3)
    result = quantize_linear(weight.float(), hessian.float(), scheme)
    assert result.loss == pytest.approx(textbook_gptq(weight.float(), hessian.float(), scheme)[1], rel=1e-3)


@pytest.mark.parametrize(
    ("n", "m", "scheme"),
    [
        pytest.param(768, 8, QuantScheme(bits=4, group_size=128, order="activation", scales="minmax", sweeps=0), id="static"),
        pytest.param(768, 6, QuantScheme(bits=3, group_size=-1, scales="minmax", sweeps=0), id="static, whole rows"),
        pytest.param(768, 8, QuantScheme(bits=3, group_size=64, symmetric=False, scales="minmax", sweeps=0), id="dynamic"),
        pytest.param(768, 8, QuantScheme(bits=4, group_size=384, scales="minmax", sweeps=0), id="dynamic, two blocks and a half"),
        pytest.param(
            1536, 4, QuantScheme(bits=3, group_size=768, symmetric=False, scales="minmax", sweeps=0), id="dynamic, wider than a panel"
        ),
        pytest.param(
            1536, 4, QuantScheme(bits=2, group_size=768, symmetric=False, scales="minmax", sweeps=0), id="static, wider than a panel"
        ),
        pytest.param(2048, 4, QuantScheme(bits=4, group_size=1024, scales="minmax", sweeps=0), id="dynamic, twice as wide"),
    ],
)
def test_several_panels_equal_the_textbook(n: int, m: int, scheme: QuantScheme) -> None:
    assert n > PANEL
    weight, hessian = cheap_problem(m, n)
    codes, loss = textbook_gptq(weight, hessian, scheme)
    result = quantize_linear(weight, hessian, scheme)
    assert torch.equal(result.codes, codes)
    assert result.loss == pytest.approx(loss, rel=1e-9)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("block", "panel"), [(16, 48), (32, 64), (16, 160), (24, 1000)])
@pytest.mark.parametrize("group_size", [-1, 8, 16, 48, 80, 240])
def test_panels_and_blocks_of_any_width_equal_the_textbook(
    group_size: int, block: int, panel: int, order: OrderName, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gptq, "BLOCK", block)
    monkeypatch.setattr(gptq, "PANEL", panel)
    weight, hessian = problem(5, 480, seed=8, dead=(7, 100, 479))
    scheme = QuantScheme(bits=3, group_size=group_size, symmetric=False, order=order, scales="minmax", sweeps=0)
    codes, loss = textbook_result(scheme)
    result = quantize_linear(weight, hessian, scheme)
    assert torch.equal(result.codes, codes)
    assert result.loss == pytest.approx(loss, rel=1e-9)


@functools.cache
def textbook_result(scheme: QuantScheme) -> tuple[Tensor, float]:
    return textbook_gptq(*problem(5, 480, seed=8, dead=(7, 100, 479)), scheme)


TRITON_CASES = [
    pytest.param(256, 8, QuantScheme(bits=4, group_size=128, scales="minmax", sweeps=0), id="4bit-g128"),
    pytest.param(160, 8, QuantScheme(bits=3, group_size=32, symmetric=False, scales="minmax", sweeps=0), id="3bit-g32-asym"),
    pytest.param(
        192,
        8,
        QuantScheme(bits=2, group_size=64, symmetric=False, order="activation", scales="minmax", sweeps=0),
        id="2bit-g64-asym-act-order",
    ),
    pytest.param(136, 17, QuantScheme(bits=4, group_size=-1, scales="minmax", sweeps=0), id="4bit-whole-rows"),
    pytest.param(512, 8, QuantScheme(bits=4, group_size=256, scales="minmax", sweeps=0), id="4bit-g256"),
    pytest.param(272, 8, QuantScheme(bits=4, group_size=136, symmetric=False, min_zero=1, scales="minmax", sweeps=0), id="4bit-g136-asym"),
    pytest.param(96, 8, QuantScheme(bits=3, group_size=32, scales="search", sweeps=0), id="3bit-g32-mse"),
    pytest.param(240, 9, QuantScheme(bits=8, group_size=48, scales="minmax", sweeps=0), id="8bit-g48"),
]


@pytest.mark.parametrize(("n", "m", "scheme"), TRITON_CASES)
def test_on_triton_the_result_is_the_same(
    n: int, m: int, scheme: QuantScheme, device: torch.device, request: pytest.FixtureRequest
) -> None:
    """Plain torch on the CPU, Triton, and the textbook in fp64, of one fp32 weight and Hessian.

    Products are summed in other orders, so a weight near the middle of two codes may go the other way.
    """
    weight, hessian = (t.float() for t in problem(m, n, seed=9))
    own = quantize_linear(weight, hessian, scheme)
    request.getfixturevalue("triton_path")
    result = quantize_linear(weight.to(device), hessian.to(device), scheme)
    assert result.codes.device.type == device.type
    assert float((result.codes.cpu() == own.codes).double().mean()) >= 0.999
    assert float((result.scales.cpu() == own.scales).double().mean()) >= 0.99 and torch.equal(result.zeros.cpu(), own.zeros)
    assert result.loss == pytest.approx(textbook_gptq(weight, hessian, scheme)[1], rel=1e-3)
    assert result.energy == pytest.approx(own.energy, rel=1e-5)


@pytest.mark.usefixtures("triton_path")
@pytest.mark.parametrize("order", ORDERS)
def test_on_triton_linears_solved_together_equal_those_solved_apart(order: OrderName, device: torch.device) -> None:
    weight, hessian = (t.float().to(device) for t in problem(12, 64, seed=6))
    scheme = QuantScheme(bits=4, group_size=32, symmetric=False, order=order, scales="minmax", sweeps=0)
    factor = factorize(hessian.clone(), order=column_order(scheme, hessian.shape[0]), damping=scheme.damping)
    parts = list(weight.split([3, 1, 8]))
    for part, joint in zip(parts, solve(parts, factor, scheme), strict=True):
        alone = quantize_linear(part, hessian, scheme)
        same = (joint.codes == alone.codes).double().mean()
        assert float(same) >= 0.999 and torch.equal(joint.scales, alone.scales) and torch.equal(joint.zeros, alone.zeros)


@pytest.mark.usefixtures("triton_path")
def test_on_triton_each_row_gets_its_own_codes(device: torch.device) -> None:
    """So the comparisons above would detect exchanged rows."""
    weight, hessian = (t.float().to(device) for t in problem(8, 96, seed=9))
    scheme = QuantScheme(bits=4, group_size=32, sweeps=0)
    one, other = (quantize_linear(w, hessian, scheme) for w in (weight, weight.flip(0)))
    assert torch.equal(other.codes.flip(0), one.codes)
    assert float((other.codes == one.codes).double().mean()) < 0.5


@pytest.mark.usefixtures("triton_path")
def test_on_triton_fp64_stays_exact(device: torch.device) -> None:
    weight, hessian = problem(6, 160)
    scheme = QuantScheme(bits=3, group_size=32, symmetric=False, sweeps=0)
    codes, loss = textbook_gptq(weight, hessian, scheme)
    result = quantize_linear(weight.to(device), hessian.to(device), scheme)
    assert torch.equal(result.codes.cpu(), codes) and result.loss == pytest.approx(loss, rel=1e-9)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
def test_loss_and_energy_are_the_quadratic_forms_of_the_result(symmetric: bool, order: OrderName) -> None:
    weight, hessian = problem(16, 192, seed=4)
    result = quantize_linear(weight, hessian, QuantScheme(bits=3, group_size=64, symmetric=symmetric, order=order, damping=0.02, sweeps=0))
    damped = hessian.clone()
    damped += 0.02 * usual_by_hand(hessian.diag()) * torch.eye(192, dtype=torch.float64)
    scales, zeros = (t.double().repeat_interleave(64, 1) for t in (result.scales, result.zeros))
    error = weight - scales * (result.codes.double() - zeros)
    loss, energy = (float(torch.trace(e @ damped @ e.T)) for e in (error, weight))
    assert result.loss == pytest.approx(loss, rel=1e-9)
    assert result.energy == pytest.approx(energy, rel=1e-9)
    assert result.relative_error == pytest.approx(loss / energy, rel=1e-9)


def energy_by_hand(weight: Tensor, hessian: Tensor, scheme: QuantScheme) -> float:
    n = len(hessian)
    damped = hessian + scheme.damping * usual_by_hand(hessian.diag()) * torch.eye(n, dtype=torch.float64)
    return float(((weight @ damped) * weight).sum())


@pytest.mark.parametrize("m", [1, ENERGY_ROWS // 2, ENERGY_ROWS])
def test_energy_of_few_rows_is_exact(m: int) -> None:
    weight, hessian = problem(m, 64, dead=())
    weight[m // 2 :] *= 3
    scheme = QuantScheme(group_size=32, sweeps=0)
    assert quantize_linear(weight, hessian, scheme).energy == pytest.approx(energy_by_hand(weight, hessian, scheme), rel=1e-9)


@pytest.mark.parametrize("m", [ENERGY_ROWS + 1, 2 * ENERGY_ROWS, 2 * ENERGY_ROWS + 1, 1000])
@pytest.mark.parametrize("rows", ["alike", "larger at the end", "larger where it does not look"])
def test_energy_of_many_rows_is_estimated(rows: str, m: int) -> None:
    """To 10 %, also if the sampled rows differ from the others."""
    weight, hessian = problem(m, 256, dead=())
    step = -(-m // ENERGY_ROWS)
    factors = {"alike": torch.ones(m), "larger at the end": 1 + torch.arange(m) / m, "larger where it does not look": torch.ones(m)}[rows]
    if rows == "larger where it does not look":
        factors[torch.arange(m) % step != 0] = 10
    weight *= factors[:, None]
    scheme = QuantScheme(group_size=32, sweeps=0)
    energy, exact = quantize_linear(weight, hessian, scheme).energy, energy_by_hand(weight, hessian, scheme)
    assert energy == pytest.approx(exact, rel=0.1)
    assert energy != pytest.approx(exact, rel=1e-9), "it was not estimated"


@pytest.mark.parametrize("points", [False, True], ids=["with a loss", "without"])
@pytest.mark.parametrize("m", [ENERGY_ROWS + 1, 4 * ENERGY_ROWS - 1, 700])
def test_energy_of_equal_rows_is_exact_however_many(m: int, points: bool) -> None:
    """The estimate counts all rows exactly once, also if every weight is on the grid and the loss is 0."""
    weight, hessian = problem(1, 600, dead=())
    if points:
        weight = torch.arange(600, dtype=torch.float64)[None] % 16 - 7.5
        weight = (weight.round() / 8).clamp(-1, 0.875)
    weight = weight.expand(m, -1)
    scheme = QuantScheme(group_size=120, symmetric=False, order="activation", sweeps=0)
    result = quantize_linear(weight, hessian, scheme)
    assert result.energy == pytest.approx(energy_by_hand(weight, hessian, scheme), rel=1e-9)
    assert (result.loss == 0) == points


def test_energy_is_of_each_linears_own_rows() -> None:
    few, many = ENERGY_ROWS - 1, 5 * ENERGY_ROWS
    weight, hessian = problem(few + many, 256, dead=())
    weight[:few] *= 5
    scheme = QuantScheme(group_size=32, sweeps=0)
    factor = factorize(hessian.clone(), order=NATURAL, damping=scheme.damping)
    parts = list(weight.split([few, many]))
    one, other = (result.energy for result in solve(parts, factor, scheme))
    assert one == pytest.approx(energy_by_hand(parts[0], hessian, scheme), rel=1e-9)
    assert other == pytest.approx(energy_by_hand(parts[1], hessian, scheme), rel=0.1)


def test_relative_error_of_a_zero_weight_is_zero() -> None:
    _, hessian = problem(4, 64)
    result = quantize_linear(torch.zeros(4, 64, dtype=torch.float64), hessian, QuantScheme(group_size=32, symmetric=False, sweeps=0))
    assert (result.loss, result.energy, result.relative_error) == (0, 0, 0)


def test_gptq_beats_rounding_to_nearest() -> None:
    """Rounding to the same kind of grid has a higher loss under the same Hessian."""
    weight, hessian = problem(64, 128, seed=5, dead=())
    scheme = QuantScheme(bits=3, group_size=128, sweeps=0)
    scale, zero = (t[:, None] for t in textbook_grid(weight, scheme))
    rounded = weight - scale * (((weight / scale).round() + zero).clamp(0, 7) - zero)
    result = quantize_linear(weight, hessian, scheme)
    error = weight - result.dequantize(torch.float64)
    assert float(((error @ hessian) * error).sum()) < 0.9 * float(((rounded @ hessian) * rounded).sum())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
def test_linears_solved_together_equal_those_solved_apart(symmetric: bool, order: OrderName) -> None:
    weight, hessian = problem(40, 160, seed=6)
    scheme = QuantScheme(bits=4, group_size=32, symmetric=symmetric, order=order, sweeps=0)
    parts = list(weight.split([24, 1, 15]))
    together = solve(parts, factorize(hessian.clone(), order=column_order(scheme, hessian.shape[0]), damping=scheme.damping), scheme)
    assert len(together) == 3
    for part, joint in zip(parts, together, strict=True):
        alone = quantize_linear(part, hessian, scheme)
        for field in ("codes", "scales", "zeros"):
            assert torch.equal(getattr(joint, field), getattr(alone, field)), field
        assert joint.loss == pytest.approx(alone.loss, rel=1e-9)
        assert joint.energy == pytest.approx(alone.energy, rel=1e-9)


@pytest.mark.parametrize("multiple", [0.5, 3.0, 1e4])
def test_a_multiple_of_the_hessian_gives_the_same_codes(multiple: float) -> None:
    weight, hessian = problem(16, 128, seed=7, dead=())
    scheme = QuantScheme(bits=4, group_size=64, sweeps=0)
    one, other = quantize_linear(weight, hessian, scheme), quantize_linear(weight, multiple * hessian, scheme)
    assert torch.equal(one.codes, other.codes)
    assert other.loss == pytest.approx(multiple * one.loss, rel=1e-9)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inputs_are_not_changed(dtype: torch.dtype, order: OrderName) -> None:
    weight, hessian = (t.to(dtype) for t in problem(8, 160))
    before = weight.clone(), hessian.clone()
    quantize_linear(weight, hessian, QuantScheme(group_size=32, order=order, sweeps=0))
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_weights_are_quantized_as_their_exact_values(dtype: torch.dtype) -> None:
    weight, hessian = (t.float() for t in problem(16, 128))
    scheme = QuantScheme(group_size=64, symmetric=False, sweeps=0)
    result, exact = (quantize_linear(w, hessian, scheme) for w in (weight.to(dtype), weight.to(dtype).float()))
    assert torch.equal(result.codes, exact.codes) and torch.equal(result.scales, exact.scales)


@pytest.mark.parametrize("shape", [(64, 63), (128, 128), (64,)])
def test_a_hessian_of_the_wrong_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"hessian: must be 64 × 64 for a weight of 4 × 64, not " + str(shape[0])):
        quantize_linear(torch.randn(4, 64), torch.ones(shape), QuantScheme(group_size=32, sweeps=0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused(bad: float) -> None:
    weight, hessian = problem(4, 64)
    weight[2, 9] = bad
    with pytest.raises(NumericsError, match="weight contains NaN or Inf"):
        quantize_linear(weight, hessian, QuantScheme(group_size=32, sweeps=0))


@pytest.mark.parametrize("at", [(5, 5), (3, 50)], ids=["on the diagonal", "beside it"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_hessian_that_is_not_finite_is_refused(bad: float, at: tuple[int, int]) -> None:
    weight, hessian = problem(4, 64)
    hessian[at] = hessian[at[::-1]] = bad
    with pytest.raises(NumericsError, match="Hessian"):
        quantize_linear(weight, hessian, QuantScheme(group_size=32, sweeps=0))


@pytest.mark.parametrize("order", ORDERS)
def test_a_group_size_that_does_not_divide_is_refused(order: OrderName) -> None:
    weight, hessian = problem(4, 160)
    with pytest.raises(UsageError, match="group size 48 does not divide 160"):
        quantize_linear(weight, hessian, QuantScheme(group_size=48, order=order, sweeps=0))


def test_a_weight_beyond_fp16_scales_is_refused() -> None:
    weight, hessian = problem(4, 64)
    with pytest.raises(NumericsError, match="above 65504, the maximum of fp16"):
        quantize_linear(weight * 1e9, hessian, QuantScheme(group_size=32, sweeps=0))
