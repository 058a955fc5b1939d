"""The factorization from the last column to the first, against torch's own from the first to the last."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from bigq.kernels.cholesky import upper_cholesky_, upper_inverse

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
def test_lower_triangle_is_left_alone(n: int) -> None:
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
def test_an_indefinite_matrix_is_told(where: str, n: int, dtype: torch.dtype) -> None:
    h = positive_definite(n, dtype)
    at = 0 if where == "first" else n - 1
    h[at, at] = -0.1
    assert upper_cholesky_(h) is False


@pytest.mark.parametrize("n", [2, 300, 700])
def test_an_indefinite_matrix_with_a_positive_diagonal_is_told(n: int) -> None:
    h = torch.eye(n)
    h[0, 1] = h[1, 0] = 2
    assert upper_cholesky_(h) is False


@pytest.mark.parametrize("n", [3, 300])
def test_nan_is_told(n: int) -> None:
    h = torch.eye(n)
    h[0, 1] = h[1, 0] = float("nan")
    assert upper_cholesky_(h) is False


@pytest.mark.parametrize("k", [1, 8, 40, 128])
def test_upper_inverse(k: int) -> None:
    r = torch.randn(k, k, dtype=torch.float64, generator=torch.Generator().manual_seed(k)).triu() / k**0.5 + 2 * torch.eye(k)
    inverse = upper_inverse(r)
    assert torch.allclose(inverse @ r, torch.eye(k, dtype=torch.float64), atol=1e-12)
    assert torch.equal(inverse, inverse.triu())
