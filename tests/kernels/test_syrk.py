"""XᵀX into an upper triangle, against fp64 and torch's fp32 product."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from checks import INTERPRETED, ORDERS, VERSIONS, as_good, kernel, same_bytes, stored, untouched
from torch import Tensor

from bigq.kernels.syrk import syrk_

pytestmark = pytest.mark.usefixtures("poisoned", "one_thread")

SIZES = [1, 3, 255, 256, 257, 300, 700]
HALVES = [torch.bfloat16, torch.float16]

#: Tokens and inputs around the tiles of both versions. A multiple of 8 as n uses bulk copies, 1160 several groups of tiles.
SHAPES = [(1, 1), (33, 5), (1, 8), (64, 127), (65, 128), (63, 129), (200, 136), (7, 256), (70, 257), (5, 520), (2, 1160), (3, 1101)]

#: Tensor cores sum in another order and precision.
FLOOR = 2.0**-24 if INTERPRETED else 1e-5


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
def test_long_batches_are_summed_completely(tokens: int) -> None:
    x = activations(tokens, 5, torch.float32)
    h = torch.zeros(5, 5, dtype=torch.float64)
    syrk_(h, x)
    assert torch.allclose(h.triu(), (x.double().T @ x.double()).triu(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("n", [5, 300])
def test_the_product_is_added_to_h(n: int) -> None:
    first, second = activations(50, n, torch.float32), activations(71, n, torch.float32)
    h = torch.zeros(n, n, dtype=torch.float64)
    syrk_(h, first)
    syrk_(h, second)
    both = torch.cat([first, second]).double()
    assert torch.allclose(h.triu(), (both.T @ both).triu(), rtol=1e-12, atol=1e-12)


def test_rows_that_are_not_contiguous() -> None:
    x = activations(64, 600, torch.float32)[:, ::2]
    h = torch.zeros(300, 300, dtype=torch.float64)
    syrk_(h, x)
    assert torch.allclose(h.triu(), (x.double().T @ x.double()).triu(), rtol=1e-12, atol=1e-12)


def test_tiles_below_the_diagonal_are_not_written() -> None:
    h = torch.zeros(700, 700)
    h[600:, :100] = 7.0
    syrk_(h, activations(16, 700, torch.float32))
    assert bool((h[600:, :100] == 7.0).all())


def added(version: str, before: Tensor, x: Tensor, order: str = "by rows") -> Tensor:
    """The sum that a version computes from ``before``."""
    h = stored(before, order)
    kernel("syrk_", version)(h, x)
    assert order != "within a larger one" or untouched(h)
    return h


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("version", VERSIONS)
def test_sixteen_bit_inputs_are_summed_in_fp32(version: str, dtype: torch.dtype, shape: tuple[int, int], device: torch.device) -> None:
    x = activations(*shape, dtype).to(device)
    before = activations(shape[1], shape[1], torch.float32).to(device)
    exact = (before.double() + x.double().T @ x.double()).triu()
    own = (before + x.float().T @ x.float()).triu()
    assert as_good(added(version, before, x).triu(), own, exact, floor=FLOOR)


@pytest.mark.parametrize("where", ["every other column", "unaligned", "wider", "aligned", "stored by columns"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("version", VERSIONS)
def test_inputs_in_any_memory_order(version: str, dtype: torch.dtype, where: str, device: torch.device) -> None:
    """Memory between the rows is NaN. If it were read, the sum would be NaN."""
    plain = activations(70, 136, dtype).to(device)
    buffer = torch.full((80, 320), float("nan"), dtype=dtype, device=device)
    views = {
        "every other column": buffer[:70, 0:272:2],
        "unaligned": buffer[3:73, 5:141],
        "wider": buffer[:, :318].flatten()[: 318 * 70].view(70, 318)[:, :136],
        "aligned": buffer[3:73, 8:144],
        "stored by columns": buffer.flatten()[: 136 * 75].view(136, 75)[:, 2:72].T,
    }
    x = views[where].copy_(plain)
    h = added(version, torch.zeros(136, 136, device=device), x)
    assert as_good(h.triu(), (plain.float().T @ plain.float()).triu(), (plain.double().T @ plain.double()).triu(), floor=FLOOR)


@pytest.mark.parametrize("n", [3, 129, 264, 301])
def test_triton_writes_only_the_upper_triangle(n: int, device: torch.device) -> None:
    """Outside it there are numbers, which any addition would change, and NaN, which would spread if read."""
    x = activations(20, n, torch.float16).to(device)
    below = torch.ones(n, n, dtype=torch.bool, device=device).tril(-1)
    for value in (7.0, float("nan")):
        h = added("triton", torch.zeros(n, n, device=device).masked_fill_(below, value), x, "within a larger one")
        assert same_bytes(h[below], torch.full_like(h[below], value))
        assert not h[~below].isnan().any() and int((h[~below] == 0).sum()) == 0


@pytest.mark.parametrize(
    ("hip", "capability", "bulk"),
    [(None, (8, 9), False), (None, (9, 0), True), (None, (10, 0), True), (None, (12, 0), False), ("6.4.0", (9, 4), False)],
    ids=["Ada", "Hopper", "Blackwell", "GeForce", "gfx942"],
)
def test_only_large_nvidia_gpus_have_bulk_copies(
    hip: str | None, capability: tuple[int, int], bulk: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of an AMD architecture looks like a capability."""
    has_bulk_copies = pytest.importorskip("bigq.kernels.gpu.syrk").has_bulk_copies
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    assert has_bulk_copies(SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))) == bulk


@pytest.mark.parametrize("dtype", HALVES)
def test_without_bulk_copies_the_sum_is_as_good(dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("bigq.kernels.gpu.syrk")
    monkeypatch.setattr(module, "has_bulk_copies", lambda _x: False)
    monkeypatch.setattr(module, "TensorDescriptor", None)
    x = activations(70, 264, dtype).to(device)
    h = added("triton", torch.zeros(264, 264, device=device), x)
    assert as_good(h.triu(), (x.float().T @ x.float()).triu(), (x.double().T @ x.double()).triu(), floor=FLOOR)


@pytest.mark.parametrize("order", [order for order in ORDERS if order != "by columns"])
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("n", [136, 257])
def test_the_same_input_gives_the_same_bytes(n: int, version: str, order: str, device: torch.device) -> None:
    x, before = activations(90, n, torch.bfloat16).to(device), activations(n, n, torch.float32).to(device)
    assert same_bytes(added(version, before, x, order), added(version, before, x, order))


@pytest.mark.parametrize("version", VERSIONS)
def test_the_criterion_sees_one_changed_input(version: str, device: torch.device) -> None:
    x = activations(200, 136, torch.float16).to(device)
    exact, own = (x.to(dtype).T @ x.to(dtype) for dtype in (torch.float64, torch.float32))
    x[199, 135] += 0.125
    h = added(version, torch.zeros(136, 136, device=device), x)
    assert not as_good(h.triu(), own.triu(), exact.triu(), floor=FLOOR)
