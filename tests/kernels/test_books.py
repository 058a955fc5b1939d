"""Grids of codebooks in all versions of the kernels: plain torch, numba, Triton."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bigq.kernels.dequantize import dequantize, dequantize_packed, dequantize_reference
from bigq.kernels.gptq_block import gptq_block_, gptq_block_reference_
from bigq.kernels.grid import codes_of, find_grid, find_grid_reference, nearest, points_of
from bigq.kernels.grid_spec import BOOKS, GridSpec, GroupGrid, PointsName, ScaleForm, smallest_scale
from bigq.kernels.pack import pack
from bigq.kernels.pick import compiler_installed

NAMES: tuple[PointsName, ...] = ("nf4", "fp4", "e2m1", "e4m3")
books = pytest.mark.parametrize("points", NAMES)
#: Points, and whether the grids are given, found or searched; those of floats are not searched.
WAYS = [(points, way) for points in NAMES for way in ("given", "found", "searched") if (points, way) != ("e4m3", "searched")]
ON_GPU = [("nf4", "given"), ("fp4", "found"), ("e4m3", "found"), pytest.param("nf4", "searched", marks=pytest.mark.long)]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spec_of(points: PointsName, *, search: bool = False, nested: bool = False) -> GridSpec:
    bits = 8 if points == "e4m3" else 4
    return GridSpec(bits=bits, symmetric=True, search=search, points=points, scale_form="nested" if nested else "fp16")


@books
def test_a_book_is_ascending_and_full_with_mirrored_ends(points: PointsName) -> None:
    book = BOOKS[points]
    assert list(book) == sorted(book) and len(book) == (253 if points == "e4m3" else 16) and book[0] == -book[-1] and 0.0 in book
    assert torch.tensor(book).double().tolist() == list(book)  # fp32 numbers


@books
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_point_is_nearer(points: PointsName, dtype: torch.dtype) -> None:
    spec, x = spec_of(points), (randn(4000) * 0.6 * BOOKS[points][-1]).to(dtype)
    found = nearest(x, torch.zeros(1, dtype=dtype), spec)
    book = torch.tensor(spec.book, dtype=dtype)
    best = (x[:, None] - book).abs().amin(1)
    assert torch.allclose((x - found).abs(), best, rtol=1e-6, atol=1e-7)
    codes = codes_of(found, torch.zeros(1, dtype=dtype), spec)
    assert codes.dtype == torch.uint8 and torch.equal(points_of(codes, torch.zeros(1, dtype=dtype), spec), found)


def test_e4m3_has_the_numbers_of_torch_and_rounds_like_it() -> None:
    patterns = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert sorted({*patterns[~patterns.isnan()].tolist()}) == list(BOOKS["e4m3"])
    ties = torch.tensor([17.0, 19.0, 2.0**-10, 3 * 2.0**-10, -460.0, 1e9])
    assert nearest(ties, torch.zeros(1), spec_of("e4m3")).tolist() == [16.0, 20.0, 0.0, 2.0**-8, -448.0, 448.0]


@pytest.mark.parametrize(("form", "bits"), [("e4m3", 4), ("e8m0", 1)])
def test_scales_of_a_form_are_what_it_holds(form: ScaleForm, bits: int) -> None:
    """Over 256, E4M3 holds them; E8M0 holds powers of two. In all versions of the search."""
    w = randn(16, 400).clamp(-4, 4) * torch.logspace(-6, 0, 400)
    for search in (False, True):
        spec = GridSpec(bits=4, symmetric=True, search=search, points="e2m1", scale_form=form, scale_bits=bits)
        for find in (find_grid, find_grid_reference):
            scale, _ = find(w, spec)
            held = (scale * 256).to(torch.float8_e4m3fn).float() / 256 if form == "e4m3" else torch.exp2(scale.log2().round())
            assert torch.equal(scale, held) and scale.min() == smallest_scale(bits) == 2.0 ** (-17 if form == "e4m3" else -14)
            assert bool((scale * 6 > w.abs().amax(0) * 0.2).all())


def test_a_number_between_two_points_goes_to_the_lower_one() -> None:
    spec = spec_of("e2m1")
    between = torch.tensor([-5.0, -0.25, 0.25, 2.5, 5.0])
    assert nearest(between, torch.zeros(1), spec).tolist() == [-6.0, -0.5, 0.0, 2.0, 4.0]


@books
def test_a_grid_spans_the_largest_weight(points: PointsName) -> None:
    w = randn(64, 7) * 0.1
    scale, zero = find_grid_reference(w, spec_of(points, nested=True))
    assert torch.allclose(scale * BOOKS[points][-1], w.abs().amax(0)) and not zero.any()
    rounded, _ = find_grid_reference(w, spec_of(points))
    assert torch.equal(rounded, scale.half().float())


@pytest.mark.parametrize("points", [name for name in NAMES if name != "e4m3"])
def test_a_searched_grid_is_not_worse(points: PointsName) -> None:
    w = randn(64, 50)

    def error(search: bool) -> Tensor:
        scale, zero = find_grid(w, spec_of(points, search=search, nested=True))
        return (w - scale * nearest(w / scale, zero, spec_of(points))).square().sum(0)

    assert bool((error(True) <= error(False) * (1 + 1e-5)).all()) and error(True).sum() < 0.95 * error(False).sum()


class Solve:
    """A block of 64 columns in two groups, solved by one version of the kernel."""

    def __init__(self, points: PointsName, way: str, m: int = 37) -> None:
        """way: whether the grids are given, found or searched."""
        k, find, search = 64, way != "given", way == "searched"
        self.spec, self.find = spec_of(points, search=search), find
        x = randn(k, 4 * k, seed=1)
        self.u = torch.linalg.cholesky(x @ x.T / (4 * k) + 0.1 * torch.eye(k)).T.contiguous()
        self.w = randn(k, m, seed=2)
        scale, _ = find_grid_reference(self.w.view(2, 32, m).transpose(0, 1), spec_of(points))
        scale[0, 3], scale[1, 4] = 0.0, -scale[1, 4]  # scales that are stored nested may be 0 or negative
        self.scale = torch.full_like(scale, float("nan")) if find else scale
        self.group = torch.arange(k, dtype=torch.int32) // 32

    def run(self, version: Callable[..., Tensor], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(codes, scales, errors, loss) on the CPU."""
        w, u, scale, group = (t.to(device, copy=True) for t in (self.w, self.u, self.scale, self.group))
        target, work, codes = w.clone(), w.clone(), torch.empty_like(w, dtype=torch.uint8)
        grid = GroupGrid(self.spec, scale, torch.zeros_like(scale), group, self.find)
        loss = version(target, u, work, codes, grid).cpu()
        target, work, codes, grid = target.cpu(), work.cpu(), codes.cpu(), replace(grid, scale=scale.cpu())
        values = grid.scale[self.group.long()] * torch.tensor(self.spec.book)[codes.int()]
        assert torch.allclose(self.w - work, values, atol=1e-5)
        assert torch.allclose(loss, target.square().sum(0), rtol=1e-4)
        return codes, grid.scale, work, loss


