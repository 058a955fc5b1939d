"""``gptq_block`` on a GPU: one launch quantizes all columns of a block, each program for a tile of rows.

A program is one warp and holds BM rows × SUB columns of weights in registers. Step j extracts column j from the tile by a
masked sum, rounds it, and subtracts the outer product of its error and row j of U from the columns to its right. Before the
next tile of columns begins, it is corrected for the errors of all tiles before it, which are read from ``target``. Divisions
are IEEE and multiply-adds are not fused, so the arithmetic is that of the reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigq.kernels.gpu.grid import _codes, _grid_for_range, _nearest, book_of, drop_of, found_grid_triton
from bigq.kernels.grid_spec import GroupGrid
from bigq.kernels.pick import input_precision

MAX_COLUMNS = 128
ROWS = 16

#: Columns in registers (SUB), and warps. Each step executes instructions for every column in registers, so a tile is narrow.
TILE, WARPS = 32, 1
#: The same for groups whose grid is found in the loop and whose width neither divides TILE nor is a multiple of it.
WHOLE, WHOLE_WARPS = 128, 4


def gptq_block_triton_(target: Tensor, u: Tensor, work: Tensor, codes: Tensor, grid: GroupGrid) -> Tensor:
    """``gptq_block_`` for fp32; at most 128 columns."""
    if target.ndim == 2:
        one = GroupGrid(grid.spec, grid.scale[None], grid.zero[None], grid.group[None], grid.find)
        return gptq_block_triton_(target[None], u[None], work[None], codes[None], one)[0]
    k = target.shape[1]
    assert k <= MAX_COLUMNS
    if not (grid.find and grid.spec.search):
        return _launch(target, u, work, codes, grid)
    # A search solves each group with several grids, so its groups are launches of their own.
    loss = torch.zeros(target.shape[0], target.shape[2], dtype=target.dtype, device=target.device)
    width = k // grid.scale.shape[1]
    for g in range(grid.scale.shape[1]):
        s, e = g * width, (g + 1) * width
        group = target[:, s:e], u[:, s:e, s:e]
        grid.scale[:, g], grid.zero[:, g] = found_grid_triton(*group, grid.spec)
        given = GroupGrid(grid.spec, grid.scale[:, g : g + 1], grid.zero[:, g : g + 1], torch.zeros_like(grid.group[:, s:e]), False)
        loss += _launch(*group, work[:, s:e], codes[:, s:e], given)
        target[:, e:] -= u[:, s:e, e:].mT @ target[:, s:e]
    return loss


def _launch(target: Tensor, u: Tensor, work: Tensor, codes: Tensor, grid: GroupGrid) -> Tensor:
    batch, k, m = target.shape
    spec = grid.spec
    loss = torch.empty(batch, m, dtype=torch.float32, device=target.device)
    width = k // grid.scale.shape[1] if grid.find else 0
    tiled = width == 0 or TILE % width == 0 or width % TILE == 0
    assert grid.scale.stride() == grid.zero.stride() and target.dtype == work.dtype == u.dtype == torch.float32
    _gptq_block_kernel[(triton.cdiv(m, ROWS), batch)](
        target,
        u,
        work,
        codes,
        grid.scale,
        grid.zero,
        grid.group,
        loss,
        k,
        m,
        *target.stride(),
        *u.stride(),
        *work.stride(),
        *codes.stride(),
        *grid.scale.stride(),
        *grid.group.stride(),
        MAX_CODE=spec.max_code,
        HALF=2.0 ** (spec.bits - 1),
        SYMMETRIC=spec.symmetric,
        MIN_ZERO=spec.min_zero,
        DROP=drop_of(spec) if grid.find else 0,  # given scales are rounded already: one variant for all precisions
        **book_of(spec),
        WIDTH=width,
        SUB=TILE if tiled else WHOLE,
        BM=ROWS,
        PRECISION=input_precision(),
        num_warps=WARPS if tiled else WHOLE_WARPS,
        enable_fp_fusion=False,
    )
    return loss


@triton.jit
def _corrected(target, target_k, u, u_k, u_n, k, row_live, first, last, SUB: tl.constexpr, PRECISION: tl.constexpr):
    """Columns ``last`` … ``last + SUB`` of target [BM, ·], corrected for the errors of columns 0 … ``first``."""
    cols = last + tl.arange(0, SUB)
    live = row_live[:, None] & (cols < k)[None, :]
    w = tl.load(target + cols[None, :].to(tl.int64) * target_k, mask=live, other=0.0)
    # A tile as wide as a block has no tile before it. Compiling this loop for it would spill registers.
    for t in range(0, first if SUB < 128 else 0, SUB):
        before = t + tl.arange(0, SUB)
        errors = tl.load(target + before[None, :].to(tl.int64) * target_k, mask=row_live[:, None], other=0.0)
        spread = tl.load(u + before[:, None] * u_k + cols[None, :] * u_n, mask=(cols < k)[None, :], other=0.0)
        w -= tl.dot(errors, spread, input_precision=PRECISION)
    return w


@triton.jit
def _gptq_block_kernel(
    target, u, work, codes, scale, zero, group, loss,
    k, m,
    target_b, target_k, target_m,
    u_b, u_k, u_n,
    work_b, work_k, work_m,
    codes_b, codes_k, codes_m,
    grid_b, grid_g, grid_m,
    group_b, group_k,
    MAX_CODE: tl.constexpr, HALF: tl.constexpr, SYMMETRIC: tl.constexpr, MIN_ZERO: tl.constexpr, DROP: tl.constexpr,
    BOOK: tl.constexpr, BOUNDS: tl.constexpr, WIDTH: tl.constexpr, SUB: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    row_live = rows < m
    target += batch * target_b + rows[:, None] * target_m
    work += batch * work_b + rows[:, None] * work_m
    codes += batch * codes_b + rows[:, None] * codes_m
    scale += batch * grid_b + rows * grid_m
    zero += batch * grid_b + rows * grid_m
    group += batch * group_b
    u += batch * u_b
    s = tl.zeros((BM,), dtype=tl.float32)
    z = tl.zeros((BM,), dtype=tl.float32)
    total = tl.zeros((BM,), dtype=tl.float32)

    for lo in range(0, k, SUB):
        if WIDTH > SUB:
            if lo % WIDTH == 0:
                low = tl.zeros((BM,), dtype=tl.float32)
                high = tl.zeros((BM,), dtype=tl.float32)
                for part in range(lo, lo + WIDTH, SUB):
                    inside = _corrected(target, target_k, u, u_k, u_n, k, row_live, lo, part, SUB, PRECISION)
                    low = tl.minimum(low, tl.min(inside, 1))
                    high = tl.maximum(high, tl.max(inside, 1))
                s, z = _grid_for_range(low, high, MAX_CODE, HALF, SYMMETRIC, MIN_ZERO, DROP, BOOK)
                tl.store(scale + (lo // WIDTH) * grid_g, s, mask=row_live)
                tl.store(zero + (lo // WIDTH) * grid_g, z, mask=row_live)
        w = _corrected(target, target_k, u, u_k, u_n, k, row_live, lo, lo, SUB, PRECISION)
        inner = tl.arange(0, SUB)
        cols = lo + inner
        live = row_live[:, None] & (cols < k)[None, :]
        steps = tl.zeros((BM, SUB), dtype=tl.float32)
        scales = tl.zeros((BM, SUB), dtype=tl.float32) + s[:, None]
        zeros = tl.zeros((BM, SUB), dtype=tl.float32) + z[:, None]
        for j in range(min(SUB, k - lo)):
            if WIDTH == 0:
                at = tl.load(group + (lo + j) * group_k).to(tl.int64) * grid_g
                s = tl.load(scale + at, mask=row_live, other=1.0)
                z = tl.load(zero + at, mask=row_live, other=0.0)
            elif WIDTH <= SUB:
                if j % WIDTH == 0:
                    mine = (inner >= j) & (inner < j + WIDTH)
                    inside = tl.where(mine[None, :], w, 0.0)
                    low = tl.minimum(tl.min(inside, 1), 0.0)
                    high = tl.maximum(tl.max(inside, 1), 0.0)
                    s, z = _grid_for_range(low, high, MAX_CODE, HALF, SYMMETRIC, MIN_ZERO, DROP, BOOK)
                    tl.store(scale + ((lo + j) // WIDTH) * grid_g, s, mask=row_live)
                    tl.store(zero + ((lo + j) // WIDTH) * grid_g, z, mask=row_live)
                    scales = tl.where(mine[None, :], s[:, None], scales)
                    zeros = tl.where(mine[None, :], z[:, None], zeros)
            row = tl.load(u + (lo + j) * u_k + cols * u_n, mask=(inner > j) & (cols < k), other=0.0)
            pivot = tl.div_rn(1.0, tl.load(u + (lo + j) * (u_k + u_n)))
            here = (inner == j)[None, :]
            column = tl.sum(tl.where(here, w, 0.0), 1)
            step = _nearest(tl.div_rn(column, s), z, MAX_CODE, BOOK, BOUNDS)
            error = (column - step * s) * pivot
            w = tl.where(here, error[:, None], w - error[:, None] * row[None, :])
            steps = tl.where(here, step[:, None], steps)
            total += error * error

        if WIDTH == 0:
            at = tl.load(group + cols * group_k, mask=cols < k, other=0).to(tl.int64) * grid_g
            scales = tl.load(scale[:, None] + at[None, :], mask=live, other=1.0)
            zeros = tl.load(zero[:, None] + at[None, :], mask=live, other=0.0)
        column_at = cols[None, :].to(tl.int64)
        tl.store(target + column_at * target_k, w, mask=live)
        before = tl.load(work + column_at * work_k, mask=live, other=0.0)
        tl.store(work + column_at * work_k, before - steps * scales, mask=live)
        tl.store(codes + column_at * codes_k, _codes(steps, zeros, BOUNDS), mask=live)
        # The next tile reads errors that other threads of this program stored.
        tl.debug_barrier()
    tl.store(loss + batch * m + rows, total, mask=row_live)
