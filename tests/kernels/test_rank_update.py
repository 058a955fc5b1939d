"""``C −= A·Bᵀ`` without the lower triangle of the last square, against fp64 and torch's fp32 product."""

from __future__ import annotations

import pytest
import torch
from checks import VERSIONS, as_good, kernel, same_bytes, stored, untouched
from torch import Tensor

from bigq.kernels.rank_update import rank_update_

pytestmark = pytest.mark.usefixtures("poisoned", "one_thread")

#: (m, n, k) around the tiles of the Triton version.
SHAPES = [
    (1, 1, 1), (3, 3, 31), (9, 1, 5), (40, 8, 256), (127, 127, 32), (128, 128, 33), (200, 129, 100), (129, 1, 31),
    (256, 128, 8), (257, 128, 40), (300, 256, 64), (391, 130, 17),
]  # fmt: skip

Matrices = tuple[Tensor, Tensor, Tensor]


def matrices(m: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> Matrices:
    """c [m, n], of the size of the product, a [m, k] and b [n, k]; columns of a and b differ in size."""
    gen = torch.Generator().manual_seed(m * n * k)
    sizes = torch.logspace(0, -2, k, dtype=torch.float64)
    c, a, b = (torch.randn(shape, dtype=torch.float64, generator=gen) for shape in ((m, n), (m, k), (n, k)))
    return c.to(device, dtype), (a * sizes).to(device, dtype), (b * sizes).to(device, dtype)


def live(c: Tensor) -> Tensor:
    """True where ``rank_update_`` writes."""
    return torch.ones_like(c, dtype=torch.bool).triu(c.shape[1] - c.shape[0])


def updated(version: str, c: Tensor, a: Tensor, b: Tensor, order: str = "by rows") -> Tensor:
    c, *factors = (stored(x, order) for x in (c, a, b))
    kernel("rank_update_", version)(c, *factors)
    assert all(same_bytes(x, y) for x, y in zip(factors, (a, b), strict=True))
    assert order == "by rows" or all(untouched(x) for x in (c, *factors))
    return c


def product(c: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return c.to(dtype) - a.to(dtype) @ b.to(dtype).T


@pytest.mark.parametrize("order", ["by rows", "within a larger one"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("version", VERSIONS)
def test_it_is_as_good_as_torchs_own(version: str, shape: tuple[int, int, int], order: str, device: torch.device) -> None:
    """NaN around the matrices and below the diagonal must stay unchanged."""
    c, a, b = matrices(*shape, torch.float32, device)
    here = live(c)
    result = updated(version, c.where(here, float("nan")), a, b, order)
    assert bool(result[~here].isnan().all())
    assert as_good(result[here], product(c, a, b, torch.float32)[here], product(c, a, b, torch.float64)[here])


@pytest.mark.parametrize("shape", [(3, 3, 31), (9, 1, 5), (300, 200, 7)], ids=str)
def test_fp64_stays_fp64(shape: tuple[int, int, int], device: torch.device) -> None:
    c, a, b = matrices(*shape, torch.float64, device)
    expected = torch.where(live(c), c - a @ b.T, c)
    rank_update_(c, a, b)
    assert torch.allclose(c, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("shape", [(3, 3, 31), (200, 129, 100), (300, 256, 64)], ids=str)
@pytest.mark.parametrize("version", VERSIONS)
def test_the_lower_triangle_is_not_written(version: str, shape: tuple[int, int, int], device: torch.device) -> None:
    c, a, b = matrices(*shape, torch.float32, device)
    here = live(c)
    result = updated(version, c, a, b)
    assert torch.equal(result[~here], c[~here]) and int((~here).sum()) == shape[1] * (shape[1] - 1) // 2
    assert int((result[here] == c[here]).sum()) == 0


@pytest.mark.parametrize("version", VERSIONS)
def test_panels_of_one_matrix(version: str, device: torch.device) -> None:
    """As in the factorization: C, A and B are parts of one matrix."""
    before = torch.randn(300, 300, generator=torch.Generator().manual_seed(0)).to(device)
    h = before.clone()
    views = [(x[:170, 40:170], x[:170, 170:], x[40:170, 170:]) for x in (h, before)]
    kernel("rank_update_", version)(*views[0])
    c, a, b = views[1]
    here = live(c)
    assert as_good(views[0][0][here], product(c, a, b, torch.float32)[here], product(c, a, b, torch.float64)[here])
    views[0][0][here] = c[here]
    assert same_bytes(h, before), "something was changed that is not to be"


@pytest.mark.parametrize("version", VERSIONS)
def test_the_same_input_gives_the_same_bytes(version: str, device: torch.device) -> None:
    operands = matrices(200, 130, 70, torch.float32, device)
    assert same_bytes(updated(version, *operands), updated(version, *operands))


@pytest.mark.parametrize("version", VERSIONS)
def test_the_criterion_sees_a_last_bit_of_tf32(version: str, device: torch.device) -> None:
    """A product with factors rounded to TF32 does not pass."""
    c, a, b = matrices(128, 128, 64, torch.float32, device)
    here = live(c)
    tf32 = (a.view(torch.int32) & ~0x1FFF).view(torch.float32)
    result = updated(version, c, tf32, b)
    assert not as_good(result[here], product(c, a, b, torch.float32)[here], product(c, a, b, torch.float64)[here])


@pytest.mark.parametrize("order", ["by rows", "within a larger one"])
@pytest.mark.parametrize("shape", [(3, 3, 31), (9, 1, 5), (200, 129, 100), (257, 128, 40)], ids=str)
@pytest.mark.parametrize("version", VERSIONS)
def test_a_batch_has_the_bytes_of_single_ones(version: str, shape: tuple[int, int, int], order: str, device: torch.device) -> None:
    """NaN in one matrix stays there. All are at the same places of memory, on which the rounding of a CPU's products may depend."""
    cases = [matrices(*shape, torch.float32, device) for _ in range(3)]
    stacked = [torch.stack(parts) for parts in zip(*((c + i, a * (1 + i), b - i) for i, (c, a, b) in enumerate(cases)), strict=True)]
    stacked[1][1, 0, 0] = float("nan")
    batch, singles = ([stored(x, order) for x in stacked] for _ in range(2))
    kernel("rank_update_", version)(*batch)
    for i, single in enumerate(zip(*singles, strict=True)):
        kernel("rank_update_", version)(*single)
        assert torch.equal(batch[0][i].nan_to_num(), single[0].nan_to_num())
        assert bool(batch[0][i].isnan().any()) == bool(single[0].isnan().any()) == (i == 1)
    assert order == "by rows" or all(untouched(x) for x in batch)


@pytest.mark.parametrize("version", VERSIONS)
def test_panels_of_a_batch(version: str, device: torch.device) -> None:
    """As in the factorization of several matrices in one buffer."""
    before = torch.randn(3, 300, 300, generator=torch.Generator().manual_seed(0)).to(device)
    h = before.clone()
    kernel("rank_update_", version)(h[..., :170, 40:170], h[..., :170, 170:], h[..., 40:170, 170:])
    for one, single in zip(h, before, strict=True):
        kernel("rank_update_", version)(single[:170, 40:170], single[:170, 170:], single[40:170, 170:])
        assert same_bytes(one, single)


@pytest.mark.parametrize("order", ["by rows", "within a larger one"])
@pytest.mark.parametrize("shape", [*SHAPES, (5, 40, 33), (1, 256, 70)], ids=str)
@pytest.mark.parametrize("version", VERSIONS)
def test_without_a_triangle_all_is_updated(version: str, shape: tuple[int, int, int], order: str, device: torch.device) -> None:
    before = matrices(*shape, torch.float32, device)
    c, a, b = (stored(x, order) for x in before)
    kernel("rank_update_", version)(c, a, b, triangle=False)
    assert as_good(c, product(*before, torch.float32), product(*before, torch.float64))
    assert order == "by rows" or all(untouched(x) for x in (c, a, b))
