"""``dequantize`` and ``dequantize_packed`` on a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigq.kernels.gpu.grid import e4m3_of
from bigq.kernels.gpu.pack import code_at
from bigq.kernels.grid_spec import BOOKS, PointsName

#: Rows and columns of a tile.
TILE = (32, 128)


def dequantize_triton(codes: Tensor, scales: Tensor, zeros: Tensor, dtype: torch.dtype, points: PointsName = "int") -> Tensor:
    """``dequantize`` for codes in any memory order."""
    m, n = codes.shape
    return _launch(codes, (codes.stride(0), codes.stride(1)), (m, n), scales, zeros, 0, dtype, points)


def dequantize_packed_triton(
    words: Tensor, scales: Tensor, zeros: Tensor, bits: int, dtype: torch.dtype, points: PointsName = "int"
) -> Tensor:
    """``dequantize_packed`` for words in any memory order."""
    m, n = words.shape[1], words.shape[0] * 32 // bits
    return _launch(words, (words.stride(1), words.stride(0)), (m, n), scales, zeros, bits, dtype, points)


def _launch(
    source: Tensor,
    strides: tuple[int, int],
    shape: tuple[int, int],
    scales: Tensor,
    zeros: Tensor,
    bits: int,
    dtype: torch.dtype,
    points: PointsName,
) -> Tensor:
    m, n = shape
    out = torch.empty(m, n, dtype=dtype, device=source.device)
    _dequantize_kernel[(triton.cdiv(n, TILE[1]), triton.cdiv(m, TILE[0]))](
        source, scales, zeros, out, m, n, n // scales.shape[1], *strides, *scales.stride(), *zeros.stride(),
        BITS=bits, BOOK=(BOOKS[points][-1],) if points == "e4m3" else BOOKS[points] or None, BM=TILE[0], BN=TILE[1], num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _dequantize_kernel(
    source, scales, zeros, out, m, n, width, stride_m, stride_n, scales_m, scales_g, zeros_m, zeros_g,
    BITS: tl.constexpr, BOOK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BITS = 0: the source holds codes. Otherwise it holds words of BITS-bit codes."""
    rows = (tl.program_id(1) * BM + tl.arange(0, BM))[:, None].to(tl.int64)
    cols = (tl.program_id(0) * BN + tl.arange(0, BN))[None, :]
    mask = (rows < m) & (cols < n)
    if BITS == 0:
        code = tl.load(source + rows * stride_m + cols.to(tl.int64) * stride_n, mask=mask, other=0)
    else:
        code = code_at(source + rows * stride_m, cols, stride_n, mask, BITS)
    group = (cols // width).to(tl.int64)
    scale = tl.load(scales + rows * scales_m + group * scales_g, mask=mask, other=0.0).to(tl.float32)
    if BOOK is None:
        zero = tl.load(zeros + rows * zeros_m + group * zeros_g, mask=mask, other=0).to(tl.float32)
        value = (code.to(tl.float32) - zero) * scale
    elif len(BOOK) == 1:
        value = e4m3_of(code) * scale
    else:
        point = tl.zeros_like(scale) + BOOK[0]
        for i in tl.static_range(1, 16):
            point = tl.where(code == i, BOOK[i], point)
        value = point * scale
    tl.store(out + rows * n + cols, value.to(out.dtype.element_ty), mask=mask)
