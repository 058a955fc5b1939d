"""The sum of a Hessian and its factor, against fp64."""

from __future__ import annotations

import functools

import pytest
import torch
from conftest import Largest
from damping_by_hand import usual_by_hand
from torch import Tensor

from bigq.errors import NumericsError
from bigq.kernels import cholesky, syrk, triangles
from bigq.solver import hessian
from bigq.solver.hessian import ACTIVATION, NATURAL, HessianSum, Order, factorize, finite_tokens, usual_square
from bigq.vocabulary import ORDERS, OrderName


@functools.cache
def rotation(n: int) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)))[0]


def with_eigenvalues(n: int, lowest: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """A symmetric matrix with mean diagonal 1, one eigenvalue ``lowest``, and the others between about 0.5 and 1.5."""
    q = rotation(n)
    values = torch.linspace(0.5, 1.5, n, dtype=torch.float64)
    values[0] = lowest
    values[1:] += (n - float(values.sum())) / (n - 1)
    h = (q * values) @ q.T
    return ((h + h.T) / 2).to(dtype)


def damped(h: Tensor, perm: Tensor | None, damping: float) -> Tensor:
    """The matrix that should be factored: damping · a usual live input added, in the order of perm; fp64."""
    h = h.double().clone()
    diagonal = h.diagonal()
    diagonal += damping * usual_by_hand(diagonal)
    return h if perm is None else h[perm][:, perm]


def product(r: Tensor) -> Tensor:
    upper = r.double().triu()
    return upper @ upper.T


@pytest.mark.parametrize("n", [1, 7, 67, 256, 301, 515])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sum_over_batches_is_the_mean_outer_product(dtype: torch.dtype, n: int) -> None:
    gen = torch.Generator().manual_seed(n)
    batches = [torch.randn(*shape, n, generator=gen).to(dtype) for shape in [(2, 37), (1, 1), (5,), (3, 2, 21)]]
    total = HessianSum(n, torch.device("cpu"))
    for x in batches:
        total.add(x)
    assert total.tokens == 74 + 1 + 5 + 126
    h = total.finish()
    rows = torch.cat([x.reshape(-1, n) for x in batches]).double()
    expected = 2 / len(rows) * rows.T @ rows
    assert h.dtype == torch.float32 and torch.equal(h, h.T)
    size = expected.diagonal().sqrt()
    assert float(((h.double() - expected) / (size[:, None] * size)).abs().max()) < 2e-6


def test_an_input_that_is_always_zero_has_an_exactly_zero_row() -> None:
    total = HessianSum(300, torch.device("cpu"))
    x = torch.randn(64, 300)
    x[:, [0, 257]] = 0
    total.add(x)
    h = total.finish()
    assert int((h.diagonal() == 0).sum()) == 2
    assert not h[[0, 257]].any() and not h[:, [0, 257]].any()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("n", [1, 5, 256, 300, 520])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 3e-6)])
def test_factor_multiplies_back_to_the_damped_matrix(dtype: torch.dtype, tolerance: float, n: int, order: OrderName) -> None:
    h = with_eigenvalues(n, 0.1, dtype) if n > 1 else torch.ones(1, 1, dtype=dtype)
    if n > 1:
        size = torch.linspace(1, 3, n, dtype=dtype)[torch.randperm(n, generator=torch.Generator().manual_seed(1))]
        h *= size[:, None] * size
    original = h.clone()
    factor = factorize(h, order=Order(order, 1), damping=0.01)
    expected = damped(original, factor.perm, 0.01)
    assert float((product(factor.r) - expected).abs().max() / expected.abs().max()) < tolerance
    assert factor.r.dtype == dtype and factor.damping == 0.01 and factor.dead_inputs == 0
    assert (factor.perm is not None) == (order != "natural")


def test_act_order_is_by_decreasing_diagonal_and_stable() -> None:
    h = torch.diag(torch.tensor([1.0, 4.0, 1.0, 9.0, 4.0]))
    perm = factorize(h, order=ACTIVATION, damping=0.01).perm
    assert perm is not None and perm.tolist() == [3, 1, 4, 0, 2]
    many = [float(1 + i % 3) for i in range(300)]
    perm = factorize(torch.diag(torch.tensor(many)), order=ACTIVATION, damping=0.01).perm
    assert perm is not None and perm.tolist() == sorted(range(300), key=lambda i: -many[i])


