"""``syrk`` on a GPU: the tiles of the upper triangle, on tensor cores.

There is a program for each tile of the whole square, ordered in groups of tile rows so that neighbours share their reads.
A program whose tile is below the diagonal returns at once. WIDEN is for Triton's interpreter, which cannot multiply bf16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from bigq.kernels.pick import uses_interpreter

#: Tiles of XᵀX: rows, columns, tokens per step. The second is used where bulk copies (TMA) cannot be. The sums of a 128 × 256 tile
#: take half of the registers of an H100 multiprocessor; without bulk copies it would spill.
SYRK_TILE = (128, 256, 64)
SYRK_TILE_PLAIN = (128, 128, 64)
#: Tile rows per group.
GROUP = 8


def has_bulk_copies(x: Tensor) -> bool:
    """True if x's device has bulk copies and the shared memory of the large tile: NVIDIA's data centre GPUs from Hopper on.

    On ROCm a capability is the number of an AMD architecture: gfx942 reports (9, 4), as a Hopper GPU reports (9, 0).
    """
    if uses_interpreter(x):
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(x.device)[0] in (9, 10)


def syrk_triton_(h: Tensor, x: Tensor) -> None:
    """``syrk_`` for fp16 and bf16 x [tokens, n] on fp32 h: 16-bit products, summed in fp32."""
    tokens, n = x.shape
    # Bulk copies need rows aligned to 16 bytes.
    bulk = has_bulk_copies(x) and x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
    bm, bn, bk = SYRK_TILE if bulk else SYRK_TILE_PLAIN
    grid = (triton.cdiv(n, bm) * triton.cdiv(n, bn),)
    left = TensorDescriptor.from_tensor(x, [bk, bm]) if bulk else x
    right = TensorDescriptor.from_tensor(x, [bk, bn]) if bulk else x
    _syrk_kernel[grid](
        left, right, h, tokens, n, *x.stride(), h.stride(0),
        BM=bm, BN=bn, BK=bk, GROUP=GROUP, BULK=bulk, WIDEN=uses_interpreter(x), num_warps=8, num_stages=3,
    )  # fmt: skip


@triton.jit
def upper_tile(pid, n, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """First row and first column of tile number ``pid``."""
    tiles_m = tl.cdiv(n, BM)
    tiles_n = tl.cdiv(n, BN)
    per_group = GROUP * tiles_n
    first = pid // per_group * GROUP
    here = min(tiles_m - first, GROUP)
    return (first + pid % per_group % here) * BM, (pid % per_group // here) * BN


@triton.jit
def _syrk_kernel(
    left, right, h, tokens, n, stride_x, stride_xn, stride_h,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    BULK: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    i, j = upper_tile(tl.program_id(0), n, BM, BN, GROUP)
    if j + BN <= i:
        return
    rows = i + tl.arange(0, BM)
    cols = j + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    if BULK:
        for t in range(0, tokens, BK):
            a = left.load([t, i])
            b = right.load([t, j])
            if WIDEN:
                a, b = a.to(tl.float32), b.to(tl.float32)
            acc = tl.dot(a.T, b, acc)
    else:
        for t in range(0, tokens, BK):
            ts = (t + tl.arange(0, BK))[:, None]
            at = ts.to(tl.int64) * stride_x
            a = tl.load(left + at + rows[None, :].to(tl.int64) * stride_xn, mask=(ts < tokens) & (rows < n)[None, :], other=0.0)
            b = tl.load(right + at + cols[None, :].to(tl.int64) * stride_xn, mask=(ts < tokens) & (cols < n)[None, :], other=0.0)
            if WIDEN:
                a, b = a.to(tl.float32), b.to(tl.float32)
            acc = tl.dot(a.T, b, acc)
    at = h + rows[:, None].to(tl.int64) * stride_h + cols[None, :]
    # Tiles on the diagonal store only their upper triangle.
    mask = (rows[:, None] <= cols[None, :]) & (cols < n)[None, :]
    tl.store(at, tl.load(at, mask=mask) + acc, mask=mask)
