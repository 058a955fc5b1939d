"""The factorization from the last column to the first, against torch's from the first to the last."""

from __future__ import annotations

import functools
import itertools
import threading

import pytest
import torch
from checks import FACTOR, same_bytes
from rank_threads import ThreadRanks, together
from torch import Tensor

from bigq.kernels import cholesky
from bigq.kernels.cholesky import diagonal_inverses, upper_cholesky_, upper_cholesky_many_, upper_cholesky_shared_

pytestmark = pytest.mark.usefixtures("poisoned", "one_thread")

SIZES = [1, 5, 256, 257, 700]


@functools.cache
def covariance(n: int) -> Tensor:
    x = torch.randn(2 * n + 3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    return x.T @ x / len(x) + 0.01 * torch.eye(n, dtype=torch.float64)


def positive_definite(n: int, dtype: torch.dtype) -> Tensor:
    h = covariance(n).to(dtype)
    return (h + h.T) / 2


@pytest.mark.parametrize("n", SIZES)
def test_fp32_residual_is_no_worse_than_torchs_own(n: int) -> None:
    h = positive_definite(n, torch.float32)
    r = h.clone()
    assert upper_cholesky_(r)
    upper, lower = r.double().triu(), torch.linalg.cholesky(h).double()
    residual, own = (float((p - h.double()).norm()) for p in (upper @ upper.T, lower @ lower.T))
    assert residual <= 2 * own + 2**-24 * float(h.norm()) / n**0.5


@pytest.mark.parametrize("n", SIZES)
def test_fp64_factor_is_the_flipped_cholesky_factor(n: int) -> None:
    h = positive_definite(n, torch.float64)
    r = h.clone()
    assert upper_cholesky_(r)
    expected = torch.linalg.cholesky(h.flip(0, 1)).flip(0, 1)
    assert torch.allclose(r.triu(), expected, rtol=1e-9, atol=1e-12)
    assert bool((r.diagonal() > 0).all())


@pytest.mark.parametrize("n", [5, 256, 300])
def test_its_inverse_is_the_upper_factor_of_the_inverse(n: int) -> None:
    h = positive_definite(n, torch.float64)
    r = h.clone()
    assert upper_cholesky_(r)
    expected = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    assert torch.allclose(torch.linalg.inv(r.triu()), expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("n", SIZES)
def test_lower_triangle_is_not_written(n: int) -> None:
    h = positive_definite(n, torch.float32)
    below = torch.randn(n, n).tril(-1)
    work = h.triu() + below
    assert upper_cholesky_(work)
    assert torch.equal(work.tril(-1), below)


@pytest.mark.parametrize("n", SIZES)
def test_lower_triangle_is_not_read(n: int) -> None:
    h = positive_definite(n, torch.float32)
    spoilt = h.clone()
    spoilt[torch.ones(n, n, dtype=torch.bool).tril(-1)] = float("nan")
    assert upper_cholesky_(h) and upper_cholesky_(spoilt)
    assert torch.equal(h.triu(), spoilt.triu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("where", ["first", "last"])
def test_an_indefinite_matrix_returns_false(where: str, n: int, dtype: torch.dtype) -> None:
    h = positive_definite(n, dtype)
    at = 0 if where == "first" else n - 1
    h[at, at] = -0.1
    assert upper_cholesky_(h) is False


@pytest.mark.parametrize("n", [2, 300, 700])
def test_an_indefinite_matrix_with_a_positive_diagonal_returns_false(n: int) -> None:
    h = torch.eye(n)
    h[0, 1] = h[1, 0] = 2
    assert upper_cholesky_(h) is False


@pytest.mark.parametrize("n", [3, 300])
def test_nan_returns_false(n: int) -> None:
    h = torch.eye(n)
    h[0, 1] = h[1, 0] = float("nan")
    assert upper_cholesky_(h) is False


def residual(r: Tensor, h: Tensor) -> float:
    upper = r.double().triu()
    return float((upper @ upper.T - h.double()).norm())


def own_residual(h: Tensor) -> float:
    """The residual of torch's factorization."""
    lower = torch.linalg.cholesky(h).double()
    return float((lower @ lower.T - h.double()).norm())


@pytest.mark.usefixtures("triton_path")
@pytest.mark.parametrize(("n", "panel"), [(5, 256), (257, 256), (520, 256), (300, 100), (200, 32)])
def test_on_triton_it_is_no_worse_than_torchs_own(n: int, panel: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lower triangle is NaN and stays NaN."""
    monkeypatch.setattr(cholesky, "panel_width", lambda on_gpu: panel)
    h = positive_definite(n, torch.float32).to(device)
    below = torch.ones(n, n, dtype=torch.bool, device=device).tril(-1)
    first, second = (h.masked_fill(below, float("nan")) for _ in range(2))
    assert upper_cholesky_(first) and upper_cholesky_(second)
    assert residual(first, h) <= FACTOR * own_residual(h) + 2**-24 * float(h.norm()) / n**0.5
    assert bool(first[below].isnan().all()) and same_bytes(first, second)
    first[0, n - 1] += 1e-4
    assert residual(first, h) > 2 * own_residual(h) + 2**-24 * float(h.norm()) / n**0.5, "the criterion sees nothing"


@pytest.mark.usefixtures("triton_path")
def test_on_triton_an_indefinite_matrix_returns_false(device: torch.device) -> None:
    h = positive_definite(300, torch.float32).to(device)
    h[0, 0] = -0.1
    assert upper_cholesky_(h) is False


@pytest.mark.parametrize("panel", [1, 7, 64, 300])
def test_panels_of_any_width_give_the_same_factor(panel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    h = positive_definite(257, torch.float64)
    expected = torch.linalg.cholesky(h.flip(0, 1)).flip(0, 1)
    monkeypatch.setattr(cholesky, "panel_width", lambda on_gpu: panel)
    assert upper_cholesky_(h)
    assert torch.allclose(h.triu(), expected, rtol=1e-9, atol=1e-12)


def triangular(n: int) -> Tensor:
    """Upper triangular and well conditioned; NaN below."""
    gen = torch.Generator().manual_seed(n)
    r = torch.randn(n, n, dtype=torch.float64, generator=gen).triu() / n**0.5 + 2 * torch.eye(n)
    return r.masked_fill_(torch.ones(n, n, dtype=torch.bool).tril(-1), float("nan"))


@pytest.mark.parametrize(
    "edges",
    [(0, 1), (0, 8), (0, 128), (0, 40, 80, 120), (0, 128, 256, 300), (0, 7, 8, 30), (50, 90, 130)],
    ids=str,
)
def test_diagonal_inverses(edges: tuple[int, ...], device: torch.device) -> None:
    """Blocks of several widths: each in the corner of its matrix, whose rest must have no effect."""
    blocks = list(itertools.pairwise(edges))
    r = triangular(300).to(device)
    inverses = diagonal_inverses(r, blocks)
    widest = max(b - a for a, b in blocks)
    assert inverses.shape == (len(blocks), widest, widest)
    for inverse, (a, b) in zip(inverses, blocks, strict=True):
        corner = inverse[: b - a, : b - a]
        eye = torch.eye(b - a, dtype=torch.float64, device=device)
        assert torch.allclose(corner @ r[a:b, a:b].triu(), eye, rtol=0, atol=1e-12)
        assert torch.equal(corner, corner.triu())


def test_diagonal_inverses_keep_the_type_and_the_factor() -> None:
    r = triangular(40).float()
    before = r.clone()
    inverses = diagonal_inverses(r, [(0, 24), (24, 40)])
    assert inverses.dtype == torch.float32 and same_bytes(r, before)
    assert torch.allclose(inverses[1, :16, :16] @ r[24:, 24:].triu(), torch.eye(16), rtol=0, atol=1e-6)


@pytest.mark.parametrize("n", [5, 257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_several_have_the_factors_of_single_ones(dtype: torch.dtype, n: int) -> None:
    """Those that are not positive definite are named, and do not change the others."""
    h = torch.stack([(1 + i) * positive_definite(n, dtype) for i in range(4)])
    h[1, n - 1, n - 1] = -1
    h[3, 0, n - 1] = float("nan")
    singles = [one.clone() for one in h]
    assert upper_cholesky_many_(h) == [True, False, True, False] == [upper_cholesky_(one) for one in singles]
    assert all(same_bytes(h[i], singles[i]) for i in (0, 2))


@pytest.mark.usefixtures("triton_path")
@pytest.mark.parametrize(("n", "panel"), [(5, 256), (257, 256), (200, 32)])
def test_on_triton_several_are_factored_at_once(n: int, panel: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step is one launch for all. On a GPU the library may factor a batch of corners in another way than a single one."""
    monkeypatch.setattr(cholesky, "panel_width", lambda on_gpu: panel)
    exact = [(1 + i) * positive_definite(n, torch.float32).to(device) for i in range(3)]
    h = torch.stack(exact)
    h[1, n - 1, n - 1] = -1
    assert cholesky._upper_cholesky_(h).tolist() == [False, True, False]
    for i in (0, 2):
        assert residual(h[i], exact[i]) <= FACTOR * own_residual(exact[i]) + 2**-24 * float(exact[i].norm()) / n**0.5


def test_diagonal_inverses_of_several() -> None:
    r = torch.stack([triangular(300), 3 * triangular(300)])
    blocks = [(0, 128), (128, 256), (256, 300)]
    inverses = diagonal_inverses(r, blocks)
    assert inverses.shape == (2, 3, 128, 128)
    assert all(same_bytes(one, diagonal_inverses(single, blocks)) for one, single in zip(inverses, r, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [5, 97, 300, 700])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_processes_that_share_it_have_one_factor(count: int, n: int, dtype: torch.dtype) -> None:
    """The same bits in each of them, as good as alone. Below the diagonal nothing changes."""
    h = positive_definite(n, dtype)
    factors = [h.clone() for _ in range(count)]
    assert together(count, lambda ranks: upper_cholesky_shared_(factors[ranks.index], ranks)) == [True] * count
    assert all(same_bytes(factor, factors[0]) for factor in factors)
    assert torch.equal(factors[0].tril(-1), h.tril(-1))
    alone = h.clone()
    upper_cholesky_(alone)
    residual, own = (float((r.triu().double() @ r.triu().double().T - h.double()).norm()) for r in (factors[0], alone))
    assert residual <= 1.5 * own + torch.finfo(dtype).eps * float(h.norm()) / n**0.5


def test_each_process_has_its_part_of_the_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiplications of the updates, counted."""
    done = dict.fromkeys(range(3), 0)
    update = cholesky.rank_update_

    def counted(c: Tensor, a: Tensor, b: Tensor, *, triangle: bool = True) -> None:
        done[here.index] += c.numel() * a.shape[1]
        update(c, a, b, triangle=triangle)

    here = threading.local()
    monkeypatch.setattr(cholesky, "rank_update_", counted)

    def run(ranks: ThreadRanks) -> bool:
        here.index = ranks.index
        return upper_cholesky_shared_(positive_definite(2000, torch.float32), ranks)

    assert together(3, run) == [True] * 3
    # The corners, which each computes, are 96 of 2000 columns.
    assert max(done.values()) < 1.01 * min(done.values()) and sum(done.values()) < 1.3 * 2000**3 / 3


def test_a_process_whose_corner_fails_fails_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on processors that round in different ways."""
    factor = cholesky._factor_corner_

    def failing(corner: Tensor) -> tuple[Tensor, Tensor]:
        r, failed = factor(corner)
        return r, failed + (here.index == 1)

    here = threading.local()
    monkeypatch.setattr(cholesky, "_factor_corner_", failing)

    def run(ranks: ThreadRanks) -> bool:
        here.index = ranks.index
        return upper_cholesky_shared_(positive_definite(200, torch.float32), ranks)

    assert together(3, run) == [False] * 3
