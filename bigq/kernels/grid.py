"""Scales and zero points for groups of weights.

Both are rounded to their stored precision (fp16, integers) before anything is quantized with them. So codes are solved
against exactly the grid that readers use.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from bigq.kernels.grid_spec import REFINED
from bigq.kernels.grid_spec import SCALE_BITS as SCALE_BITS
from bigq.kernels.grid_spec import GridSpec as GridSpec
from bigq.kernels.grid_spec import GroupGrid as GroupGrid
from bigq.kernels.grid_spec import smallest_scale as smallest_scale
from bigq.kernels.pick import use_compiled


def find_grid(w: Tensor, spec: GridSpec, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scale and zero point of groups of weights.

    w: [g, ...], g weights in each group. Returns (scale, zero), each [...] in w's dtype. The scale is rounded to fp16, the zero
    point to an integer. A scale above the range of fp16 is Inf.
    weight: the weights of squared errors in a search, [g] or with the first of w's other dimensions; by default all are 1.
    """
    if use_compiled(w):
        from bigq.kernels.cpu.columns import find_grid_compiled

        return find_grid_compiled(w, spec, weight)
    return find_grid_reference(w, spec, weight)


def find_grid_reference(w: Tensor, spec: GridSpec, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``find_grid`` in plain torch."""
    low = w.amin(0).clamp_(max=0)
    high = w.amax(0).clamp_(min=0)
    if not spec.search:
        return grid_for_range(low, high, spec)
    if weight is not None:
        weight = weight[(...,) + (None,) * (w.ndim - weight.ndim)]
    return searched_grid(low, high, spec, lambda scale, zero: _squared_error(w, scale, zero, spec, weight))


def searched_grid(low: Tensor, high: Tensor, spec: GridSpec, error: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The tried grid of the least error for each group, whose weights are in [low, high], low ≤ 0 ≤ high.

    error: of all groups on given grids; scale, zero and the error have the shape of low.
    """
    best = scale = zero = torch.full_like(low, torch.inf)
    for hundredths in spec.tried:
        tried = grid_for_range(low, high, spec, hundredths / 100)
        found = error(*tried)
        better = found < best
        best, scale, zero = (torch.where(better, new, old) for new, old in ((found, best), (tried[0], scale), (tried[1], zero)))
    # Without a better one, as of weights that are not finite, the full range.
    lost = torch.isinf(best)
    full = grid_for_range(low, high, spec)
    return torch.where(lost, full[0], scale), torch.where(lost, full[1], zero)


def found_grid(target: Tensor, u: Tensor, spec: GridSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero point [m] of a group whose turn has come, for its corrected weights [g, m] and its part of U [g, g]."""
    if not spec.search:
        return find_grid_reference(target, spec)
    return least_loss_grid(target, spec, lambda scale, zero: _loss_in_group(target, u, scale, zero, spec))


def nearest(x: Tensor, zero: Tensor, spec: GridSpec) -> Tensor:
    """The points of a grid, in units of its scale, that are nearest to x: ``code − zero``, or ``book[code]``. zero broadcasts to x."""
    if spec.is_float:
        return torch.clamp(x, -spec.largest, spec.largest).to(torch.float8_e4m3fn).to(x.dtype)
    if spec.book:
        book, bounds = _tables(spec, x.dtype, x.device)
        return book[torch.bucketize(x.contiguous(), bounds)]
    return torch.clamp(torch.round(x), -zero, spec.max_code - zero)


def codes_of(points: Tensor, zero: Tensor, spec: GridSpec) -> Tensor:
    """The codes of points, uint8. With a codebook, of the points nearest to any numbers, and of two points of 0 the one on their side."""
    if spec.book:
        return torch.bucketize(points.contiguous(), _tables(spec, points.dtype, points.device)[1]).to(torch.uint8)
    return (points + zero).to(torch.uint8)


def points_of(codes: Tensor, zero: Tensor, spec: GridSpec) -> Tensor:
    """The points of codes, in the dtype of zero, which broadcasts to them."""
    if spec.book:
        return _tables(spec, zero.dtype, zero.device)[0][codes.int()]
    return codes - zero


@functools.cache
def _tables(spec: GridSpec, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The points of the book and the bounds between them."""
    return torch.tensor(spec.book, dtype=dtype, device=device), torch.tensor(spec.bounds, dtype=dtype, device=device)


def _loss_in_group(w: Tensor, u: Tensor, scale: Tensor, zero: Tensor, spec: GridSpec) -> Tensor:
    """``Σ_j ((w_j − q_j) / u_jj)²`` of each row, [c, m], for weights [g, m] and c grids: scale, zero: [c, m]."""
    loss = torch.zeros_like(scale)
    w = w[:, None].repeat(1, len(scale), 1)
    for j, column in enumerate(w):
        step = nearest(column / scale, zero, spec)
        error = column.sub_(step * scale).div_(u[j, j])
        loss.addcmul_(error, error)
        w[j + 1 :].sub_(u[j, j + 1 :, None, None] * error)
    return loss


def least_loss_grid(target: Tensor, spec: GridSpec, solve: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The tried grid of the least loss for each row of a group's weights [..., g, m]: scale and zero point [..., m].

    The loss ``Σ_j ((w_j − q_j) / u_jj)²`` of a group is what it adds to the error of the output, if later columns compensate it. It depends
    on the grid through each step of the column loop, so the loop itself is run with every grid.

    solve: the loss of each row with c given grids, whose scales and zero points are [c, ..., m]. A row whose losses are not finite gets
        the grid that spans its weights.
    """
    low, high = target.amin(-2).clamp_(max=0), target.amax(-2).clamp_(min=0)
    scale, zero = grid_for_range(low, high, spec)
    loss, part = torch.full_like(scale, torch.inf), torch.ones_like(scale)

    def attempt(parts: Tensor) -> None:
        nonlocal loss, scale, zero, part
        tried = grid_for_range(low, high, spec, parts)
        for new in zip(solve(*tried), *tried, parts, strict=True):
            better = new[0] < loss
            loss, scale, zero, part = (torch.where(better, n, old) for n, old in zip(new, (loss, scale, zero, part), strict=True))

    attempt(torch.stack([torch.full_like(scale, hundredths / 100) for hundredths in spec.solved]))
    for step in REFINED:
        attempt(torch.stack([part - step / 100, part + step / 100]))
    return scale, zero


def grid_for_range(low: Tensor, high: Tensor, spec: GridSpec, part: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """The grid that spans a part of the range [low, high], low ≤ 0 ≤ high.

    For a search, a symmetric grid has its spare step on the longer side, and on the shorter one if ``part`` is negative.
    """
    size = part.abs() if isinstance(part, Tensor) else abs(part)
    low, high = low * size, high * size
    if spec.book:
        reach = torch.maximum(-low, high) / spec.largest
        scale = reach if spec.settles else round_scale(reach, spec.scale_bits)
        return scale, torch.zeros_like(scale)
    if spec.symmetric:
        step = 2 * torch.maximum(-low, high) / spec.max_code
        if spec.search:
            step = torch.where((high > -low) != torch.as_tensor(part < 0), -step, step)
        scale = round_scale(step, spec.scale_bits)
        return scale, torch.full_like(scale, 2.0 ** (spec.bits - 1))
    scale = round_scale((high - low) / spec.max_code, spec.scale_bits)
    zero = torch.round(-low / scale).clamp_(0, spec.max_code)
    if spec.min_zero:
        # A group without negative weights has zero point 0. If that cannot be stored, widen the scale to keep the maximum.
        raised = zero < spec.min_zero
        widened = round_scale(high / (spec.max_code - spec.min_zero), spec.scale_bits)
        scale = torch.where(raised, torch.maximum(scale, widened), scale)
        zero = zero.clamp_(min=spec.min_zero)
    return scale, zero


def round_scale(scale: Tensor, bits: int) -> Tensor:
    """Round scales to fp16 numbers of ``bits`` significant bits, returned in their own dtype.

    0 (a group of zeros) becomes 1. An underflow becomes ``smallest_scale``, an overflow Inf, of the same sign.
    """
    half = scale.to(torch.float16)
    if bits < SCALE_BITS:
        # Round the bit pattern to nearest, ties to even. A carry out of the fraction increments the exponent, up to Inf.
        pattern = half.view(torch.int16)
        drop = SCALE_BITS - bits
        pattern = (pattern + ((1 << (drop - 1)) - 1) + ((pattern >> drop) & 1)) >> drop << drop
        half = pattern.view(torch.float16)
    stored = half.to(scale.dtype)
    stored = torch.where(stored == 0, torch.full_like(stored, smallest_scale(bits)).copysign(scale), stored)
    return torch.where(scale == 0, torch.ones_like(stored), stored)


def _squared_error(w: Tensor, scale: Tensor, zero: Tensor, spec: GridSpec, weight: Tensor | None) -> Tensor:
    step = nearest(w / scale, zero, spec)
    error = (w - step * scale).square_()
    return (error if weight is None else error.mul_(weight)).sum(0)
