"""Weights stored as fp8, int8 or fp4 numbers and scales, against their definition in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bigq.kernels import decode as module
from bigq.kernels.decode import E2M1, decode_scaled, exponents

pytestmark = pytest.mark.usefixtures("poisoned", "one_thread")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CODES = [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8]


def all_codes(dtype: torch.dtype) -> Tensor:
    return torch.arange(256, dtype=torch.uint8).view(dtype).view(8, 32)


def by_definition(byte: int, dtype: torch.dtype) -> float:
    """The value of a byte: by the tables of the formats' paper (OCP 8-bit floating point)."""
    if dtype == torch.int8:
        return float(byte - 256 if byte > 127 else byte)
    bits, bias = (3, 7) if dtype == torch.float8_e4m3fn else (2, 15)
    sign, exponent, mantissa = -1.0 if byte & 0x80 else 1.0, (byte & 0x7F) >> bits, byte & (2**bits - 1)
    if dtype == torch.float8_e4m3fn and byte & 0x7F == 0x7F:
        return math.nan
    if dtype == torch.float8_e5m2 and exponent == 31:
        return math.nan if mantissa else sign * math.inf
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - bits)
    return sign * (1 + mantissa / 2**bits) * 2.0 ** (exponent - bias)


@pytest.mark.parametrize("dtype", CODES)
def test_every_code_has_its_value(dtype: torch.dtype, device: torch.device) -> None:
    expected = torch.tensor([by_definition(byte, dtype) for byte in range(256)]).view(8, 32)
    got = decode_scaled(all_codes(dtype).to(device), torch.ones(1, 1, device=device), (8, 32), torch.float32).cpu()
    assert torch.equal(got, expected) or bool(((got == expected) | (got.isnan() & expected.isnan())).all())
    assert torch.equal(got.signbit()[expected == 0], expected.signbit()[expected == 0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [(1, 1000), (1, 16), (24, 40), (8, 8), (1000, 1000), (1000, 16), (1, 1)], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (33, 80), (130, 96), (2, 3, 25, 41)], ids=str)
def test_weights_are_numbers_times_scales(
    shape: tuple[int, ...], block: tuple[int, int], dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces of a few rows, so that their edges fall into blocks."""
    monkeypatch.setattr(module, "piece", lambda *, on_gpu: 700)
    generator = torch.Generator().manual_seed(sum(shape))
    *batch, m, n = shape
    block = (min(block[0], m), min(block[1], n))
    codes = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(*batch, math.ceil(m / block[0]), math.ceil(n / block[1]), generator=generator) + 0.01
    rows, columns = torch.arange(m) // block[0], torch.arange(n) // block[1]
    expected = (codes.double() * scales.double()[..., rows[:, None], columns[None, :]]).float().to(dtype)
    got = decode_scaled(codes.to(device), scales.to(device), block, dtype)
    assert got.is_contiguous() and torch.equal(got.cpu(), expected)
    changed = scales.clone()
    changed[..., -1, -1] *= 2
    assert not torch.equal(decode_scaled(codes.to(device), changed.to(device), block, dtype).cpu(), expected)


def test_halves_of_bytes(device: torch.device) -> None:
    """Every byte: the first number is in its low half."""
    codes = torch.arange(256, dtype=torch.uint8).view(4, 64)
    expected = torch.tensor([value for byte in range(256) for value in (E2M1[byte & 15], E2M1[byte >> 4])]).view(4, 128)
    scales = torch.tensor([[0.5, 3.0], [1.0, 7.0], [0.25, 100.0], [1.5, 1e-3]])
    got = decode_scaled(codes.to(device), scales.to(device), (1, 64), torch.float32).cpu()
    assert torch.equal(got, expected * scales.repeat_interleave(64, 1))
    assert E2M1[:8] == tuple(by for by in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0))


@pytest.mark.parametrize("as_dtype", [False, True])
def test_exponents(as_dtype: bool, device: torch.device) -> None:
    given = torch.arange(256, dtype=torch.uint8)
    got = exponents((given.view(torch.float8_e8m0fnu) if as_dtype else given).to(device)).cpu()
    expected = torch.tensor([2.0 ** (e - 127) for e in range(255)], dtype=torch.float64).float()
    assert torch.equal(got[:255], expected) and bool(got[255].isnan())


def test_other_scales_are_converted() -> None:
    given = torch.tensor([0.5, 448.0]).to(torch.float8_e4m3fn)
    assert exponents(given).dtype == torch.float32 and torch.equal(exponents(given), given.float())
