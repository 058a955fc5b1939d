"""Symmetric matrices in place: mirror, restore, permute."""

from __future__ import annotations

import pytest
import torch
from conftest import Largest
from torch import Tensor

from bigq.kernels import triangles
from bigq.kernels.triangles import mirror_, permute_, restore_upper_

pytestmark = pytest.mark.usefixtures("poisoned", "one_thread")

SIZES = [1, 3, 255, 256, 257, 300, 700]


def random(n: int) -> Tensor:
    return torch.randn(n, n, generator=torch.Generator().manual_seed(n))


def shuffle(n: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize("n", SIZES)
def test_mirror_makes_the_matrix_symmetric(n: int) -> None:
    h = random(n)
    upper = h.triu()
    mirror_(h)
    assert torch.equal(h.triu(), upper) and torch.equal(h, h.T)


@pytest.mark.parametrize("n", [3, 257])
def test_several_are_mirrored_as_single_ones(n: int) -> None:
    h = torch.stack([random(n), 2 * random(n)])
    singles = h.clone()
    mirror_(h)
    for one, single in zip(h, singles, strict=True):
        mirror_(single)
        assert torch.equal(one, single)


@pytest.mark.parametrize("n", SIZES)
def test_restore_undoes_changes_since_mirror(n: int) -> None:
    h = random(n)
    mirror_(h)
    before, diagonal = h.clone(), h.diagonal().clone()
    spoilt = torch.ones(n, n, dtype=torch.bool).triu()
    h[spoilt] = torch.randn(int(spoilt.sum()))
    restore_upper_(h, diagonal)
    assert torch.equal(h, before)


@pytest.mark.parametrize("moved", [1, 1000, 2**24])
@pytest.mark.parametrize("n", [1, 3, 64, 257])
def test_permute_moves_rows_and_columns(n: int, moved: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for a matrix that is not symmetric, so that swapped rows and columns are detected."""
    monkeypatch.setattr(triangles, "piece", lambda on_gpu: moved)
    h, perm = random(n), shuffle(n)
    expected = h[perm][:, perm]
    address = h.data_ptr()
    permute_(h, perm)
    assert torch.equal(h, expected) and h.data_ptr() == address
    assert n < 3 or not torch.equal(expected, random(n)[perm])


@pytest.mark.parametrize("kernel", ["mirror", "restore", "permute"])
def test_no_second_matrix_is_allocated(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triangles, "piece", lambda on_gpu: 700 * 256)
    h, perm = random(700), shuffle(700)
    diagonal = h.diagonal().clone()
    with Largest(but=h) as largest:
        {"mirror": lambda: mirror_(h), "restore": lambda: restore_upper_(h, diagonal), "permute": lambda: permute_(h, perm)}[kernel]()
    assert 0 < largest.elements <= 700 * 256
    with Largest(but=h) as largest:
        h.copy_(h[perm][:, perm])
    assert largest.elements == 700 * 700, "it would have been seen"
