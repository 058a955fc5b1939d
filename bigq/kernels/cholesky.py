"""The factorization ``H = R·Rᵀ`` with R upper triangular, in place.

It is a Cholesky factorization read from the last column to the first, so that ``R⁻¹`` is the upper
Cholesky factor of ``H⁻¹`` that GPTQ (Frantar et al. 2022, algorithm 1) wants, and no inverse is formed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bigq.kernels.precision import fp32_products
from bigq.kernels.rank_update import rank_update_

#: Columns of a panel. Its diagonal block is factored by the library, all else is products.
PANEL = 256


def upper_cholesky_(h: Tensor) -> bool:
    """Overwrite the upper triangle of h [n, n] (fp32 or fp64) with R, where ``h = R·Rᵀ``.

    Only the upper triangle is read or written. Returns False, with h's upper triangle spoilt, where h is not
    positive definite in its precision.

    Left-looking: a panel of columns takes in all that lies to its right by one product, then it is done. That writes each
    element twice, where updating all that remains after each panel would write it n / PANEL times.
    """
    with fp32_products(h, tf32=False):
        return _upper_cholesky_(h)


def _upper_cholesky_(h: Tensor) -> bool:
    n = h.shape[0]
    failures = []
    for hi in range(n, 0, -PANEL):
        lo = max(0, hi - PANEL)
        panel, corner = h[:hi, lo:hi], h[lo:hi, lo:hi]
        if hi < n:
            rank_update_(panel, h[:hi, hi:], h[lo:hi, hi:])
        # Flipped in both axes, the upper triangle lies where the library looks, and its lower factor is R.
        lower, failed = torch.linalg.cholesky_ex(corner.flip(0, 1))
        failures.append(failed)
        r = lower.flip(0, 1)
        corner.tril_(-1).add_(r)
        if lo:
            above = panel[:lo]
            above.copy_(above @ upper_inverse(r).T)
    # Asked once, at the end: on a GPU each question would wait for all the work before it.
    return not bool(torch.stack(failures).any())


def upper_inverse(r: Tensor) -> Tensor:
    """The inverses of small upper triangular matrices [..., k, k]."""
    eye = torch.eye(r.shape[-1], dtype=r.dtype, device=r.device)
    inverse: Tensor = torch.linalg.solve_triangular(r, eye, upper=True)
    return inverse.contiguous()


def diagonal_inverses(r: Tensor, blocks: Sequence[tuple[int, int]]) -> Tensor:
    """The inverses of diagonal blocks [a, b) of an upper triangular matrix: [number of blocks, k, k], k the widest block.

    A narrower block lies in the upper left corner of its inverse.
    """
    k = max(b - a for a, b in blocks)
    eye = torch.eye(k, dtype=r.dtype, device=r.device)
    corners = eye.repeat(len(blocks), 1, 1)
    for corner, (a, b) in zip(corners, blocks, strict=True):
        corner[: b - a, : b - a] = r[a:b, a:b]
    return upper_inverse(corners.triu_())
