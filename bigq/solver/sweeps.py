"""Coordinate descent on codes and scales, after the column loop has chosen them.

The column loop decides a column once, when the codes of later columns are not known. A sweep looks at every column again: with
all others as they are, the loss ``E·H·Eᵀ`` of a row, ``E = W − Q``, is a parabola in one of its codes, and so it is in the scale of a
group. The best code is the nearest one to ``q_j + G_j / H_jj``, ``G = H·E``, so the loss never rises. Scales are refined in closed form
before the codes of their group, as in arXiv 2602.02126 (its second stage).

The columns of a block are visited one after the other by the kernel of the column loop. With the codes before a sweep, q, and after it,
q', a column is rounded from

    x_j = t_j − Σ_{i<j} M_ij·q'_i,    t = q + (G + L·q) / diag(H),    M_ij = H_ij / H_jj for i < j,

where L is H below its diagonal, both inside the block. The kernel rounds ``x_j = w_j − Σ_{i<j} (x_i − q'_i)·P_ij``, which is the same for
``P = −(I + M)⁻¹·M`` and ``w = (I + P)ᵀ·t``. The inverse is that of a triangle of a positive definite matrix: for H with ones on the
diagonal its norm is below 2.

Weights are indexed [n, m], inputs first; all tensors may have one more leading dimension.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bigq.kernels.gptq_block import gptq_block_
from bigq.kernels.grid import GridSpec, GroupGrid, points_of, round_scale
from bigq.kernels.pick import empty_columns
from bigq.kernels.precision import fp32_products, product


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """What sweeps improve. All of it is overwritten.

    error: [..., n, m], W − Q. codes: uint8 [..., n, m]. scale, zero: [..., G, m]. group: int32 [..., n], the group of each column.
    loss: fp64 [..., m].
    """

    error: Tensor
    codes: Tensor
    scale: Tensor
    zero: Tensor
    group: Tensor
    loss: Tensor


@dataclass(frozen=True, slots=True)
class _Room:
    """Buffers for one block, each [..., k, m]: their allocation for every block would leave holes among what stays."""

    weight: Tensor
    before: Tensor
    steps: Tensor
    gradient: Tensor
    slope: Tensor
    spare: Tensor
    target: Tensor

    @classmethod
    def of(cls, solution: Solution, k: int) -> _Room:
        """Room for k columns of a solution."""
        *batch, _, m = solution.error.shape
        dtype, device = solution.error.dtype, solution.error.device
        return cls(*(empty_columns(k, m, dtype, device, batch) for _ in dataclasses.fields(cls)))

    def columns(self, k: int) -> _Room:
        """The first k columns."""
        return _Room(*(getattr(self, field.name)[..., :k, :] for field in dataclasses.fields(self)))


@dataclass(frozen=True, slots=True)
class _Block:
    """Columns [a, b) that are visited together. h: H of these, [..., k, k]; lower: below its diagonal; diagonal: [..., k].

    spread: the factor I + P that the kernel takes.
    """

    a: int
    b: int
    h: Tensor
    lower: Tensor
    diagonal: Tensor
    spread: Tensor

    @classmethod
    def of(cls, r: Tensor, a: int, b: int) -> _Block:
        """The diagonal of H is overwritten by that of R, and is found again as ``Σ_j R_ij²``."""
        lower = r[..., a:b, a:b].tril(-1)
        diagonal = r[..., a:b, a:b].triu().square().sum(-1) + r[..., a:b, b:].square().sum(-1)
        m = lower.mT / diagonal[..., None, :]
        eye = torch.eye(b - a, dtype=r.dtype, device=r.device)
        spread = eye - torch.linalg.solve_triangular(m + eye, m, upper=True, unitriangular=True).triu(1)
        return cls(a, b, lower + lower.mT + torch.diag_embed(diagonal), lower, diagonal, spread.contiguous())


def sweep_(solution: Solution, r: Tensor, spec: GridSpec, blocks: Sequence[tuple[int, int]], width: int, sweeps: int) -> None:
    """Visit all columns, so many times. Overwrites ``solution``.

    r: [..., n, n], R in the upper triangle and H below it (``bigq.solver.hessian.Factor``). blocks: the columns [a, b) that are visited
    together. width: of groups whose scales are refined, each of them a run of columns inside a block; 0 for none.
    """
    room = _Room.of(solution, max(b - a for a, b in blocks))
    for block in [_Block.of(r, a, b) for a, b in blocks] * sweeps:
        _visit(solution, r, spec, block, width, room.columns(block.b - block.a))


def _visit(solution: Solution, r: Tensor, spec: GridSpec, block: _Block, width: int, room: _Room) -> None:
    a, b, h = block.a, block.b, block.h
    error, codes = solution.error[..., a:b, :], solution.codes[..., a:b, :]
    gradient = _gradient(r, block, solution.error, room.gradient)
    grid = _grid(solution, spec, a, b, width)
    zero = _of_columns(grid.zero, grid.group, room.spare)
    steps = room.steps.copy_(points_of(codes, zero, spec)) if spec.book else room.steps.copy_(codes).sub_(zero)
    before = torch.mul(steps, _of_columns(grid.scale, grid.group, room.spare), out=room.before)
    weight = torch.add(error, before, out=room.weight)
    value, slope = before, gradient
    if width:
        slope = room.slope.copy_(gradient)
        for g in range((b - a) // width):
            _refine_scale(grid, g, h, steps, slope, room)
        value = steps.mul_(_of_columns(grid.scale, grid.group, room.spare))
    target = _target(block, value, slope, room)
    error.copy_(weight)
    gptq_block_(target, block.spread, error, codes, grid)
    change = weight.sub_(error).sub_(before)
    gain = gradient.mul_(2).sub_(product(h, change, room.spare)).mul_(change)
    solution.loss.sub_(gain.sum(-2))


def _gradient(r: Tensor, block: _Block, error: Tensor, out: Tensor) -> Tensor:
    """``H·E`` for the block's columns, [..., k, m]."""
    a, b = block.a, block.b
    gradient = product(block.h, error[..., a:b, :], out)
    with fp32_products(error, tf32=True):  # as the error feedback of the column loop
        if a:
            product(r[..., a:b, :a], error[..., :a, :], gradient, add=gradient)
        if b < error.shape[-2]:
            product(r[..., b:, a:b].mT, error[..., b:, :], gradient, add=gradient)
    return gradient


