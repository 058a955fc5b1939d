"""The factorization ``H = R·Rᵀ`` with R upper triangular, in place.

This is a Cholesky factorization that runs from the last column to the first. ``R⁻¹`` is then the upper Cholesky factor of
``H⁻¹`` that GPTQ needs (Frantar et al. 2022, algorithm 1), and ``H⁻¹`` itself is never formed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bigq.kernels.precision import fp32_products
from bigq.kernels.rank_update import rank_update_

#: Columns of a panel. LAPACK or cuSOLVER factors its diagonal block; the rest is matrix products. On a CPU a wider corner takes longer
#: than it saves in the products: a matrix of 2816 columns takes 55 instead of 67 ms (two cores).
GPU_PANEL, CPU_PANEL = 256, 96


def panel_width(*, on_gpu: bool) -> int:
    """Columns that are factored at a time."""
    return GPU_PANEL if on_gpu else CPU_PANEL


def upper_cholesky_(h: Tensor) -> bool:
    """Overwrite the upper triangle of h [n, n] (fp32 or fp64) with R, where ``h = R·Rᵀ``.

    Only the upper triangle is read or written. Returns False if h is not positive definite in its precision; the upper
    triangle then holds garbage.

    Left-looking: each panel of columns is updated once, by one product with all columns to its right. Each element is written
    twice. A right-looking version would write it n / width times.
    """
    with fp32_products(h, tf32=False):
        return _upper_cholesky_(h)


def _upper_cholesky_(h: Tensor) -> bool:
    n = h.shape[0]
    width = panel_width(on_gpu=h.is_cuda)
    failures = []
    for hi in range(n, 0, -width):
        lo = max(0, hi - width)
        panel, corner = h[:hi, lo:hi], h[lo:hi, lo:hi]
        if hi < n:
            rank_update_(panel, h[:hi, hi:], h[lo:hi, hi:])
        # Flipping both axes turns the problem into an ordinary lower Cholesky factorization.
        lower, failed = torch.linalg.cholesky_ex(corner.flip(0, 1))
        failures.append(failed)
        r = lower.flip(0, 1)
        corner.tril_(-1).add_(r)
        if lo:
            above = panel[:lo]
            above.copy_(above @ upper_inverse(r).T)
    # Checked once, at the end: on a GPU each check would synchronize.
    return not bool(torch.stack(failures).any())


def upper_inverse(r: Tensor) -> Tensor:
    """The inverses of small upper triangular matrices [..., k, k]."""
    eye = torch.eye(r.shape[-1], dtype=r.dtype, device=r.device)
    inverse: Tensor = torch.linalg.solve_triangular(r, eye, upper=True)
    return inverse.contiguous()


def diagonal_inverses(r: Tensor, blocks: Sequence[tuple[int, int]]) -> Tensor:
    """The inverses of the diagonal blocks [a, b) of an upper triangular matrix: [number of blocks, k, k], where k is the widest block.

    The inverse of a narrower block is in the upper left corner of its [k, k].
    """
    k = max(b - a for a, b in blocks)
    eye = torch.eye(k, dtype=r.dtype, device=r.device)
    corners = eye.repeat(len(blocks), 1, 1)
    for corner, (a, b) in zip(corners, blocks, strict=True):
        corner[: b - a, : b - a] = r[a:b, a:b]
    return upper_inverse(corners.triu_())
