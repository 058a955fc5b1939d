"""Packed weight times a few vectors: the matrix product of decoding one token at a time.

It is bound by memory bandwidth. Packed codes are read directly, which is an eighth (2 bits) to a half (8 bits) of the bytes of
a 16-bit weight. The aim is the speed of a plain copy, with the arithmetic hidden behind the reads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bigq.kernels.dequantize import dequantize_packed
from bigq.kernels.pick import use_triton

MAX_VECTORS = 16


def dequant_matvec(x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """``x·Wᵀ`` in x's type, summed in fp32.

    x: fp16 or bf16 [b, n], b ≤ 16. words: int32 [n·bits/32, m], codes of W [m, n] packed along n. scales: fp16 [G, m];
    zeros: uint8 [G, m]. G divides n. This is the memory order of the checkpoint formats.
    """
    assert x.shape[0] <= MAX_VECTORS
    if use_triton(x):
        from bigq.kernels.gpu.dequant_matvec import dequant_matvec_triton, supports_group

        if supports_group(x.shape[1] // scales.shape[0], bits):
            return dequant_matvec_triton(x, words, scales, zeros, bits)
    return dequant_matvec_reference(x, words, scales, zeros, bits)


def dequant_matvec_reference(x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """``dequant_matvec`` in plain torch. Forms the whole weight in fp32."""
    return (x.float() @ dequantize_packed(words, scales.T, zeros.T, bits, torch.float32).T).to(x.dtype)
