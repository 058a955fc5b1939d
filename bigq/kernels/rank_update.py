"""``C −= A·Bᵀ`` at fp32 accuracy: most of the arithmetic of a Cholesky factorization."""

from __future__ import annotations

from torch import Tensor

from bigq.kernels.pick import use_triton

#: Columns of the square at the bottom that the reference updates at a time.
TILE = 128


def rank_update_(c: Tensor, a: Tensor, b: Tensor, *, triangle: bool = True) -> None:
    """Subtract ``a·bᵀ`` from c [m, n] in place; a: [m, k], b: [n, k], fp32 or fp64.

    triangle: the last n rows of c form a square, and only its upper triangle is updated; else all of c is. All may have one more leading
        dimension, a batch.
    """
    if use_triton(c):
        from bigq.kernels.gpu.rank_update import rank_update_triton_

        rank_update_triton_(c, a, b, triangle=triangle)
    else:
        rank_update_reference_(c, a, b, triangle=triangle)


def rank_update_reference_(c: Tensor, a: Tensor, b: Tensor, *, triangle: bool = True) -> None:
    """``rank_update_`` in plain torch."""
    if c.ndim == 3:
        for matrices in zip(c, a, b, strict=True):
            rank_update_reference_(*matrices, triangle=triangle)
        return
    if not triangle:
        c.addmm_(a, b.T, alpha=-1)
        return
    above = c.shape[0] - c.shape[1]
    c[:above].addmm_(a[:above], b.T, alpha=-1)
    for lo in range(0, c.shape[1], TILE):
        hi = min(lo + TILE, c.shape[1])
        c[above : above + lo, lo:hi].addmm_(a[above : above + lo], b[lo:hi].T, alpha=-1)
        c[above + lo : above + hi, lo:hi].sub_((a[above + lo : above + hi] @ b[lo:hi].T).triu_())
