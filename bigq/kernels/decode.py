"""Weights that a checkpoint stores as 8-bit or 4-bit numbers and scales: ``scale · number``, computed in fp32 and rounded once.

A scale belongs to a rectangle of the matrix: a block of 128 × 128, a row, a group of columns, or all of it. Rectangles at the lower and
right edges may be cut off. The 4-bit numbers are those of E2M1, two in a byte, the first one in the low half.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from bigq.kernels.pick import piece

#: The numbers of E2M1 (1 sign, 2 exponent bits, 1 mantissa bit) by their code.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
#: An exponent of E8M0 stands for 2^(exponent − 127); this one is NaN.
E8M0_BIAS, E8M0_NAN = 127, 255
#: On a CPU the bits of fp8 are moved to the places that they have in fp16, since torch converts only 0.2 · 10⁹ fp8 numbers a second.
#: Numbers of E4M3 are then too small by this factor, for fp16 has another bias. (For E2M1, a table is faster than that.)
_E4M3_SHIFT = 2.0**8


def decode_scaled(codes: Tensor, scales: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The weights [..., m, n] in ``dtype``.

    codes: fp8 or int8 [..., m, n], or uint8 [..., m, n/2] with two E2M1 numbers in each byte.
    scales: fp32 [..., ⌈m/block[0]⌉, ⌈n/block[1]⌉]. Codes that are NaN become NaN. Some rows are decoded at a time, so that little more
    memory than that of the weights is needed.
    """
    pairs = codes.dtype == torch.uint8
    *batch, m, n = codes.shape
    n *= 2 if pairs else 1
    high, wide = block
    weight = torch.empty(*batch, m, n, dtype=dtype, device=codes.device)
    flat = weight.view(-1, m, n), codes.reshape(-1, m, codes.shape[-1]), scales.reshape(-1, *scales.shape[-2:])
    rows = max(1, piece(on_gpu=codes.is_cuda) // max(n, 1))
    rows = rows if high >= m else max(high, rows // high * high)
    for out, matrix, factors in zip(*flat, strict=True):
        for lo in range(0, m, rows):
            part = matrix[lo : lo + rows]
            numbers = _pairs(part) if pairs else _numbers(part)
            own = factors[lo // high : math.ceil((lo + len(part)) / high)]
            if not codes.is_cuda and codes.dtype == torch.float8_e4m3fn:
                own = own * _E4M3_SHIFT  # exact, and so is the product: both factors only change by powers of two
            if high > 1:
                own = own.repeat_interleave(high, 0)[: len(part)]
            _scale_(numbers, own, wide)
            out[lo : lo + rows] = numbers
    return weight


def exponents(scales: Tensor) -> Tensor:
    """Scales as fp32: E8M0 exponents, given as uint8 or as torch's E8M0, become powers of two; others are converted."""
    if scales.dtype == torch.float8_e8m0fnu:
        scales = scales.view(torch.uint8)
    if scales.dtype != torch.uint8:
        return scales.float()
    values = torch.ldexp(torch.ones(scales.shape, device=scales.device), scales.to(torch.int32) - E8M0_BIAS)
    return values.masked_fill_(scales == E8M0_NAN, math.nan)


def _scale_(numbers: Tensor, own: Tensor, wide: int) -> None:
    """Multiply fp32 [k, n] by scales [k or 1, ⌈n/wide⌉] in place."""
    n = numbers.shape[1]
    if own.shape[1] == 1:
        numbers *= own
    elif n % wide == 0:
        numbers.view(len(numbers), -1, wide).mul_(own[:, :, None])
    else:
        numbers *= own.repeat_interleave(wide, 1)[:, :n]


def _numbers(codes: Tensor) -> Tensor:
    """Fp8 or int8 as fp32; E4M3 on a CPU without ``_E4M3_SHIFT``."""
    if codes.is_cuda or codes.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
        return codes.float()
    small = codes.view(torch.int8)
    bits = small.to(torch.int16)
    if codes.dtype == torch.float8_e5m2:
        return bits.bitwise_left_shift_(8).view(torch.float16).float()
    # The sign, which the conversion has copied to all upper bits, stays in the highest one alone.
    numbers = bits.bitwise_left_shift_(7).bitwise_and_(~0x4000).view(torch.float16).float()
    if int((small & 0x7F).max()) == 0x7F:
        numbers[(small & 0x7F) == 0x7F] = math.nan
    return numbers


def _pairs(codes: Tensor) -> Tensor:
    """Bytes [k, n/2] as fp32 numbers of E2M1 [k, n]."""
    table = _table(codes.device)
    found = table.index_select(0, codes.reshape(-1).to(torch.int32))
    return found.view(torch.bfloat16).view(len(codes), -1).float()


@functools.cache
def _table(device: torch.device) -> Tensor:
    """Both numbers of every byte as bf16, in which they are exact, as one int32 [256]."""
    numbers = torch.tensor(E2M1, dtype=torch.bfloat16)
    byte = torch.arange(256)
    return torch.stack([numbers[byte % 16], numbers[byte // 16]], 1).view(torch.int32).flatten().to(device)
