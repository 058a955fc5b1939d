"""Accumulate ``XᵀX`` into the upper triangle of a matrix, with half the arithmetic of a full product."""

from __future__ import annotations

import torch
from torch import Tensor

from bigq.kernels.pick import use_compiled, use_triton

#: Tokens that are converted to h's dtype at a time, and columns per tile.
#: For n = 2816 on two CPU cores, tiles of 128 or 256 take 56 % of the full product's time, tiles of 512 58 %, of 1024 67 %.
CHUNK_TOKENS = 4096
TILE = 256


def syrk_(h: Tensor, x: Tensor) -> None:
    """Add ``xᵀ·x`` to the upper triangle of h, in place.

    h: fp32 or fp64 [n, n]. Below the diagonal, only tiles on the diagonal may be written.
    x: [tokens, n] of any floating type, converted to h's. Products of 16-bit values are exact in fp32.
    """
    if use_triton(h) and h.dtype == torch.float32 and x.dtype in (torch.float16, torch.bfloat16):
        from bigq.kernels.gpu.syrk import syrk_triton_

        syrk_triton_(h, x)
        return
    if x.dtype == torch.bfloat16 and use_compiled(h):
        from bigq.kernels.cpu.syrk import can_accumulate, syrk_compiled_

        if can_accumulate(h, x):
            syrk_compiled_(h, x)
            return
    syrk_reference_(h, x)


def syrk_reference_(h: Tensor, x: Tensor) -> None:
    """``syrk_`` in plain torch, one column of tiles at a time."""
    n = h.shape[0]
    for chunk in x.split(CHUNK_TOKENS):
        chunk = chunk.to(h.dtype)
        for lo in range(0, n, TILE):
            hi = min(lo + TILE, n)
            h[:hi, lo:hi].addmm_(chunk[:, :hi].T, chunk[:, lo:hi])