@pytest.mark.parametrize(("points", "way"), WAYS)
def test_the_compiled_loop_agrees_with_the_plain_one(points: PointsName, way: str) -> None:
    if not compiler_installed():
        pytest.skip("needs numba")
    solve = Solve(points, way)
    plain, compiled = solve.run(gptq_block_reference_), solve.run(gptq_block_)
    if way == "searched":  # sums are rounded differently, so a grid that is as good may be taken
        assert compiled[3].sum() <= plain[3].sum() * 1.01
        return
    live = torch.ones(solve.w.shape[1], dtype=torch.bool)
    live[3] = way != "given"  # any code does for a scale of 0
    same = (plain[0] == compiled[0]).float().mean(0)
    # A number near the middle of two fine points becomes the other one, and so the second group's scale.
    assert torch.allclose(plain[1][:, live], compiled[1][:, live], rtol=0.01 if points == "e4m3" else 0, atol=0)
    assert bool((same[live] > 0.9).all())
    assert torch.allclose(plain[3], compiled[3], rtol=0.05)


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize(("points", "way"), ON_GPU)
def test_the_gpu_loop_agrees_with_the_plain_one(points: PointsName, way: str, device: torch.device) -> None:
    from bigq.kernels.gpu.gptq_block import gptq_block_triton_

    solve = Solve(points, way, m=16)
    plain, triton = solve.run(gptq_block_reference_), solve.run(gptq_block_triton_, device)
    live = [c for c in range(solve.w.shape[1]) if way != "given" or c != 3]
    assert torch.allclose(plain[1][:, live], triton[1][:, live], rtol=0 if way != "searched" else 0.1)
    assert bool(((plain[0] == triton[0]).float().mean(0)[live] > 0.9).all())
    assert torch.allclose(plain[3], triton[3], rtol=0.05)


@books
def test_weights_of_codes(points: PointsName, device: torch.device) -> None:
    from bigq.kernels.gpu.dequantize import dequantize_packed_triton, dequantize_triton

    bits = spec_of(points).bits
    codes = torch.randint(0, len(BOOKS[points]), (9, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    scales, zeros = randn(9, 2), torch.zeros(9, 2, dtype=torch.uint8)
    expected = torch.tensor(BOOKS[points])[codes.int()] * scales.repeat_interleave(32, 1)
    words = pack(codes.T.contiguous(), bits)
    stored = [t.to(device) for t in (words, codes, scales, zeros)]
    for made in (
        dequantize(codes, scales, zeros, torch.float32, points),
        dequantize_reference(codes, scales, zeros, torch.float32, points),
        dequantize_packed(words, scales, zeros, bits, torch.float32, points),
        dequantize_triton(*stored[1:], torch.float32, points).cpu(),
        dequantize_packed_triton(stored[0], *stored[2:], bits, torch.float32, points).cpu(),
    ):
        assert torch.equal(made, expected)
