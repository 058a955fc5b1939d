"""``rank_update`` on a GPU: fp32 accuracy from tensor cores.

Each fp32 number is split into two TF32 numbers, big and small. big·big + big·small + small·big omits only terms below fp32's
own rounding (Ootomo and Yokota 2022). For TF32, tensor cores need the summed index to be contiguous, as it is in the rows of
a factor.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bigq.kernels.pick import input_precision

#: Rows, columns and depth of a tile.
TILE = (128, 128, 32)


def rank_update_triton_(c: Tensor, a: Tensor, b: Tensor, *, triangle: bool = True) -> None:
    """``rank_update_`` for fp32 matrices whose rows are contiguous."""
    if c.ndim == 2:
        rank_update_triton_(c[None], a[None], b[None], triangle=triangle)
        return
    batch, m, n = c.shape
    assert c.stride(2) == a.stride(2) == b.stride(2) == 1
    bm, bn, bk = TILE
    _rank_update_kernel[(triton.cdiv(n, bn), triton.cdiv(m, bm), batch)](
        c, a, b, m, n, a.shape[2], m - n if triangle else m, *c.stride()[:2], *a.stride()[:2], *b.stride()[:2], BM=bm, BN=bn, BK=bk,
        PRECISION=input_precision(), num_warps=8, num_stages=3,
    )  # fmt: skip


@triton.jit
def _rank_update_kernel(
    c, a, b, m, n, k, above, batch_c, stride_c, batch_a, stride_a, batch_b, stride_b,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(1) * BM
    j = tl.program_id(0) * BN
    if i >= above + j + BN:
        return
    batch = tl.program_id(2).to(tl.int64)
    c += batch * batch_c
    a += batch * batch_a
    b += batch * batch_b
    rows = i + tl.arange(0, BM)
    cols = j + tl.arange(0, BN)
    depth = tl.arange(0, BK)
    left = a + rows[:, None].to(tl.int64) * stride_a + depth[None, :]
    right = b + cols[:, None].to(tl.int64) * stride_b + depth[None, :]
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for t in range(0, k, BK):
        live = (depth < k - t)[None, :]
        x = tl.load(left + t, mask=(rows < m)[:, None] & live, other=0.0)
        y = tl.load(right + t, mask=(cols < n)[:, None] & live, other=0.0)
        acc = tl.dot(x, y.T, acc, input_precision=PRECISION)
    at = c + rows[:, None].to(tl.int64) * stride_c + cols[None, :]
    mask = (rows < m)[:, None] & (cols < n)[None, :] & (rows[:, None] - above <= cols[None, :])
    tl.store(at, tl.load(at, mask=mask) - acc, mask=mask)