def _grid(solution: Solution, spec: GridSpec, a: int, b: int, width: int) -> GroupGrid:
    """The grid of columns [a, b): of their own groups, where these are runs of ``width`` columns."""
    group = solution.group[..., a:b]
    if not width:
        return GroupGrid(spec, solution.scale, solution.zero, group, False)
    first, stop = a // width, b // width
    return GroupGrid(spec, solution.scale[..., first:stop, :], solution.zero[..., first:stop, :], group - first, False)


def _of_columns(grid: Tensor, group: Tensor, out: Tensor) -> Tensor:
    """Scales or zero points [..., G, m] of columns, [..., k, m], for their groups, int32 [..., k]."""
    if grid.ndim == 2:  # on a CPU, take_along_dim writes the index of every element
        return torch.index_select(grid, 0, group, out=out)
    return torch.take_along_dim(grid, group.long()[..., None], -2, out=out)


def _refine_scale(grid: GroupGrid, g: int, h: Tensor, steps: Tensor, slope: Tensor, room: _Room) -> None:
    """The best scale of the group g for its codes, rounded as it is stored. Overwrites the scale and ``slope``, ``H·E`` [..., k, m].

    Rows whose loss would rise keep their scale.
    """
    width = steps.shape[-2] // grid.scale.shape[-2]
    at = slice(g * width, (g + 1) * width)
    mine, scale, product_of = steps[..., at, :], grid.scale[..., g, :], room.target[..., at, :]
    pushed = product(h[..., :, at], mine, room.spare)
    along = torch.mul(mine, slope[..., at, :], out=product_of).sum(-2)
    curve = torch.mul(mine, pushed[..., at, :], out=product_of).sum(-2)
    sign = scale.sign()
    size = (scale + along / curve).mul_(sign).clamp_(min=0)
    change = round_scale(size, grid.spec.scale_bits).mul_(sign).sub_(scale)
    better = 2 * change * along > change * change * curve  # false for NaN: of a group of zeros
    change = torch.where(better & torch.isfinite(change), change, torch.zeros_like(change))
    scale += change
    slope.sub_(pushed.mul_(change[..., None, :]))


def _target(block: _Block, value: Tensor, slope: Tensor, room: _Room) -> Tensor:
    """The weights w [..., k, m] that the kernel of the column loop takes. value: of the codes, q. slope: ``H·E`` for them."""
    best = product(block.lower, value, room.spare, add=slope).div_(block.diagonal[..., None]).add_(value)
    return product(block.spread.mT, best, room.target)
