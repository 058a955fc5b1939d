"""Packed weight times a few vectors, against fp64."""

from __future__ import annotations

import pytest
import torch
from checks import INTERPRETED, VERSIONS, as_good, kernel, same_bytes
from torch import Tensor

from bigq.kernels.dequant_matvec import MAX_VECTORS, dequant_matvec
from bigq.kernels.pack import pack_reference

pytestmark = pytest.mark.usefixtures("poisoned", "one_thread")

BITS = [2, 3, 4, 8]
DTYPES = [torch.float16, torch.bfloat16]

#: Codes in a cycle of whole words; a program reads 16 cycles at a time.
CYCLE = {2: 16, 3: 32, 4: 8, 8: 4}

Problem = tuple[Tensor, Tensor, Tensor, Tensor]


def problem(bits: int, b: int, m: int, n: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Problem, Tensor]:
    """x [b, n], words, scales [G, m] and zeros [G, m] in the layout of the checkpoint formats; and the weight in fp64."""
    gen = torch.Generator().manual_seed(b * m * n + bits)
    codes = torch.randint(0, 2**bits, (n, m), dtype=torch.uint8, generator=gen)
    zeros = torch.randint(0, 2**bits, (n // width, m), dtype=torch.uint8, generator=gen)
    scales = (0.01 + 0.02 * torch.rand(n // width, m, generator=gen)).to(torch.float16)
    x = torch.randn(b, n, generator=gen).to(dtype)
    weight = (codes.double() - zeros.double().repeat_interleave(width, 0)) * scales.double().repeat_interleave(width, 0)
    return (x.to(device), pack_reference(codes, bits).to(device), scales.to(device), zeros.to(device)), weight.T.to(device)


def own(x: Tensor, weight: Tensor) -> Tensor:
    """The result of torch with a weight in x's dtype."""
    return (x.float() @ weight.to(x.dtype).float().T).to(x.dtype)


def near(y: Tensor, x: Tensor, weight: Tensor) -> bool:
    """As good as torch's result. With Triton's interpreter, a bf16 result may be one unit in the last place lower."""
    exact = x.double() @ weight.T
    if INTERPRETED and y.dtype == torch.bfloat16:
        slack = 2**-22 * (x.double().abs() @ weight.abs().T)
        return bool(((y.double() - exact).abs() <= 2**-7 * exact.abs() + slack).all())
    return as_good(y, own(x, weight), exact)


CASES = [
    # b, m, cycles of n, cycles of a group
    pytest.param(1, 1, 1, 1, id="one cycle"),
    pytest.param(3, 129, 6, 2, id="groups of 2 cycles"),
    pytest.param(16, 127, 33, 3, id="groups that 16 cycles do not hold whole"),
    pytest.param(2, 130, 48, 16, id="one group at a time"),
    pytest.param(5, 7, 64, 32, id="two reads of each group"),
    pytest.param(2, 9, 40, 8, id="groups of half a read"),
    pytest.param(4, 200, 24, 24, id="one group and a short read"),
    pytest.param(1, 256, 35, 5, id="a last program with little to do"),
]


@pytest.mark.parametrize(("b", "m", "cycles", "group"), CASES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("version", VERSIONS)
def test_product_is_as_good_as_torchs_own(
    version: str, bits: int, dtype: torch.dtype, b: int, m: int, cycles: int, group: int, device: torch.device
) -> None:
    operands, weight = problem(bits, b, m, cycles * CYCLE[bits], group * CYCLE[bits], dtype, device)
    y = kernel("dequant_matvec", version)(*operands, bits)
    assert y.dtype == dtype and y.shape == (b, m) and near(y, operands[0], weight)


@pytest.mark.parametrize(("programs", "splits"), [(1, 1), (4, 2), (6, 3), (1024, 7)])
@pytest.mark.parametrize(("bits", "group"), [(4, 16), (8, 7)])
def test_inputs_split_among_any_number_of_programs(
    bits: int, group: int, programs: int, splits: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """7 reads of 16 cycles by 2 programs for outputs: partial sums of fp32 differ from one sum by their rounding alone."""
    module = pytest.importorskip("bigq.kernels.gpu.dequant_matvec")
    monkeypatch.setattr(module, "PROGRAMS", programs)
    operands, weight = problem(bits, 3, 200, 112 * CYCLE[bits], group * CYCLE[bits], torch.float16, device)
    grids = []
    kernel_of = module._matvec_kernel

    class Launches:
        def __getitem__(self, grid: tuple[int, int]) -> object:
            grids.append(grid)
            return kernel_of[grid]

    monkeypatch.setattr(module, "_matvec_kernel", Launches())
    y, again = (module.dequant_matvec_triton(*operands, bits) for _ in range(2))
    assert grids == [(2, splits)] * 2
    assert near(y, operands[0], weight) and same_bytes(y, again)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [1, 16])
@pytest.mark.parametrize("version", VERSIONS)
def test_the_criterion_sees_one_code(version: str, group: int, bits: int, device: torch.device) -> None:
    """The last code of the last output, by its highest bit; and a zero point, and a scale."""
    operands, weight = problem(bits, 2, 5, 32 * CYCLE[bits], group * CYCLE[bits], torch.float16, device)
    x, words, scales, zeros = operands
    run = kernel("dequant_matvec", version)
    assert near(run(*operands, bits), x, weight)
    words[-1, -1] ^= -(2**31)
    assert not near(run(*operands, bits), x, weight)
    words[-1, -1] ^= -(2**31)
    zeros[-1, -1] ^= 1
    assert not near(run(*operands, bits), x, weight)
    zeros[-1, -1] ^= 1
    scales[-1, -1] *= 1.5
    assert not near(run(*operands, bits), x, weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("version", VERSIONS)
def test_rows_of_x_may_be_strided(version: str, dtype: torch.dtype, device: torch.device) -> None:
    """Between the rows there is NaN."""
    (x, *rest), weight = problem(4, 5, 40, 128, 32, dtype, device)
    buffer = torch.full((9, 150), float("nan"), dtype=dtype, device=device)
    apart = buffer[1:6, 3:131].copy_(x)
    assert near(kernel("dequant_matvec", version)(apart, *rest, 4), x, weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("version", VERSIONS)
def test_the_largest_codes_are_exact(version: str, bits: int, dtype: torch.dtype, device: torch.device) -> None:
    """Each code minus each zero, for vectors that pick one weight each: 0 − 255 as well as 255 − 0."""
    top = 2**bits - 1
    zeros = torch.tensor([[0, top, 1, top // 2, top]], dtype=torch.uint8, device=device)
    codes = torch.tensor([top, 0, top // 2, 1], dtype=torch.uint8, device=device).repeat(8)[:, None].expand(32, 5)
    scales = torch.ones(1, 5, dtype=torch.float16, device=device)
    x = torch.eye(4, 32, dtype=dtype, device=device)
    y = kernel("dequant_matvec", version)(x, pack_reference(codes, bits), scales, zeros, bits)
    assert y.tolist() == (codes[:4].double() - zeros.double()).tolist()


@pytest.mark.usefixtures("triton_path")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("bits", "width", "served"), [(2, 8, False), (2, 16, True), (3, 8, False), (3, 48, False), (3, 64, True), (4, 8, True)]
)
def test_groups_that_begin_inside_a_cycle_use_the_reference(
    bits: int, width: int, served: bool, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = pytest.importorskip("bigq.kernels.gpu.dequant_matvec")
    calls = []
    run = module.dequant_matvec_triton
    monkeypatch.setattr(module, "dequant_matvec_triton", lambda *args: calls.append(1) or run(*args))
    operands, weight = problem(bits, 2, 9, 192, width, dtype, device)
    assert near(dequant_matvec(*operands, bits), operands[0], weight)
    assert bool(calls) == served == module.supports_group(width, bits)


def test_more_than_sixteen_vectors_are_refused() -> None:
    operands, _ = problem(4, MAX_VECTORS, 3, 32, 32, torch.float16, torch.device("cpu"))
    assert dequant_matvec(*operands, 4).shape == (16, 3)
    operands, _ = problem(4, MAX_VECTORS + 1, 3, 32, 32, torch.float16, torch.device("cpu"))
    with pytest.raises(AssertionError):
        dequant_matvec(*operands, 4)


@pytest.mark.parametrize("version", VERSIONS)
def test_sums_are_in_fp32(version: str, device: torch.device) -> None:
    """Summed in fp16, thousands of ones would stop at 2048."""
    n = 4096
    words = pack_reference(torch.ones(n, 1, dtype=torch.uint8, device=device), 8)
    scales = torch.ones(1, 1, dtype=torch.float16, device=device)
    x = torch.ones(1, n, dtype=torch.float16, device=device)
    assert kernel("dequant_matvec", version)(x, words, scales, scales.to(torch.uint8) - 1, 8).item() == n
