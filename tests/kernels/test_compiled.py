"""The versions that numba compiles, against their plain versions and a textbook loop in fp32."""

from __future__ import annotations

import itertools
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import bigq
from bigq.kernels import pick
from bigq.kernels.gptq_block import found_grid, gptq_block_
from bigq.kernels.grid import GridSpec, GroupGrid, find_grid, find_grid_reference
from bigq.kernels.syrk import syrk_, syrk_reference_

pytest.importorskip("numba")

from bigq.kernels.cpu import columns, syrk, threads, tiles

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(params=[1, 2, 5], ids=lambda n: f"{n}-threads")
def thread_count(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights(g: int, count: int, size: float) -> Tensor:
    """Groups of both signs; the first ones are all 0, not negative, not positive."""
    w = randn(g, count, seed=count) * size
    w[:, 0] = 0
    w[:, 1].abs_()
    w[:, 2] = -w[:, 2].abs()
    return w


@pytest.mark.parametrize("scale_bits", [7, 8, 11])
@pytest.mark.parametrize("min_zero", [0, 1])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_grids_are_those_of_the_plain_version(bits: int, symmetric: bool, min_zero: int, scale_bits: int) -> None:
    """At all sizes of scales that fp16 has, those below its normal numbers and those beyond its range among them."""
    spec = GridSpec(bits=bits, symmetric=symmetric, min_zero=min_zero, scale_bits=scale_bits)
    for size in (1.0, 1e-3, 1e-6, 3e-8, 1e-12, 1e4, 1e6):
        w = weights(24, 301, size)
        for ours, plain in zip(columns.find_grid_compiled(w, spec), find_grid_reference(w, spec), strict=True):
            assert torch.equal(ours, plain), size


def test_every_scale_is_rounded_as_by_torch() -> None:
    """Scales around every boundary of rounding: of two weights ±x, the scale is 2·x / 3 at 2 bits."""
    halves = torch.arange(0, 0x7C00, dtype=torch.int16).view(torch.float16).float()
    middle = (halves[1:] + halves[:-1]) / 2
    near = torch.cat([halves, middle, torch.nextafter(middle, torch.tensor(0.0)), torch.nextafter(middle, torch.tensor(1e9))])
    w = torch.stack([near * 1.5, -near * 1.5])
    for bits in (7, 8, 11):
        spec = GridSpec(bits=2, symmetric=True, scale_bits=bits)
        assert torch.equal(columns.find_grid_compiled(w, spec)[0], find_grid_reference(w, spec)[0])


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_searched_grids_are_as_good(bits: int, symmetric: bool, weighted: bool, thread_count: int) -> None:
    """Sums are rounded differently, so another grid of an error that is as small may be taken. 67 rows are no whole number of tiles."""
    spec = GridSpec(bits=bits, symmetric=symmetric, search=True, scale_bits=8)
    w = torch.stack([weights(64, 67, 0.7), weights(64, 67, 0.1), weights(64, 67, 30.0)], 1)
    of_error = torch.rand(64, 3, generator=torch.Generator().manual_seed(2)) ** 3 if weighted else None
    errors = []
    for scale, zero in (columns.find_grid_compiled(w, spec, of_error), find_grid_reference(w, spec, of_error)):
        steps = torch.clamp(torch.round(w / scale), -zero, spec.max_code - zero)
        error = (w - steps * scale).double().square()
        errors.append((error if of_error is None else error * of_error[..., None]).sum(0))
    assert bool((errors[0] <= errors[1] * (1 + 1e-5)).all())


def textbook(target: Tensor, u: Tensor, work: Tensor, codes: Tensor, grid: GroupGrid) -> Tensor:
    """``gptq_block_``, a column at a time and every operation rounded by itself."""
    k, m = target.shape
    width, loss = k // grid.scale.shape[0], torch.zeros(m)
    for j in range(k):
        g = int(grid.group[j])
        if grid.find and j % width == 0:
            group = slice(j, j + width)
            grid.scale[g], grid.zero[g] = found_grid(target[group], u[group, group], grid.spec)
        scale, zero = grid.scale[g], grid.zero[g]
        step = torch.clamp(torch.round(target[j] / scale), -zero, grid.spec.max_code - zero)
        error = (target[j] - scale * step) / u[j, j]
        codes[j] = (step + zero).to(torch.uint8)
        work[j] -= step * scale
        loss += error * error
        target[j] = error
        for later in range(j + 1, k):
            target[later] -= error * u[j, later]
    return loss


@pytest.mark.parametrize("find", ["given", "found", "searched"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize(("k", "m", "groups"), [(128, 70, 1), (128, 64, 4), (96, 33, 2), (120, 40, 3), (40, 1, 1), (1, 31, 1)])
def test_the_column_loop_has_the_bits_of_the_textbook(k: int, m: int, groups: int, symmetric: bool, find: str, thread_count: int) -> None:
    spec = GridSpec(bits=4, symmetric=symmetric, scale_bits=8, search=find == "searched")
    x = randn(k, 4 * k, seed=1)
    u = torch.linalg.cholesky(x @ x.T / (4 * k) + 0.1 * torch.eye(k)).T.contiguous()
    group = torch.arange(k, dtype=torch.int32) // (k // groups)
    grid = [torch.full((groups, m), float("nan")) for _ in range(2)]
    if find == "given":
        group = group[torch.randperm(k, generator=torch.Generator().manual_seed(2))]
        grid = list(find_grid_reference(randn(k // groups, groups, m, seed=3), spec))
    results = []
    for version in (columns.gptq_block_compiled_, textbook):
        target, work, codes = randn(k, m, seed=4), randn(k, m, seed=5), torch.full((k, m), 99, dtype=torch.uint8)
        scale, zero = (part.clone() for part in grid)
        loss = version(target, u, work, codes, GroupGrid(spec, scale, zero, group, find != "given"))
        results.append((target, work, codes, scale, zero, loss))
    for ours, plain in zip(*results, strict=True):
        assert torch.equal(ours, plain)


@pytest.fixture(params=["AVX-512 BF16", "AMX"])
def unit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What multiplies bf16 numbers."""
    there = tiles.has_tiles() if request.param == "AMX" else syrk.has_bf16_products()
    if not there:
        pytest.skip(f"this processor has no {request.param}")
    monkeypatch.setattr(tiles, "has_tiles", lambda: request.param == "AMX")


@pytest.mark.usefixtures("unit")
@pytest.mark.parametrize("tokens", [1, 2, 31, 32, 33, 255, 256, 257, 1025])
@pytest.mark.parametrize("n", [64, 192, 640])
def test_hessians_are_as_good_as_fp32_products(tokens: int, n: int, thread_count: int) -> None:
    x = (randn(tokens, n) + 0.3).to(torch.bfloat16)
    before = randn(n, n, seed=1) * tokens
    ours, plain = before.clone(), before.clone()
    syrk.syrk_compiled_(ours, x)
    syrk_reference_(plain, x)
    exact = before.double() + x.double().T @ x.double()
    errors = [float((h.double() - exact).triu().abs().max()) for h in (ours, plain)]
    assert errors[0] <= 2 * errors[1] + 2**-23 * float(exact.abs().max())
    untouched = torch.ones(n // 64, n // 64).tril(-1).repeat_interleave(64, 0).repeat_interleave(64, 1).bool()
    assert torch.equal(ours[untouched], before[untouched]), "a tile below the diagonal was written"


@pytest.mark.usefixtures("unit")
def test_torchs_own_products_go_on_between() -> None:
    """torch's bf16 products configure the same tile registers, in this thread and in others."""
    x, w = randn(300, 192).to(torch.bfloat16), randn(96, 192, seed=1).to(torch.bfloat16)
    alone, sums = x @ w.T, torch.zeros(192, 192)
    syrk.syrk_compiled_(sums, x)
    for _ in range(20):
        h = torch.zeros(192, 192)
        assert torch.equal(x @ w.T, alone)
        syrk.syrk_compiled_(h, x)
        assert torch.equal(h, sums)


@pytest.mark.usefixtures("unit")
def test_hessians_do_not_depend_on_the_number_of_threads() -> None:
    x, sums = randn(600, 320).to(torch.bfloat16), []
    before = torch.get_num_threads()
    for count in (1, 3):
        torch.set_num_threads(count)
        h = torch.zeros(320, 320)
        syrk.syrk_compiled_(h, x)
        sums.append(h)
    torch.set_num_threads(before)
    assert torch.equal(*sums)


@pytest.mark.usefixtures("unit")
def test_nan_and_infinity_are_not_lost_in_a_hessian() -> None:
    x = torch.ones(4, 64, dtype=torch.bfloat16)
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    h = torch.zeros(64, 64)
    syrk.syrk_compiled_(h, x)
    assert bool(h[3, 3:].isnan().all()) and bool(h[5, 5].isinf())


def test_nan_is_not_lost_in_the_column_loop() -> None:
    w = randn(64, 40)
    w[5, 7] = float("nan")
    grid = GroupGrid(GridSpec(bits=4, symmetric=True), torch.empty(1, 40), torch.empty(1, 40), torch.zeros(64, dtype=torch.int32), True)
    loss = gptq_block_(w, torch.eye(64), w.clone(), torch.empty(64, 40, dtype=torch.uint8), grid)
    assert loss.isnan().nonzero().tolist() == [[7]]


def test_what_the_compiled_versions_do_not_take_goes_to_the_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without numba, in fp64, and for inputs of odd widths or other types."""
    scheme = bigq.QuantScheme(bits=4, group_size=32)
    x, w = randn(200, 96), randn(8, 96, seed=1)
    compiled = bigq.quantize_linear(w, x.T @ x, scheme)
    for odd in (x.to(torch.float16), x.to(torch.bfloat16)):
        h, plain = torch.zeros(96, 96), torch.zeros(96, 96)
        syrk_(h, odd)
        syrk_reference_(plain, odd)
        assert torch.equal(h, plain)
    monkeypatch.setattr(pick, "compiler_installed", lambda: False)
    for name in ("find_grid_compiled", "gptq_block_compiled_"):
        monkeypatch.setattr(columns, name, None)
    plain_version = bigq.quantize_linear(w, x.T @ x, scheme)
    assert float((plain_version.codes != compiled.codes).float().mean()) < 0.01
    assert find_grid(randn(16, 4), GridSpec(bits=4, symmetric=True))[0].shape == (4,)


def test_parts_cover_everything_once(thread_count: int) -> None:
    for total, step in itertools.product((1, 31, 32, 33, 500), (1, 32)):
        seen: list[int] = []
        lock = threading.Lock()

        def run(start: int, stop: int, step: int = step, lock: threading.Lock = lock, seen: list[int] = seen) -> None:
            assert start % step == 0
            with lock:
                seen += range(start, stop)

        threads.in_parts(total, step, run)
        assert sorted(seen) == list(range(total))


def test_an_error_in_any_part_is_raised_when_all_have_ended() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    ended = threading.Event()

    def run(start: int, stop: int) -> None:
        if start:
            time.sleep(0.05)
            ended.set()
            raise ValueError("the second part")
        raise ValueError("the first part")

    with pytest.raises(ValueError, match="part"):
        threads.in_parts(2, 1, run)
    assert ended.is_set()
    torch.set_num_threads(before)


@pytest.mark.long
def test_kernels_run_where_nothing_can_be_cached(child: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """As in a container whose file system is read-only."""
    program = """
import numba.core.caching as caching
caching.CacheImpl._locator_classes = []
import torch
from bigq.kernels.cpu import columns
from bigq.kernels.grid import GridSpec
assert not columns._find_grids.stats.cache_path
print(columns.find_grid_compiled(torch.tensor([[7.5], [-7.5]]), GridSpec(bits=4, symmetric=True))[0].item())
"""
    done = child("-c", program)
    assert (done.returncode, done.stdout) == (0, "1.0\n"), done.stderr
