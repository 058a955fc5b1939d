"""Rounding, and the grid of a range, for the kernels of the column loop."""

from __future__ import annotations

import triton
import triton.language as tl

from bigq.kernels.grid_spec import FP16_TINY

_TINY = tl.constexpr(FP16_TINY)
#: Adding and subtracting 1.5 · 2²³ rounds a small fp32 number to the nearest integer, ties to even.
_ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def _round(x):
    return (x + _ROUNDER) - _ROUNDER


@triton.jit
def _round_scale(scale, DROP: tl.constexpr):
    half = scale.to(tl.float16)
    if DROP > 0:
        pattern = half.to(tl.int16, bitcast=True).to(tl.int32)
        pattern = (pattern + ((1 << (DROP - 1)) - 1) + ((pattern >> DROP) & 1)) >> DROP << DROP
        half = pattern.to(tl.int16).to(tl.float16, bitcast=True)
    stored = half.to(tl.float32)
    stored = tl.where(stored == 0, _TINY, stored)
    return tl.where(scale == 0, 1.0, stored)


@triton.jit
def _grid_for_range(
    low, high, MAX_CODE: tl.constexpr, HALF: tl.constexpr, SYMMETRIC: tl.constexpr, MIN_ZERO: tl.constexpr, DROP: tl.constexpr
):
    if SYMMETRIC:
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
