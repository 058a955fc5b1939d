"""Codes, scales and zeros to weights, against fp64."""

from __future__ import annotations

import pytest
import torch
from checks import INTERPRETED, ORDERS, VERSIONS, kernel, same_bytes, stored, untouched
from torch import Tensor

from bigq.kernels import dequantize as module
from bigq.kernels.dequantize import dequantize, dequantize_packed
from bigq.kernels.pack import pack_reference

pytestmark = pytest.mark.usefixtures("poisoned", "one_thread")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

#: m, n and groups; around tiles of 32 × 128.
SHAPES = [(1, 32, 1), (5, 96, 3), (31, 128, 16), (33, 160, 5), (65, 288, 2), (2, 256, 32)]

Quantized = tuple[Tensor, Tensor, Tensor]


def quantized(bits: int, m: int, n: int, groups: int, device: torch.device) -> Quantized:
    """Codes [m, n], scales and zeros [m, groups] in the layout of the solver."""
    gen = torch.Generator().manual_seed(bits * m * n)
    codes, zeros = (torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=gen) for shape in ((m, n), (m, groups)))
    scales = (0.001 + torch.rand(m, groups, generator=gen)).to(torch.float16)
    return codes.to(device), scales.to(device), zeros.to(device)


def expected(codes: Tensor, scales: Tensor, zeros: Tensor, dtype: torch.dtype) -> Tensor:
    """Computed in fp64 without rounding, then rounded once. fp16 times a small integer is exact in fp32 too."""
    scales, zeros = (t.double().repeat_interleave(codes.shape[1] // t.shape[1], 1) for t in (scales, zeros))
    return ((codes.double() - zeros) * scales).to(dtype)


def agrees(weight: Tensor, exact: Tensor, version: str = "triton") -> bool:
    if INTERPRETED and version == "triton" and weight.dtype == torch.bfloat16:
        return bool(((weight.double() - exact.double()).abs() <= 2**-7 * exact.double().abs()).all())
    return torch.equal(weight, exact)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", VERSIONS)
def test_weights_equal_their_definition(
    version: str, bits: int, dtype: torch.dtype, shape: tuple[int, int, int], device: torch.device
) -> None:
    parts = quantized(bits, *shape, device)
    scales = parts[1]
    weight, again = (kernel("dequantize", version)(*parts, dtype) for _ in range(2))
    assert weight.dtype == dtype and weight.is_contiguous() and same_bytes(weight, again)
    assert agrees(weight, expected(*parts, dtype), version)
    for i, part in enumerate(parts):
        changed = part.clone()
        changed[-1, -1] = 2 * part[-1, -1] if part.is_floating_point() else part[-1, -1] ^ (1 << (bits - 1))
        others = [changed if i == j else other for j, other in enumerate(parts)]
        unseen = part is scales and not weight[-1, -shape[1] // shape[2] :].any()
        assert unseen or not agrees(weight, expected(*others, dtype), version), "the comparison sees nothing"


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("grid_order", ORDERS)
@pytest.mark.parametrize("version", VERSIONS)
def test_any_memory_order_works(version: str, grid_order: str, order: str, device: torch.device) -> None:
    codes, scales, zeros = quantized(4, 33, 160, 5, device)
    given = stored(codes, order), stored(scales, grid_order), stored(zeros, order)
    assert agrees(kernel("dequantize", version)(*given, torch.float32), expected(codes, scales, zeros, torch.float32))
    assert order != "within a larger one" or untouched(given[0])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.usefixtures("triton_path")
def test_packed_codes_give_the_same_weights(bits: int, shape: tuple[int, int, int], order: str, device: torch.device) -> None:
    """Scales and zeros in the layout of the checkpoint formats: [G, m]."""
    codes, scales, zeros = quantized(bits, *shape, device)
    words = stored(pack_reference(codes.T, bits), order)
    for dtype in DTYPES:
        weight = dequantize_packed(words, stored(scales, "by columns"), stored(zeros, "by columns"), bits, dtype)
        assert weight.dtype == dtype and agrees(weight, expected(codes, scales, zeros, dtype))
    words[-1, -1] ^= 1 << 31
    assert not agrees(dequantize_packed(words, scales, zeros, bits, torch.float32), expected(codes, scales, zeros, torch.float32))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packed_codes_give_the_same_weights_in_plain_torch(bits: int) -> None:
    codes, scales, zeros = quantized(bits, 5, 96, 3, torch.device("cpu"))
    weight = dequantize_packed(pack_reference(codes.T, bits), scales, zeros, bits, torch.bfloat16)
    assert torch.equal(weight, expected(codes, scales, zeros, torch.bfloat16))


@pytest.mark.parametrize("chunk", [1, 96, 200, 1000])
def test_chunks_of_any_size_give_the_same_weights(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = quantized(4, 7, 96, 3, torch.device("cpu"))
    monkeypatch.setattr(module, "piece", lambda on_gpu: chunk)
    assert torch.equal(dequantize(*parts, torch.float32), expected(*parts, torch.float32))


@pytest.mark.usefixtures("triton_path")
def test_fp64_uses_the_reference(device: torch.device) -> None:
    codes, scales, zeros = quantized(3, 4, 64, 2, device)
    assert torch.equal(dequantize(codes, scales, zeros, torch.float64), expected(codes, scales, zeros, torch.float64))
    words = pack_reference(codes.T, 3)
    assert torch.equal(dequantize_packed(words, scales, zeros, 3, torch.float64), expected(codes, scales, zeros, torch.float64))
