"""The column loop of GPTQ and the grids of groups, compiled for the processor.

Rows are handled ``LANES`` at a time: a tile of all columns of a block and a few rows stays in the first-level cache for all steps.
Every step of the column loop is one rounded operation (no fused multiply-add), so results do not depend on the processor; they are
those of the textbook loop in fp32. Only the grid search fuses and approximates: it merely compares errors.

Both kernels are in one file because numba's cache notices changes of a function's own file only. They are compiled once for integers and
once for codebooks, which differ in the type of ``Spec.book``; the functions marked ``overload`` are those that depend on it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit
from numba.extending import overload
from torch import Tensor

from bigq.kernels.cpu.book import code_of_book, code_of_e4m3, nearest_e4m3, nearest_of_book
from bigq.kernels.cpu.compiler import compiled
from bigq.kernels.cpu.spec import spec_of
from bigq.kernels.cpu.spread import LANES, spread
from bigq.kernels.cpu.threads import in_parts
from bigq.kernels.grid_spec import REFINED, SMALLEST_TRIED, GridSpec, GroupGrid

f32, i32 = np.float32, np.int32

#: Columns whose errors are spread to later ones together, so that these are loaded and stored once for all of them. A strip ends with
#: its group if the next group's grid is to be found, which needs the corrected weights.
STRIP = 16

#: Weights of a group after which the search drops a candidate that is already worse than the best one in all rows.
CHECKED = 8

#: Adding and subtracting 1.5 · 2²³ rounds an fp32 number below 2²² to the nearest integer, ties to even.
ROUNDING = f32(1.5 * 2**23)

#: Rounding fp16 numbers below their smallest normal one: to multiples of 2⁻²⁴, half the spacing of fp32 numbers at 1.
SMALLEST_NORMAL, SUBNORMAL_ROUNDING = f32(2.0**-14), f32(0.5)
FP16_LIMIT = f32(65536)

#: Allows a product and a sum to be fused, and nothing else.
FUSED = {"contract"}


class Block(NamedTuple):
    """The tensors of ``gptq_block_`` as arrays: target, work, codes: [k, m]; u: [k, k]; scale, zero: [groups, m]; group: int32 [k].

    find: whether the loop finds the grids. loss: fp32 [m].
    """

    target: Any
    u: Any
    work: Any
    codes: Any
    scale: Any
    zero: Any
    group: Any
    loss: Any
    find: bool


class Grids(NamedTuple):
    """One grid for each row of a tile: fp32 [LANES] each. error: of the weights on it. part: its range, of the one of all weights."""

    scale: Any
    zero: Any
    error: Any
    part: Any


def find_grid_compiled(w: Tensor, spec: GridSpec, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``find_grid`` for fp32 weights [g, ...] on a CPU."""
    g = w.shape[0]
    weight = torch.ones(1, g) if weight is None else weight.float().reshape(g, -1).T.contiguous()
    flat = w.reshape(g, -1).contiguous()
    scale, zero = torch.empty(2, flat.shape[1], dtype=w.dtype)
    arrays, numbers = (flat.numpy(), weight.numpy(), scale.numpy(), zero.numpy()), spec_of(spec)
    tiles = len(weight) * -(-flat.shape[1] // (len(weight) * LANES))
    in_parts(tiles, 1, lambda start, stop: _find_grids(*arrays, numbers, start, stop))
    return scale.view(w.shape[1:]), zero.view(w.shape[1:])


def gptq_block_compiled_(target: Tensor, u: Tensor, work: Tensor, codes: Tensor, grid: GroupGrid) -> Tensor:
    """``gptq_block_`` for fp32 tensors [k, m] on a CPU, each column contiguous."""
    m = target.shape[1]
    loss = torch.empty(m, dtype=target.dtype)
    group = grid.group.to(torch.int32).contiguous()
    arrays: list[Any] = [t.numpy() for t in (target, u.contiguous(), work, codes, grid.scale, grid.zero, group, loss)]
    block = Block._make([*arrays, grid.find])
    numbers = spec_of(grid.spec)
    in_parts(m, LANES, lambda start, stop: _quantize_columns(block, numbers, start, stop))
    return loss


@njit(nogil=True, inline="always")
def _round(x):
    return (x + ROUNDING) - ROUNDING


@njit(nogil=True, inline="always")
def _to_multiple(bits, drop):
    """Round a pattern of bits to a multiple of 2^drop, ties to even."""
    odd = (bits >> i32(drop)) & i32(1)
    return i32((bits + ((i32(1) << i32(drop - 1)) - i32(1)) + odd) >> i32(drop)) << i32(drop)


@njit(nogil=True, inline="always")
def _round_scale(scale, spec):
    """Round a scale to fp16, then to ``spec.drop`` bits fewer."""
    drop = spec.drop
    if scale == f32(0):
        return f32(1)
    if scale < SMALLEST_NORMAL:
        stored = (scale + SUBNORMAL_ROUNDING) - SUBNORMAL_ROUNDING
        if drop:
            coarse = SUBNORMAL_ROUNDING * f32(i32(1) << i32(drop))
            stored = (stored + coarse) - coarse
        return stored if stored > f32(0) else f32(spec.smallest)
    bits = _to_multiple(f32(scale).view(i32), 13)
    if drop:
        bits = _to_multiple(bits, 13 + drop)
    stored = i32(bits).view(f32)
    return f32(np.inf) if stored >= FP16_LIMIT else stored


@njit(nogil=True, inline="always")
def _grid_of_integers(low, high, spec, part):
    top = f32(spec.top)
    size = abs(part)
    low, high = low * size, high * size
    if spec.symmetric:
        scale = _round_scale(f32(2) * max(-low, high) / top, spec)
        return -scale if spec.search and (high > -low) != (part < f32(0)) else scale, f32(spec.half)
    scale = _round_scale((high - low) / top, spec)
    zero = _round(min(max(-low / scale, f32(0)), top))
    if spec.min_zero and zero < f32(spec.min_zero):
        scale = max(scale, _round_scale(high / f32(spec.top - spec.min_zero), spec))
        zero = f32(spec.min_zero)
    return scale, zero


@njit(nogil=True, inline="always")
def _grid_of_book(low, high, spec, part):
    reach = max(-low, high) * abs(part) / f32(spec.book[-1])
    return reach if spec.settles else _round_scale(reach, spec), f32(0)


def _grid_for_range(low, high, spec, part):
    """The grid that spans a part of [low, high], as ``grid.grid_for_range``."""


def _nearest(x, low, high, spec):
    """The point nearest to x, in units of the scale, as ``grid.nearest``. low, high: those of integers."""


def _code_of(point, zero, spec):
    """The code of a point."""


def _points(spec):
    """The number of points of the book: 0 for integers, 1 for floats."""
    return spec.types[spec.fields.index("book")].count


@overload(_grid_for_range)
def _(low, high, spec, part):
    if _points(spec):
        return lambda low, high, spec, part: _grid_of_book(low, high, spec, part)
    return lambda low, high, spec, part: _grid_of_integers(low, high, spec, part)


@overload(_nearest)
def _(x, low, high, spec):
    if _points(spec) == 1:
        return lambda x, low, high, spec: nearest_e4m3(x)
    if _points(spec):
        return lambda x, low, high, spec: nearest_of_book(x, spec.book, spec.bounds)
    return lambda x, low, high, spec: _round(min(max(x, low), high))


@overload(_code_of)
def _(point, zero, spec):
    if _points(spec) == 1:
        return lambda point, zero, spec: code_of_e4m3(point)
    if _points(spec):
        return lambda point, zero, spec: code_of_book(point, spec.bounds)
    return lambda point, zero, spec: np.uint8(point + zero)


@compiled(fastmath=FUSED, error_model="numpy")
def _candidate(tile, s, e, weight, tried, best, spec, scratch):
    """Try grids on columns [s, e) of a tile. Rows in which their weighted error is below the best take them. scratch: [≥ 2, LANES]."""
    scale, zero, error = tried.scale, tried.zero, tried.error
    inverse, unit = scratch[0], scratch[1]
    top = f32(spec.top)
    for r in range(LANES):
        error[r] = f32(0)
        inverse[r] = f32(1) / scale[r]
        unit[r] = scale[r] * scale[r]
    for start in range(s, e, CHECKED):
        for j in range(start, min(start + CHECKED, e)):
            of_column = weight[j]
            for r in range(LANES):
                steps = tile[j, r] * inverse[r]
                off = steps - _nearest(steps, -zero[r], top - zero[r], spec)
                error[r] += of_column * (off * off)
        worse = 0
        for r in range(LANES):
            worse += not error[r] * unit[r] < best.error[r]
        if worse == LANES:
            return
    for r in range(LANES):
        if error[r] * unit[r] < best.error[r]:
            best.error[r] = error[r] * unit[r]
            best.scale[r] = scale[r]
            best.zero[r] = zero[r]


@compiled()
def _range_of(tile, s, e, low, high):
    """The range of columns [s, e) of a tile and 0."""
    low[:] = f32(0)
    high[:] = f32(0)
    for j in range(s, e):
        for r in range(LANES):
            low[r] = min(low[r], tile[j, r])
            high[r] = max(high[r], tile[j, r])


@compiled()
def _tile_grid(tile, s, e, weight, scale, zero, spec, scratch):
    """The grid of columns [s, e) of a tile [columns, LANES]: scale and zero, each [LANES].

    weight: of the columns' squared errors, [columns]. scratch: [10, LANES].
    """
    low, high = scratch[2], scratch[3]
    _range_of(tile, s, e, low, high)
    for r in range(LANES):
        scale[r], zero[r] = _grid_for_range(low[r], high[r], spec, f32(1))
    if not spec.search:
        return
    best, tried = Grids(scale, zero, scratch[4], scratch[8]), Grids(scratch[5], scratch[6], scratch[7], scratch[9])
    best.error[:] = f32(np.inf)
    for side in range(1 + spec.both_sides):
        for hundredths in range(spec.widest, SMALLEST_TRIED - 1, -1):
            part = f32((1 - 2 * side) * hundredths / 100.0)
            for r in range(LANES):
                tried.scale[r], tried.zero[r] = _grid_for_range(low[r], high[r], spec, part)
            _candidate(tile, s, e, weight, tried, best, spec, scratch)


@compiled()
def _find_grids(w, weight, scale, zero, spec, start, stop):
    """The grids of tiles [start, stop) of w [g, groups · m]. weight: [groups, g]; a tile is inside one group."""
    tile = np.zeros((w.shape[0], LANES), f32)
    scratch = np.empty((10, LANES), f32)
    tile_scale, tile_zero = np.empty(LANES, f32), np.empty(LANES, f32)
    m = w.shape[1] // weight.shape[0]
    tiles = (m + LANES - 1) // LANES
    for number in range(start, stop):
        group = number // tiles
        c = group * m + number % tiles * LANES
        count = min(LANES, (group + 1) * m - c)
        tile[:, :count] = w[:, c : c + count]
        _tile_grid(tile, 0, w.shape[0], weight[group], tile_scale, tile_zero, spec, scratch)
        scale[c : c + count] = tile_scale[:count]
        zero[c : c + count] = tile_zero[:count]


@compiled(error_model="numpy")
def _solve_group(tile, s, e, u, tried, best, spec, spare):
    """Solve columns [s, e) of a tile with given grids. Rows in which the loss is below the best take the grid.

    spare: [≥ e, LANES], room for a copy of the tile.
    """
    scale, zero, loss = tried.scale, tried.zero, tried.error
    at, at_u, row, top = spare.ctypes.data, u.ctypes.data, 4 * u.shape[1], f32(spec.top)
    spare[s:e] = tile[s:e]
    loss[:] = f32(0)
    first = s
    for j in range(s, e):
        pivot = u[j, j]
        for r in range(LANES):
            low = -zero[r]
            step = _nearest(spare[j, r] / scale[r], low, top + low, spec)
            error = (spare[j, r] - scale[r] * step) / pivot
            loss[r] += error * error
            spare[j, r] = error
        end = min(first + STRIP, e)
        for later in range(j + 1, end):
            spread(at, at_u, row, j, j + 1, later)
        if j + 1 == end:
            worse = 0
            for r in range(LANES):
                worse += not loss[r] < best.error[r]
            if worse == LANES:
                return
            for later in range(end, e):
                spread(at, at_u, row, first, end, later)
            first = end
    for r in range(LANES):
        if loss[r] < best.error[r]:
            best.error[r] = loss[r]
            best.scale[r] = scale[r]
            best.zero[r] = zero[r]
            best.part[r] = tried.part[r]


@compiled(error_model="numpy")
def _solved_grid(tile, s, e, u, scale, zero, spec, scratch, spare):
    """The grid of columns [s, e) of a tile [columns, LANES] with the least loss: scale and zero, each [LANES]. scratch: [10, LANES]."""
    low, high = scratch[2], scratch[3]
    _range_of(tile, s, e, low, high)
    best, tried = Grids(scale, zero, scratch[4], scratch[8]), Grids(scratch[5], scratch[6], scratch[7], scratch[9])
    best.error[:] = f32(np.inf)
    for r in range(LANES):
        scale[r], zero[r] = _grid_for_range(low[r], high[r], spec, f32(1))
    best.part[:] = f32(1)
    around = np.empty(LANES, f32)
    first = len(spec.parts) * (1 + spec.both_sides)
    for attempt in range(first + 2 * len(REFINED)):
        late = attempt - first
        if late >= 0 and late % 2 == 0:
            around[:] = best.part
        for r in range(LANES):
            if late < 0:
                side = 1 - 2 * (attempt // len(spec.parts))
                tried.part[r] = f32(side * spec.parts[attempt % len(spec.parts)] / 100.0)
            else:
                tried.part[r] = around[r] + f32((2 * (late % 2) - 1) * REFINED[late // 2] / 100.0)
            tried.scale[r], tried.zero[r] = _grid_for_range(low[r], high[r], spec, tried.part[r])
        _solve_group(tile, s, e, u, tried, best, spec, spare)


@compiled(error_model="numpy")
def _quantize_columns(block, spec, start, stop):
    """The column loop for rows [start, stop)."""
    target, u, work, codes, scale, zero, group, loss, find = block
    k = target.shape[0]
    width = k // scale.shape[0]
    tile, at_scale, at_zero = np.zeros((k, LANES), f32), np.ones((scale.shape[0], LANES), f32), np.zeros((scale.shape[0], LANES), f32)
    spare, ones = np.empty((k, LANES), f32), np.ones(k, f32)
    scratch, total, error = np.empty((10, LANES), f32), np.empty(LANES, f32), np.empty(LANES, f32)
    top, at_tile, at_u = f32(spec.top), tile.ctypes.data, u.ctypes.data
    for c in range(start, stop, LANES):
        count = min(LANES, stop - c)
        tile[:, :count] = target[:, c : c + count]
        if not find:
            at_scale[:, :count] = scale[:, c : c + count]
            at_zero[:, :count] = zero[:, c : c + count]
        total[:] = f32(0)
        first = 0
        for j in range(k):
            g = group[j]
            if find and j % width == 0:
                if spec.search:
                    _solved_grid(tile, j, j + width, u, at_scale[g], at_zero[g], spec, scratch, spare)
                else:
                    _tile_grid(tile, j, j + width, ones, at_scale[g], at_zero[g], spec, scratch)
            pivot = u[j, j]
            for r in range(LANES):
                low, s = -at_zero[g, r], at_scale[g, r]
                step = _nearest(tile[j, r] / s, low, top + low, spec)
                scratch[0, r] = step
                error[r] = tile[j, r] - s * step
            for r in range(count):
                codes[j, c + r] = _code_of(scratch[0, r], at_zero[g, r], spec)
                work[j, c + r] -= scratch[0, r] * at_scale[g, r]
            for r in range(LANES):
                error[r] /= pivot
                total[r] += error[r] * error[r]
                tile[j, r] = error[r]
            # Columns outside the strip [first, end) are changed once it is complete, in the order of the textbook loop.
            end = min(first + STRIP, k, first // width * width + width if find else k)
            for later in range(j + 1, end):
                spread(at_tile, at_u, 4 * k, j, j + 1, later)
            if j + 1 == end:
                for later in range(end, k):
                    spread(at_tile, at_u, 4 * k, first, end, later)
                first = end
        target[:, c : c + count] = tile[:, :count]
        loss[c : c + count] = total[:count]
        if find:
            scale[:, c : c + count] = at_scale[:, :count]
            zero[:, c : c + count] = at_zero[:, :count]
