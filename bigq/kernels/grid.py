"""Scales and zero points for groups of weights.

Both are rounded to their stored precision (fp16, integers) before anything is quantized with them. So codes are solved
against exactly the grid that readers use.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bigq.kernels.grid_spec import FP16_TINY as FP16_TINY
from bigq.kernels.grid_spec import MSE_STEPS
from bigq.kernels.grid_spec import SCALE_BITS as SCALE_BITS
from bigq.kernels.grid_spec import GridSpec as GridSpec
from bigq.kernels.grid_spec import GroupGrid as GroupGrid
from bigq.kernels.pick import use_compiled


def find_grid(w: Tensor, spec: GridSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero point of groups of weights.

    w: [g, ...], g weights in each group. Returns (scale, zero), each [...] in w's dtype. The scale is rounded to fp16, the zero
    point to an integer. A scale above the range of fp16 is Inf.
    """
    if use_compiled(w):
        from bigq.kernels.cpu.columns import find_grid_compiled

        return find_grid_compiled(w, spec)
    return find_grid_reference(w, spec)


def find_grid_reference(w: Tensor, spec: GridSpec) -> tuple[Tensor, Tensor]:
    """``find_grid`` in plain torch."""
    low = w.amin(0).clamp_(max=0)
    high = w.amax(0).clamp_(min=0)
    scale, zero = _grid_for_range(low, high, spec)
    if not spec.mse:
        return scale, zero
    best = _rounding_error(w, scale, zero, spec)
    for step in range(1, MSE_STEPS):
        shrink = 1 - step / 100
        candidate_scale, candidate_zero = _grid_for_range(low * shrink, high * shrink, spec)
        error = _rounding_error(w, candidate_scale, candidate_zero, spec)
        better = error < best
        best = torch.where(better, error, best)
        scale = torch.where(better, candidate_scale, scale)
        zero = torch.where(better, candidate_zero, zero)
    return scale, zero


def _grid_for_range(low: Tensor, high: Tensor, spec: GridSpec) -> tuple[Tensor, Tensor]:
    """The grid that spans [low, high], low ≤ 0 ≤ high."""
    if spec.symmetric:
        reach = torch.maximum(-low, high)
        scale = _round_scale(2 * reach / spec.max_code, spec.scale_bits)
        return scale, torch.full_like(scale, 2.0 ** (spec.bits - 1))
    scale = _round_scale((high - low) / spec.max_code, spec.scale_bits)
    zero = torch.round(-low / scale).clamp_(0, spec.max_code)
    if spec.min_zero:
        # A group without negative weights has zero point 0. If that cannot be stored, widen the scale to keep the maximum.
        raised = zero < spec.min_zero
        widened = _round_scale(high / (spec.max_code - spec.min_zero), spec.scale_bits)
        scale = torch.where(raised, torch.maximum(scale, widened), scale)
        zero = zero.clamp_(min=spec.min_zero)
    return scale, zero


def _round_scale(scale: Tensor, bits: int) -> Tensor:
    """Round scales to fp16 numbers of ``bits`` significant bits, returned in their own dtype.

    0 (a group of zeros) becomes 1. An underflow becomes the smallest fp16 number, an overflow Inf.
    """
    half = scale.to(torch.float16)
    if bits < SCALE_BITS:
        # Round the bit pattern to nearest, ties to even. A carry out of the fraction increments the exponent, up to Inf.
        pattern = half.view(torch.int16)
        drop = SCALE_BITS - bits
        pattern = (pattern + ((1 << (drop - 1)) - 1) + ((pattern >> drop) & 1)) >> drop << drop
        half = pattern.view(torch.float16)
    stored = half.to(scale.dtype)
    stored = torch.where(stored == 0, torch.full_like(stored, FP16_TINY), stored)
    return torch.where(scale == 0, torch.ones_like(stored), stored)


def _rounding_error(w: Tensor, scale: Tensor, zero: Tensor, spec: GridSpec) -> Tensor:
    step = torch.clamp(torch.round(w / scale), -zero, spec.max_code - zero)
    return (w - step * scale).abs_().pow_(spec.mse_power).sum(0)
