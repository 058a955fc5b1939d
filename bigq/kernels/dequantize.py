"""Codes, scales and zero points to weights: ``scale · (code − zero)`` or ``scale · book[code]``, computed in fp32 and rounded once."""

from __future__ import annotations

import torch
from torch import Tensor

from bigq.kernels.grid_spec import BOOKS, PointsName
from bigq.kernels.pack import unpack
from bigq.kernels.pick import piece, use_triton


def dequantize(codes: Tensor, scales: Tensor, zeros: Tensor, dtype: torch.dtype, points: PointsName = "int") -> Tensor:
    """The weight [m, n] in ``dtype``. codes: uint8 [m, n]; scales, zeros: [m, G], n a multiple of G. points: what codes stand for."""
    if use_triton(codes) and dtype != torch.float64:
        from bigq.kernels.gpu.dequantize import dequantize_triton

        return dequantize_triton(codes, scales, zeros, dtype, points)
    return dequantize_reference(codes, scales, zeros, dtype, points)


def dequantize_packed(words: Tensor, scales: Tensor, zeros: Tensor, bits: int, dtype: torch.dtype, points: PointsName = "int") -> Tensor:
    """The weight [m, n] in ``dtype`` from codes packed along n. words: int32 [n·bits/32, m]; scales, zeros: [m, G]."""
    if use_triton(words) and dtype != torch.float64:
        from bigq.kernels.gpu.dequantize import dequantize_packed_triton

        return dequantize_packed_triton(words, scales, zeros, bits, dtype, points)
    return dequantize_reference(unpack(words, bits).T, scales, zeros, dtype, points)


def dequantize_reference(codes: Tensor, scales: Tensor, zeros: Tensor, dtype: torch.dtype, points: PointsName = "int") -> Tensor:
    """``dequantize`` in plain torch, some weights at a time: their fp32 intermediate is a ``piece``."""
    m, n = codes.shape
    groups = scales.shape[1]
    out = torch.empty(m, n, dtype=dtype, device=codes.device)
    rows = max(1, piece(on_gpu=codes.is_cuda) // n)
    scales, zeros = scales.float(), zeros.float()
    book = torch.tensor(BOOKS[points], device=codes.device)
    for lo in range(0, m, rows):
        own = codes[lo : lo + rows].reshape(-1, groups, n // groups)
        part = book[own.int()] if len(book) else own.float()
        if not len(book):
            part -= zeros[lo : lo + rows, :, None]
        part *= scales[lo : lo + rows, :, None]
        out[lo : lo + rows] = part.reshape(-1, n)
    return out
