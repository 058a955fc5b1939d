"""GPTQ's column loop over one block: round a column, then spread its error over the columns to its right.

Weights are indexed [k, m]: k columns of the Linear's weight (inputs), m rows of it (outputs). Rows are independent of each
other. On a CPU each column is contiguous over its rows, so a step is a few vector operations. On a GPU each row is
contiguous, and one launch keeps tiles of rows in registers for all k steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bigq.kernels.grid import GroupGrid, codes_of, found_grid, nearest
from bigq.kernels.grid_spec import GridSpec
from bigq.kernels.pick import use_compiled, use_triton

#: Columns of a sub-block. Inside it, errors are spread column by column; the rest of the block is corrected by one product.
#: 32 is the fastest of 16, 32, 64 and 128 for 2816 columns of 1024 rows on two CPU cores.
SUB_BLOCK = 32


class Scratch:
    """Buffers of the reference and the views into them. Creating the views anew would take a third of each step's time.

    All blocks of a solve can share one, in turn.
    """

    def __init__(self, m: int, dtype: torch.dtype, device: torch.device) -> None:
        self.columns, self.steps, self.squares = torch.empty(3, SUB_BLOCK, m, dtype=dtype, device=device)
        self.spread = torch.empty(SUB_BLOCK, SUB_BLOCK, dtype=dtype, device=device)
        rows = zip(self.columns.unbind(), self.steps.unbind(), self.spread.unbind(), strict=True)
        #: for each j: column j, step j, the columns after j, and the factors that spread column j's error to them
        self.views = [(column, step, self.columns[j + 1 :], spread[j + 1 :]) for j, (column, step, spread) in enumerate(rows)]


def gptq_block_(target: Tensor, u: Tensor, work: Tensor, codes: Tensor, grid: GroupGrid, scratch: Scratch | None = None) -> Tensor:
    """Quantize k columns in order (Frantar et al. 2022, algorithm 1, inner loop).

    target: fp32 or fp64 [k, m], the weights after correction for all earlier columns. Overwritten by the errors
        ``(w − q) / u_jj``.
    u: [k, k] upper triangular, the diagonal block of ``R⁻¹``.
    work: [k, m], the weights before any correction. Overwritten by ``work − q``.
    codes: uint8 [k, m], overwritten.
    grid: scales and zero points. If ``grid.find``, they are computed here and stored into it.
    scratch: saves time in plain torch when many blocks of m rows are solved in turn.
    Returns the loss ``Σ_j ((w_j − q_j) / u_jj)²`` of each row, [m].

    All arguments may have one more leading dimension: a batch of matrices of one shape, each with its own u and grid.
    """
    if use_triton(target):
        from bigq.kernels.gpu.gptq_block import gptq_block_triton_

        return gptq_block_triton_(target, u, work, codes, grid)
    if target.ndim == 3:
        matrices = zip(target, u, work, codes, grid.each(), strict=True)
        return torch.stack([gptq_block_(*matrix, scratch) for matrix in matrices])
    if _is_compiled(target, work, codes, grid):
        from bigq.kernels.cpu.columns import gptq_block_compiled_

        return gptq_block_compiled_(target, u, work, codes, grid)
    return gptq_block_reference_(target, u, work, codes, grid, scratch)


def _is_compiled(target: Tensor, work: Tensor, codes: Tensor, grid: GroupGrid) -> bool:
    """Whether the compiled version runs: for a matrix in the memory order of the loop on a CPU."""
    contiguous = (target, work, codes, grid.scale, grid.zero)
    return use_compiled(target) and all(x.is_contiguous() for x in contiguous)


def gptq_block_reference_(
    target: Tensor, u: Tensor, work: Tensor, codes: Tensor, grid: GroupGrid, scratch: Scratch | None = None
) -> Tensor:
    """``gptq_block_`` in plain torch."""
    m = target.shape[-1]
    scratch = scratch or Scratch(m, target.dtype, target.device)
    if target.ndim == 3:
        matrices = zip(target, u, work, codes, grid.each(), strict=True)
        return torch.stack([gptq_block_reference_(*matrix, scratch) for matrix in matrices])
    k = target.shape[0]
    spec, width = grid.spec, k // grid.scale.shape[0]
    sub_block = next(size for size in (SUB_BLOCK, 16, 8, 1) if width % size == 0) if grid.find else SUB_BLOCK
    half = 2.0 ** (spec.bits - 1)
    inverse_pivot = u.diagonal().reciprocal()
    spread = u * inverse_pivot[:, None]
    scratch.squares.zero_()
    group = grid.group.tolist()
    for s in range(0, k, sub_block):
        e = min(s + sub_block, k)
        if grid.find and s % width == 0:
            g = s // width
            at = slice(s, s + width)
            grid.scale[g], grid.zero[g] = found_grid(target[at], u[at, at], spec)
        index = slice(group[s], group[s] + 1) if len(set(group[s:e])) == 1 else grid.group[s:e]
        scale, zero = grid.scale[index], grid.zero[index]
        scratch.spread[: e - s, : e - s] = spread[s:e, s:e]
        errors, steps = scratch.columns[: e - s], scratch.steps[: e - s]
        if spec.book:
            _book_columns(scratch, target[s:e], scale, spec)
        else:
            low, high = (-half, half - 1) if spec.symmetric else (-zero, spec.max_code - zero)
            _columns(scratch, target[s:e], scale, low, high)
        target[e:].addmm_(spread[s:e, e:].T, errors, alpha=-1)
        torch.mul(errors, inverse_pivot[s:e, None], out=target[s:e])
        work[s:e].addcmul_(steps, scale, value=-1)
        codes[s:e] = codes_of(steps, zero, spec) if spec.book else steps.add_(zero)
        scratch.squares[: e - s].addcmul_(target[s:e], target[s:e])
    total: Tensor = scratch.squares.sum(0)
    return total


def _columns(scratch: Scratch, weights: Tensor, scale: Tensor, low: Tensor | float, high: Tensor | float) -> None:
    """The loop over a few columns of weights [k, m]. Fills ``scratch.columns`` with ``w − scale·step`` and ``scratch.steps`` with
    ``code − zero``. ``scratch.spread`` must hold U with each row divided by its diagonal element.

    scale, and low and high if they are tensors: [k, m], or [1, m] if all columns belong to one group. With one group the loop
    works in units of scale, which saves two operations per column.
    """
    k = len(weights)
    columns = scratch.columns[:k]
    one_group = len(scale) == 1
    if one_group:
        torch.div(weights, scale, out=columns)
    else:
        columns.copy_(weights)
    # Rows of the scratch after the last column take part in the outer products, but are never read.
    for j, (column, step, later, spread) in enumerate(scratch.views[:k]):
        if one_group:
            torch.round(column, out=step)
        else:
            torch.div(column, scale[j], out=step).round_()
        if isinstance(low, Tensor):
            assert isinstance(high, Tensor)
            at = 0 if one_group else j
            torch.clamp(step, low[at], high[at], out=step)
        else:
            assert not isinstance(high, Tensor)
            step.clamp_(low, high)
        if one_group:
            column.sub_(step)
        else:
            column.addcmul_(step, scale[j], value=-1)
        later.addr_(spread, column, alpha=-1)
    if one_group:
        columns.mul_(scale)


def _book_columns(scratch: Scratch, weights: Tensor, scale: Tensor, spec: GridSpec) -> None:
    """``_columns`` with a codebook. A scale may be 0, so nothing is in units of it."""
    k = len(weights)
    scratch.columns[:k] = weights
    for j, (column, step, later, spread) in enumerate(scratch.views[:k]):
        own = scale[0 if len(scale) == 1 else j]
        step.copy_(nearest(column / own, own, spec))
        column.addcmul_(step, own, value=-1)
        later.addr_(spread, column, alpha=-1)
