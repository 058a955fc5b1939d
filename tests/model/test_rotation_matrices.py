"""Orthogonal matrices of many sizes: exact where a Hadamard matrix exists, the same wherever they are applied."""

from __future__ import annotations

import math

import pytest
import torch

from bigq.model.rotation.matrices import Rotation, factors

#: Widths of models, among them 576, 896, 1536 and 2880, and sizes of which no Hadamard matrix is known to this code (43 · 4).
SIZES = (1, 2, 8, 9, 12, 20, 28, 36, 60, 64, 96, 128, 172, 576, 896, 960, 1536)


@pytest.mark.parametrize("size", SIZES)
def test_orthogonal(size: int) -> None:
    q = Rotation(size, 3).matrix()
    assert torch.allclose(q @ q.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-13)
    assert math.prod(rows for _, rows in factors(size)) == size


@pytest.mark.parametrize("size", [size for size in SIZES if size % 4 == 0 and size != 172])
def test_hadamard_where_there_is_one(size: int) -> None:
    """All entries are as large, so that no coordinate stands out more than another."""
    entries = Rotation(size, 0).matrix().abs() * math.sqrt(size)
    assert torch.allclose(entries, torch.ones_like(entries), rtol=0, atol=1e-12)


def test_without_one_entries_stay_small() -> None:
    """The Hartley transform's are at most √2 times the mean of a Hadamard matrix."""
    for size in (9, 172, 43 * 64):
        assert Rotation(size, 0).matrix().abs().max() <= math.sqrt(2 / size) + 1e-12


@pytest.mark.parametrize("size", [8, 12, 172, 576])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_any_dimension(size: int, dim: int) -> None:
    rotation = Rotation(size, 1)
    shape = [3, 5, 7]
    shape[dim] = size
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.tensordot(x, rotation.matrix(), ([dim], [0])).movedim(-1, dim)
    assert torch.allclose(rotation.turn(x, dim), expected, rtol=0, atol=1e-12)
    assert torch.allclose(rotation.back(rotation.turn(x, dim), dim), x, rtol=0, atol=1e-12)


def test_seeds_differ_and_repeat() -> None:
    one, same, other = Rotation(64, 0).matrix(), Rotation(64, 0).matrix(), Rotation(64, 1).matrix()
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_an_outlier_is_spread() -> None:
    """What rotation is for: a single large coordinate becomes many small ones."""
    x = torch.zeros(576)
    x[7] = 24.0
    assert torch.allclose(Rotation(576, 0).turn(x).abs(), torch.ones(576), atol=1e-5)
