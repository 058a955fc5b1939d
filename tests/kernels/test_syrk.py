"""XᵀX into an upper triangle, mirroring it, and taking that back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bigq.kernels.finite import finite
from bigq.kernels.syrk import mirror_, restore_upper_, syrk_

SIZES = [1, 3, 255, 256, 257, 300, 700]


def activations(tokens: int, n: int, dtype: torch.dtype) -> Tensor:
    gen = torch.Generator().manual_seed(tokens * n)
    return (torch.randn(tokens, n, generator=gen, dtype=torch.float64) + 0.3).to(dtype)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("tokens", [1, 33, 500])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_upper_triangle_is_as_good_as_torchs_own_product(dtype: torch.dtype, tokens: int, n: int) -> None:
    x = activations(tokens, n, dtype)
    h = torch.zeros(n, n)
    syrk_(h, x)
    expected = (x.double().T @ x.double()).triu()
    error = float((h.double().triu() - expected).abs().max())
    own_error = float(((x.float().T @ x.float()).double().triu() - expected).abs().max())
    assert error <= 2 * own_error + 2**-24 * float(expected.abs().max())


@pytest.mark.parametrize("tokens", [4095, 4096, 4099, 8195])
def test_long_batches_are_counted_whole(tokens: int) -> None:
    x = activations(tokens, 5, torch.float32)
    h = torch.zeros(5, 5, dtype=torch.float64)
    syrk_(h, x)
    assert torch.allclose(h.triu(), (x.double().T @ x.double()).triu(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("n", [5, 300])
def test_what_is_there_is_added_to(n: int) -> None:
    first, second = activations(50, n, torch.float32), activations(71, n, torch.float32)
    h = torch.zeros(n, n, dtype=torch.float64)
    syrk_(h, first)
    syrk_(h, second)
    both = torch.cat([first, second]).double()
    assert torch.allclose(h.triu(), (both.T @ both).triu(), rtol=1e-12, atol=1e-12)


def test_rows_that_are_not_contiguous_are_read_right() -> None:
    x = activations(64, 600, torch.float32)[:, ::2]
    h = torch.zeros(300, 300, dtype=torch.float64)
    syrk_(h, x)
    assert torch.allclose(h.triu(), (x.double().T @ x.double()).triu(), rtol=1e-12, atol=1e-12)


def test_tiles_below_the_diagonal_are_left_alone() -> None:
    h = torch.zeros(700, 700)
    h[600:, :100] = 7.0
    syrk_(h, activations(16, 700, torch.float32))
    assert bool((h[600:, :100] == 7.0).all())


@pytest.mark.parametrize("n", SIZES)
def test_mirror_makes_the_matrix_symmetric(n: int) -> None:
    h = torch.randn(n, n)
    upper = h.triu()
    mirror_(h)
    assert torch.equal(h.triu(), upper) and torch.equal(h, h.T)


@pytest.mark.parametrize("n", SIZES)
def test_restore_brings_back_what_was_mirrored(n: int) -> None:
    h = torch.randn(n, n)
    mirror_(h)
    before, diagonal = h.clone(), h.diagonal().clone()
    spoilt = torch.ones(n, n, dtype=torch.bool).triu()
    h[spoilt] = torch.randn(int(spoilt.sum()))
    restore_upper_(h, diagonal)
    assert torch.equal(h, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_finite_sees_a_single_bad_element(bad: float, dtype: torch.dtype) -> None:
    x = torch.full((9, 11), torch.finfo(dtype).max, dtype=dtype)
    x[0] = -x[0]
    assert finite(x)
    x[4, 7] = bad
    assert not finite(x)


def test_nothing_is_finite() -> None:
    assert finite(torch.empty(0, 5))