def test_groups_stay_whole_and_are_ordered_by_their_sums() -> None:
    diagonal = torch.tensor([3.0, 1.0, 9.0, 0.0, 2.0, 8.0, 3.0, 3.0])
    order = Order("group", 2).permutation(diagonal)
    assert order is not None and order.tolist() == [5, 4, 2, 3, 6, 7, 0, 1], "equal ones keep their places"
    whole = Order("group", 8).permutation(diagonal)
    assert whole is not None and torch.equal(whole, torch.argsort(diagonal, descending=True, stable=True))
    assert torch.equal(factorize(torch.diag(diagonal), order=Order("group", 2), damping=0.01).perm, order)


@pytest.mark.parametrize("dead", [(), (0, 5)], ids=["alive", "some dead"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [7, 256, 520])
def test_act_order_factors_the_permuted_matrix(n: int, dtype: torch.dtype, dead: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit-exact, for any number of columns moved at a time, in the storage of the argument."""
    monkeypatch.setattr(triangles, "piece", lambda on_gpu: 100 * n + 1)
    h = with_eigenvalues(n, 0.2, dtype) * torch.linspace(1, 3, n, dtype=dtype)[shuffled := rotation(n)[0].argsort()].outer(
        torch.linspace(1, 3, n, dtype=dtype)[shuffled]
    )
    h[dead, :], h[:, dead] = 0, 0
    original = h.clone()
    factor = factorize(h, order=ACTIVATION, damping=0.01)
    assert factor.perm is not None and factor.perm.tolist() != list(range(n))
    assert factor.r.data_ptr() == h.data_ptr() and factor.r.shape == (n, n)
    explicit = factorize(original[factor.perm][:, factor.perm], order=NATURAL, damping=0.01)
    assert torch.equal(factor.r.triu(), explicit.r.triu())
    assert not torch.equal(factor.r.triu(), factorize(original, order=NATURAL, damping=0.01).r.triu())


@pytest.mark.parametrize("order", ORDERS)
def test_no_second_matrix_is_allocated(order: OrderName, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only one panel of columns is allocated at a time, also if the damping is raised once."""
    n = 1100
    monkeypatch.setattr(triangles, "piece", lambda on_gpu: 100 * n)
    h = torch.diag(torch.linspace(1, 2, n))
    h[0, 1] = h[1, 0] = 1.05
    with Largest(but=h) as largest:
        factor = factorize(h, order=Order(order, 1), damping=0.01)
    assert factor.damping == pytest.approx(0.1) and factor.r.data_ptr() == h.data_ptr()
    assert 0 < largest.elements <= n * max(100, cholesky.CPU_PANEL) < n * n / 2
    with Largest(but=h) as largest:
        h[torch.arange(n)]
    assert largest.elements == n * n, "it would have been seen"


@pytest.mark.parametrize("order", ORDERS)
def test_dead_inputs_are_counted_and_get_only_the_damping(order: OrderName) -> None:
    dead = [0, 4, 299]
    h = with_eigenvalues(300, 0.1)
    h[dead], h[:, dead] = 0, 0
    original = h.clone()
    factor = factorize(h, order=Order(order, 1), damping=0.05)
    assert factor.dead_inputs == 3
    if order != "natural":
        assert factor.perm is not None and sorted(factor.perm[-3:].tolist()) == dead
    assert torch.allclose(product(factor.r), damped(original, factor.perm, 0.05), rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("units", [2.0**-40, 2.0**-14, 2.0**30])
@pytest.mark.parametrize("dead", [0, 1, 150, 300])
def test_the_factor_does_not_depend_on_the_units_of_the_inputs(dead: int, units: float, order: OrderName) -> None:
    """Bit-exact for powers of 4: the factor of 4ᵏ·H is 2ᵏ times that of H, with or without dead inputs."""
    h = with_eigenvalues(300, 0.1, torch.float32)
    h[:dead], h[:, :dead] = 0, 0
    plain = factorize(h.clone(), order=Order(order, 1), damping=0.01)
    scaled = factorize(h * units**2, order=Order(order, 1), damping=0.01)
    expected = 1.0 if dead == 300 else units  # without a live input there is no unit
    assert torch.equal(scaled.r.triu(), plain.r.triu() * expected)
    assert scaled.dead_inputs == plain.dead_inputs == dead


def test_the_damping_of_live_inputs_does_not_depend_on_dead_ones() -> None:
    h = with_eigenvalues(300, 0.1) * 1e-4
    alive = h[100:, 100:].clone()
    h[:100], h[:, :100] = 0, 0
    r = factorize(h, order=NATURAL, damping=0.01).r
    assert torch.allclose(r[100:, 100:].triu(), factorize(alive, order=NATURAL, damping=0.01).r.triu(), rtol=1e-12, atol=0)


def test_the_sum_of_a_large_diagonal_does_not_overflow() -> None:
    """Each of the 8 numbers fits fp32, their sum does not."""
    factor = factorize(torch.eye(8) * 2e38, order=NATURAL, damping=0.01)
    assert torch.allclose(factor.r.diagonal().double().square(), torch.full((8,), 2.02e38, dtype=torch.float64), rtol=1e-6)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("lowest", "asked", "taken"), [(-0.05, 0.01, 0.1), (-0.05, 0.001, 0.1), (-0.5, 0.01, 1.0), (-0.7, 0.5, 1.0), (-0.005, 0.01, 0.01)]
)
@pytest.mark.parametrize("n", [40, 257, 520])
def test_damping_is_raised_until_the_factorization_succeeds(n: int, lowest: float, asked: float, taken: float, order: OrderName) -> None:
    """Each attempt must start from the original matrix."""
    h = with_eigenvalues(n, lowest)
    original = h.clone()
    factor = factorize(h, order=Order(order, 1), damping=asked)
    assert factor.damping == pytest.approx(taken)
    assert torch.allclose(product(factor.r), damped(original, factor.perm, factor.damping), rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", ORDERS)
def test_a_matrix_that_stays_indefinite_is_refused_by_name(order: OrderName) -> None:
    with pytest.raises(NumericsError, match=r"model\.layers\.7\.k: its Hessian is not positive definite even with damping 1;"):
        factorize(with_eigenvalues(50, -2.0), order=Order(order, 1), damping=0.01, name="model.layers.7.k")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_refused_by_name(bad: float) -> None:
    total = HessianSum(32, torch.device("cpu"))
    x = torch.randn(64, 32)
    x[10, 3] = bad
    total.add(x)
    with pytest.raises(NumericsError, match=r"layer\.q: the calibration inputs contain NaN or Inf"):
        factorize(total.finish(), order=NATURAL, damping=0.01, name="layer.q")


BAD = {3: float("nan"), 40: float("inf"), 41: float("-inf"), 99: float("nan")}


def with_bad_tokens(n: int, dtype: torch.dtype, tokens: int = 100) -> tuple[Tensor, list[int]]:
    """Activations [tokens, n] in which each token of ``BAD`` has one nonfinite value, and the indices of the other tokens."""
    x = torch.randn(tokens, n, generator=torch.Generator().manual_seed(n)).to(dtype)
    for token, value in BAD.items():
        x[token, (7 * token) % n] = value
    return x, [t for t in range(tokens) if t not in BAD]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_finite_tokens(dtype: torch.dtype) -> None:
    x, good = with_bad_tokens(33, dtype)
    x[0], x[1] = torch.finfo(dtype).max, torch.finfo(dtype).min
    x[3], x[40, :2] = float("nan"), torch.tensor([float("nan"), float("inf")])
    assert finite_tokens(x).nonzero().flatten().tolist() == good
    assert torch.equal(finite_tokens(x.view(4, 25, 33)), torch.isfinite(x).all(-1).view(4, 25))


@pytest.mark.parametrize(("triton", "batch"), [(False, 1), (False, 25), (False, 42), (False, 100), (True, 42), (True, 100)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("n", [7, 48])
def test_tokens_that_are_not_finite_are_left_out(
    n: int, dtype: torch.dtype, batch: int, triton: bool, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """For any distribution over batches and chunks."""
    if triton:
        request.getfixturevalue("triton_path")
    monkeypatch.setattr(hessian, "CHUNK_TOKENS", 30)
    x, good = with_bad_tokens(n, dtype)
    total = HessianSum(n, torch.device("cpu"), finite_only=True)
    for part in x.split(batch):
        total.add(part[None])
    assert (total.tokens, total.left_out) == (96, 4)
    h = total.finish()
    rows = x[good].double()
    expected = 2 / 96 * rows.T @ rows
    size = expected.diagonal().sqrt()
    assert float(((h.double() - expected) / (size[:, None] * size)).abs().max()) < 2e-6


@pytest.mark.parametrize("triton", [False, True], ids=["plain", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_finite_only_does_not_change_finite_sums(dtype: torch.dtype, triton: bool, request: pytest.FixtureRequest) -> None:
    if triton:
        request.getfixturevalue("triton_path")
    sums = [HessianSum(65, torch.device("cpu"), finite_only=asked) for asked in (False, True)]
    for total in sums:
        for seed in range(3):
            total.add(torch.randn(2, 50, 65, generator=torch.Generator().manual_seed(seed)).to(dtype))
    assert [(t.tokens, t.left_out) for t in sums] == [(300, 0)] * 2
    assert torch.equal(sums[0].finish(), sums[1].finish())


def test_nothing_is_checked_unless_requested(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(x: Tensor) -> bool:
        raise AssertionError("the ordinary path must not wait for an answer")

    monkeypatch.setattr(hessian, "is_finite", asked)
    HessianSum(8, torch.device("cpu")).add(torch.randn(5, 8))
    with pytest.raises(AssertionError, match="ordinary"):
        HessianSum(8, torch.device("cpu"), finite_only=True).add(torch.randn(5, 8))


@pytest.mark.parametrize("finite_only", [False, True])
def test_where_no_token_is_there_every_input_is_dead(finite_only: bool) -> None:
    """As for the adapter of another language; its weights are rounded to nearest."""
    total = HessianSum(8, torch.device("cpu"), finite_only=finite_only)
    total.add(torch.zeros(0, 8))
    assert (total.tokens, total.left_out) == (0, 0)
    factor = factorize(total.finish("layer.q"), order=ACTIVATION, damping=0.01)
    assert factor.dead_inputs == 8 and bool(factor.r.isfinite().all())


def test_a_sum_of_no_tokens_is_refused_by_name() -> None:
    total = HessianSum(8, torch.device("cpu"), finite_only=True)
    total.add(torch.full((5, 8), float("nan")))
    assert (total.tokens, total.left_out) == (0, 5)
    with pytest.raises(NumericsError, match=r"layer\.q: the calibration inputs of all tokens contain NaN or Inf;"):
        total.finish("layer.q")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_leaving_tokens_out_takes_one_chunk_of_memory(dtype: torch.dtype) -> None:
    n, chunk = 40, syrk.CHUNK_TOKENS
    x = torch.randn(4 * chunk, n).to(dtype)
    x[5 :: chunk // 2] = float("nan")
    total = HessianSum(n, torch.device("cpu"), finite_only=True)
    with Largest(but=x) as largest:
        total.add(x)
    assert total.left_out == 8
    assert 0 < largest.elements <= chunk * n


@pytest.mark.parametrize("n", [1, 19, 20, 64, 301])
@pytest.mark.parametrize("dead", [0, 1])
def test_the_usual_square_leaves_out_outliers_and_dead_inputs(n: int, dead: int) -> None:
    squares = torch.rand(n, generator=torch.Generator().manual_seed(n)) + 0.5
    squares[: n // 25] *= 4096  # fewer than a twentieth
    squares = torch.cat([squares, torch.zeros(dead)])
    assert usual_square(squares) == pytest.approx(usual_by_hand(squares), rel=1e-12)
    assert 0.5 < usual_square(squares) < 1.5
    assert usual_square(torch.zeros(3)) == 1.0


def test_outliers_do_not_damp_the_other_inputs() -> None:
    """64 times larger inputs beside them, and others are damped as without these."""
    x = torch.randn(512, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    large = x.clone()
    large[:, :3] *= 64
    before, after = (factorize(2 / len(part) * part.T @ part, order=NATURAL, damping=0.01) for part in (x, large))
    others = [((f.r.triu() @ f.r.triu().T) - 2 / len(x) * part.T @ part).diagonal()[3:] for f, part in ((before, x), (after, large))]
    assert torch.allclose(others[0], others[1], rtol=0.1)
    assert float(others[1].mean()) < 0.011 * float((2 / len(x) * x.T @ x).diagonal().mean())


def test_outliers_raise_how_far_damping_may_go() -> None:
    """Rounding errors in them may be larger than the others."""
    h = with_eigenvalues(60, -0.5)
    h[0] *= 200
    h[:, 0] *= 200
    h[1, 1] = -20.0
    factor = factorize(h.clone(), order=NATURAL, damping=0.01)
    assert factor.damping > 20
