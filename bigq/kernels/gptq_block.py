"""GPTQ's column loop over one block: round a column, spread its error over the columns to its right.

Weights are indexed [k, m]: k columns of the Linear's weight ("inputs"), m rows of it ("outputs"). Rows do not know of
each other. On the CPU each column is contiguous over its rows, so that a step is a handful of long vector operations; on
a GPU each row is contiguous and one launch keeps tiles of rows in registers for all k steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bigq.kernels.grid import GroupGrid, find_grid
from bigq.kernels.pick import use_triton

#: Columns between which errors are spread one at a time; further columns of the block get them as one product.
#: A compromise: on two CPU cores a solve with 16, 32, 64, 128 takes 0.27, 0.27, 0.22, 0.22 s for 2816 columns of 1024 rows,
#: but 0.17, 0.21, 0.21, 0.22 s for 1024 columns of 5632 rows.
SUB_BLOCK = 32


def gptq_block_(target: Tensor, u: Tensor, work: Tensor, codes: Tensor, grid: GroupGrid) -> Tensor:
    """Quantize k columns in order (Frantar et al. 2022, algorithm 1, inner loop).

    target: fp32 or fp64 [k, m], the weights as corrected for all columns before these; becomes the errors
        ``(w − q) / u_jj``.
    u: [k, k] upper triangular, the diagonal block of ``R⁻¹``.
    work: [k, m], the weights before any correction; becomes ``work − q``.
    codes: uint8 [k, m], overwritten.
    grid: scales and zeros, found on the way and filled in where ``grid.find``.
    Returns the loss ``Σ_j ((w_j − q_j) / u_jj)²`` of each row, [m].

    All may carry one more leading dimension: several matrices of one shape, each with its own u and grid.
    """
    if use_triton(target):
        from bigq.kernels.gptq_block_triton import gptq_block_triton_

        return gptq_block_triton_(target, u, work, codes, grid)
    return gptq_block_reference_(target, u, work, codes, grid)


def gptq_block_reference_(target: Tensor, u: Tensor, work: Tensor, codes: Tensor, grid: GroupGrid) -> Tensor:
    """``gptq_block_`` in plain torch."""
    if target.ndim == 3:
        loss = [
            gptq_block_reference_(
                target[i], u[i], work[i], codes[i], GroupGrid(grid.spec, grid.scale[i], grid.zero[i], grid.group[i], grid.find)
            )
            for i in range(target.shape[0])
        ]
        return torch.stack(loss)
    k, m = target.shape
    spec, width = grid.spec, k // grid.scale.shape[0]
    sub_block = next(size for size in (SUB_BLOCK, 16, 8, 1) if width % size == 0) if grid.find else SUB_BLOCK
    half = 2.0 ** (spec.bits - 1)
    inverse_pivot = u.diagonal().reciprocal()
    spread = u * inverse_pivot[:, None]
    squares = torch.zeros(sub_block, m, dtype=target.dtype, device=target.device)
    steps = torch.empty_like(squares)
    group = grid.group.tolist()
    for s in range(0, k, sub_block):
        e = min(s + sub_block, k)
        if grid.find and s % width == 0:
            g = s // width
            grid.scale[g], grid.zero[g] = find_grid(target[s : s + width], spec)
        index = slice(group[s], group[s] + 1) if len(set(group[s:e])) == 1 else grid.group[s:e]
        scale, zero = grid.scale[index], grid.zero[index]
        low, high = (-half, half - 1) if spec.symmetric else (-zero, spec.max_code - zero)
        errors, taken = target[s:e], steps[: e - s]
        _columns(errors, spread[s:e, s:e], scale, low, high, taken)
        target[e:].addmm_(spread[s:e, e:].T, errors, alpha=-1)
        errors.mul_(inverse_pivot[s:e, None])
        work[s:e].addcmul_(taken, scale, value=-1)
        codes[s:e] = taken.add_(zero)
        squares[: e - s].addcmul_(errors, errors)
    return squares.sum(0)


def _columns(w: Tensor, spread: Tensor, scale: Tensor, low: Tensor | float, high: Tensor | float, steps: Tensor) -> None:
    """Take a few columns w [k, m] through the loop: w becomes ``w − scale·step``, and steps [k, m] the ``code − zero``.

    spread: [k, k], U with each row divided by its diagonal element. scale, and low and high where they are tensors: [k, m],
    or [1, m] where all columns are of one group. Then w is worked on in units of scale, which saves two operations a column.
    """
    alike = len(scale) == 1
    if alike:
        w.div_(scale)
    spread_rows, step_rows = spread.unbind(), steps.unbind()
    for j, column in enumerate(w.unbind()):
        step, at = step_rows[j], 0 if alike else j
        if alike:
            torch.round(column, out=step)
        else:
            torch.div(column, scale[j], out=step).round_()
        if isinstance(low, Tensor):
            assert isinstance(high, Tensor)
            torch.clamp(step, low[at], high[at], out=step)
        else:
            assert not isinstance(high, Tensor)
            step.clamp_(low, high)
        if alike:
            column.sub_(step)
        else:
            column.addcmul_(step, scale[j], value=-1)
        if j + 1 < len(step_rows):
            w[j + 1 :].addr_(spread_rows[j][j + 1 :], column, alpha=-1)
    if alike:
        w.mul_(scale)
