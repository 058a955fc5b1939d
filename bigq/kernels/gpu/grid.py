"""The grid of a group in the column loop on a GPU, and its search: one launch tries all grids, each program for a tile of rows.

A program holds the group's weights of its rows in registers, and quantizes a copy of them with one grid after the other. A candidate costs
as many steps as the group has columns, so the search takes 16 times the steps of the loop over the group, 28 at 2 bits, all in registers.
The candidates and their order are those of ``grid.least_loss_grid``.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigq.kernels.grid_spec import FEWEST_SCALE_BITS, FP16_TINY, REFINED, SCALE_BITS, GridSpec

ROWS = 16
#: Columns that a warp holds in registers.
COLUMNS_OF_WARP = 32

#: What a scale of more bits than these fewer becomes, if it is rounded to 0: ``smallest_scale``.
_TINY, _NARROWEST = tl.constexpr(FP16_TINY), tl.constexpr(SCALE_BITS - FEWEST_SCALE_BITS)
#: The code of 0 in E4M3; its smallest normal number, and the numbers per unit below it; the exponent and fraction in an fp32 number that
#: stand for 0.
_E4M3_ZERO, _E4M3_NORMAL, _E4M3_SUBNORMALS, _E4M3_BIAS = tl.constexpr(126), tl.constexpr(2.0**-6), tl.constexpr(512.0), tl.constexpr(960)
#: Adding and subtracting 1.5 · 2²³ rounds a small fp32 number to the nearest integer, ties to even.
_ROUNDER = tl.constexpr(12582912.0)


def found_grid_triton(target: Tensor, u: Tensor, spec: GridSpec) -> tuple[Tensor, Tensor]:
    """``found_grid`` for a search in groups of several matrices: scales and zero points, fp32 [batch, m].

    target: fp32 [batch, g, m], g at most 128. u: [batch, g, g].
    """
    batch, g, m = target.shape
    assert target.dtype == u.dtype == torch.float32
    scale, zero = (torch.empty(batch, m, dtype=torch.float32, device=target.device) for _ in range(2))
    columns = max(COLUMNS_OF_WARP, triton.next_power_of_2(g))
    _search_kernel[(triton.cdiv(m, ROWS), batch)](
        target,
        u,
        scale,
        zero,
        _parts(spec, target.device),
        g,
        m,
        *target.stride(),
        *u.stride(),
        *scale.stride(),
        FIRST=len(spec.solved),
        LATE=2 * len(REFINED),
        MAX_CODE=spec.max_code,
        HALF=2.0 ** (spec.bits - 1),
        SYMMETRIC=spec.symmetric,
        MIN_ZERO=spec.min_zero,
        DROP=drop_of(spec),
        **book_of(spec),
        COLUMNS=columns,
        BM=ROWS,
        num_warps=columns // COLUMNS_OF_WARP,
        enable_fp_fusion=False,
    )
    return scale, zero


@functools.cache
def _parts(spec: GridSpec, device: torch.device) -> Tensor:
    """What is tried, as fractions of the range: first these, then ± each step around the best of each row."""
    first = [hundredths / 100 for hundredths in spec.solved]
    return torch.tensor([*first, *(side * step / 100 for step in REFINED for side in (-1, 1))], dtype=torch.float32, device=device)


def drop_of(spec: GridSpec) -> int:
    """Bits by which scales are narrower than fp16; −1 for scales that are rounded later."""
    return -1 if spec.settles else SCALE_BITS - spec.scale_bits


def book_of(spec: GridSpec) -> dict[str, tuple[float, ...] | None]:
    """The codebook as arguments of a kernel; of floats, to which numbers are rounded, the largest one and no bounds."""
    return {"BOOK": (spec.largest,), "BOUNDS": ()} if spec.is_float else {"BOOK": spec.book or None, "BOUNDS": spec.bounds or None}


@triton.jit
def _round(x):
    return (x + _ROUNDER) - _ROUNDER


@triton.jit
def _to_e4m3(x):
    """Rounded to E4M3, ties to even: the sum with 1.5 · 2^(e + 20), e the exponent, has its last bit where E4M3 has."""
    binade = tl.maximum(tl.abs(x), _E4M3_NORMAL).to(tl.int32, bitcast=True) & 0x7F800000
    rounder = (binade + (20 << 23)).to(tl.float32, bitcast=True) * 1.5
    return (x + rounder) - rounder


@triton.jit
def _e4m3_code(point):
    size = tl.abs(point)
    normal = (size.to(tl.int32, bitcast=True) >> 20) - _E4M3_BIAS
    pattern = tl.where(size >= _E4M3_NORMAL, normal, (size * _E4M3_SUBNORMALS).to(tl.int32))
    return tl.where(point < 0, _E4M3_ZERO - pattern, _E4M3_ZERO + pattern).to(tl.uint8)


@triton.jit
def e4m3_of(code):
    """The points of codes, fp32."""
    signed = code.to(tl.int32) - _E4M3_ZERO
    pattern = tl.abs(signed)
    normal = ((pattern + _E4M3_BIAS) << 20).to(tl.float32, bitcast=True)
    size = tl.where(pattern < 8, pattern.to(tl.float32) / _E4M3_SUBNORMALS, normal)
    return tl.where(signed < 0, -size, size)


@triton.jit
def _nearest(x, z, MAX_CODE: tl.constexpr, BOOK: tl.constexpr, BOUNDS: tl.constexpr):
    """The point nearest to x, in units of the scale, as ``grid.nearest``."""
    if BOOK is None:
        point = _round(tl.clamp(x, -z, MAX_CODE - z))
    elif len(BOOK) == 1:
        point = _to_e4m3(tl.clamp(x, -BOOK[0], BOOK[0]))
    else:
        point = tl.zeros_like(x) + BOOK[0]
        for i in tl.static_range(15):
            point = tl.where(x > BOUNDS[i], BOOK[i + 1], point)
    return point


@triton.jit
def _codes(point, z, BOUNDS: tl.constexpr):
    """The codes of points."""
    if BOUNDS is None:
        code = (point + z).to(tl.uint8)
    elif len(BOUNDS) == 0:
        code = _e4m3_code(point)
    else:
        count = tl.zeros_like(point)
        for i in tl.static_range(15):
            count += tl.where(point > BOUNDS[i], 1.0, 0.0)
        code = count.to(tl.uint8)
    return code


@triton.jit
def _round_scale(scale, DROP: tl.constexpr):
    half = scale.to(tl.float16)
    if DROP > 0:
        pattern = half.to(tl.int16, bitcast=True).to(tl.int32)
        pattern = (pattern + ((1 << (DROP - 1)) - 1) + ((pattern >> DROP) & 1)) >> DROP << DROP
        half = pattern.to(tl.int16).to(tl.float16, bitcast=True)
    stored = half.to(tl.float32)
    tiny = _TINY
    if DROP > _NARROWEST:
        tiny = _TINY * (1 << DROP)
    stored = tl.where(stored == 0, tiny, stored)
    return tl.where(scale == 0, 1.0, stored)


@triton.jit
def _grid_for_range(
    low, high, MAX_CODE: tl.constexpr, HALF: tl.constexpr, SYMMETRIC: tl.constexpr, MIN_ZERO: tl.constexpr, DROP: tl.constexpr,
    BOOK: tl.constexpr,
):  # fmt: skip
    if BOOK is not None:
        scale = tl.div_rn(tl.maximum(-low, high), tl.zeros_like(low) + BOOK[len(BOOK) - 1])
        if DROP >= 0:
            scale = _round_scale(scale, DROP)
        zero = tl.zeros_like(low)
    elif SYMMETRIC:
        scale = _round_scale(tl.div_rn(2.0 * tl.maximum(-low, high), tl.zeros_like(low) + MAX_CODE), DROP)
        zero = tl.zeros_like(low) + HALF
    else:
        scale = _round_scale(tl.div_rn(high - low, tl.zeros_like(low) + MAX_CODE), DROP)
        zero = _round(tl.clamp(tl.div_rn(-low, scale), 0.0, MAX_CODE + 0.0))
        if MIN_ZERO > 0:
            widened = _round_scale(tl.div_rn(high, tl.zeros_like(low) + (MAX_CODE - MIN_ZERO)), DROP)
            scale = tl.where(zero < MIN_ZERO, tl.maximum(scale, widened), scale)
            zero = tl.maximum(zero, MIN_ZERO + 0.0)
    return scale, zero


@triton.jit
def _tried_grid(
    low, high, part, MAX_CODE: tl.constexpr, HALF: tl.constexpr, SYMMETRIC: tl.constexpr, MIN_ZERO: tl.constexpr, DROP: tl.constexpr,
    BOOK: tl.constexpr,
):  # fmt: skip
    """The grid that spans a part of the range, as ``grid.grid_for_range`` for a search."""
    size = tl.abs(part)
    low = low * size
    high = high * size
    scale, zero = _grid_for_range(low, high, MAX_CODE, HALF, SYMMETRIC, MIN_ZERO, DROP, BOOK)
    if SYMMETRIC and BOOK is None:
        scale = tl.where((high > -low) != (part < 0), -scale, scale)
    return scale, zero


@triton.jit
def _search_kernel(
    target, u, scale, zero, parts,
    g, m,
    target_b, target_k, target_m,
    u_b, u_k, u_n,
    grid_b, grid_m,
    FIRST: tl.constexpr, LATE: tl.constexpr,
    MAX_CODE: tl.constexpr, HALF: tl.constexpr, SYMMETRIC: tl.constexpr, MIN_ZERO: tl.constexpr, DROP: tl.constexpr,
    BOOK: tl.constexpr, BOUNDS: tl.constexpr, COLUMNS: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    row_live = rows < m
    cols = tl.arange(0, COLUMNS)
    live = row_live[:, None] & (cols < g)[None, :]
    target += batch * target_b + rows[:, None] * target_m
    weights = tl.load(target + cols[None, :].to(tl.int64) * target_k, mask=live, other=0.0)
    u += batch * u_b
    low = tl.minimum(tl.min(weights, 1), 0.0)
    high = tl.maximum(tl.max(weights, 1), 0.0)
    best_part = tl.zeros((BM,), dtype=tl.float32) + 1.0
    best_scale, best_zero = _tried_grid(low, high, best_part, MAX_CODE, HALF, SYMMETRIC, MIN_ZERO, DROP, BOOK)
    best_loss = tl.zeros((BM,), dtype=tl.float32) + float("inf")
    around = best_part
    for i in range(FIRST + LATE):
        part = tl.zeros((BM,), dtype=tl.float32) + tl.load(parts + i)
        if i >= FIRST:
            if (i - FIRST) % 2 == 0:
                around = best_part
            part = around + part
        s, z = _tried_grid(low, high, part, MAX_CODE, HALF, SYMMETRIC, MIN_ZERO, DROP, BOOK)
        w = weights
        loss = tl.zeros((BM,), dtype=tl.float32)
        for j in range(g):
            row = tl.load(u + j * u_k + cols * u_n, mask=(cols > j) & (cols < g), other=0.0)
            pivot = tl.load(u + j * (u_k + u_n))
            column = tl.sum(tl.where((cols == j)[None, :], w, 0.0), 1)
            step = _nearest(tl.div_rn(column, s), z, MAX_CODE, BOOK, BOUNDS)
            error = tl.div_rn(column - step * s, tl.zeros_like(column) + pivot)
            loss += error * error
            w -= error[:, None] * row[None, :]
        better = loss < best_loss
        best_loss = tl.where(better, loss, best_loss)
        best_scale = tl.where(better, s, best_scale)
        best_zero = tl.where(better, z, best_zero)
        best_part = tl.where(better, part, best_part)
    at = batch * grid_b + rows * grid_m
    tl.store(scale + at, best_scale, mask=row_live)
    tl.store(zero + at, best_zero, mask=row_live)
