"""The factorization ``H = R·Rᵀ`` with R upper triangular, in place.

This is a Cholesky factorization that runs from the last column to the first. ``R⁻¹`` is then the upper Cholesky factor of
``H⁻¹`` that GPTQ needs (Frantar et al. 2022, algorithm 1), and ``H⁻¹`` itself is never formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from bigq.kernels.precision import fp32_products
from bigq.kernels.rank_update import rank_update_

#: Columns of a panel. LAPACK or cuSOLVER factors its diagonal block; the rest is matrix products. On a CPU a wider corner takes longer
#: than it saves in the products: a matrix of 2816 columns takes 55 instead of 67 ms (two cores).
GPU_PANEL, CPU_PANEL = 256, 96

#: Matrices of at least so many columns are factored by all processes of a job together. Each panel costs one exchange, so smaller ones
#: take as long together as alone.
SHARED_FROM = 4096


class Sharing(Protocol):
    """Several processes that do the same at the same time (see ``bigq.machine.ranks``)."""

    def rows(self, count: int) -> range:
        """This process's share of ``count`` rows."""

    def joined(self, part: Tensor, count: int) -> Tensor:
        """[count, ...] from the part of each process, which has its share of the rows."""

    def number(self, share: int) -> int:
        """The sum over all processes."""


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
    return upper_cholesky_many_(h[None]) == [True]


def upper_cholesky_many_(h: Tensor) -> list[bool]:
    """``upper_cholesky_`` for each matrix of h [k, n, n]. On a GPU a step is one launch for all of them.

    The step that takes longest is the factorization of a corner, which has too little arithmetic to fill a GPU.
    A matrix that is not positive definite does not change the others.
    """
    with fp32_products(h, tf32=False):
        # A batch of one takes the library's path for single matrices. So does every matrix on a CPU: the bits are the same in any batch.
        parts = [h] if h.is_cuda and len(h) > 1 else list(h)
        failures = [_upper_cholesky_(part).reshape(-1) for part in parts]
    # Checked once, at the end: on a GPU each check would synchronize.
    return [not failed for failed in torch.cat(failures).tolist()]


def _upper_cholesky_(h: Tensor) -> Tensor:
    """Whether the factorization failed: bool [], or [k] for h [k, n, n]."""
    n = h.shape[-1]
    width = panel_width(on_gpu=h.is_cuda)
    failures = []
    for hi in range(n, 0, -width):
        lo = max(0, hi - width)
        panel, corner = h[..., :hi, lo:hi], h[..., lo:hi, lo:hi]
        if hi < n:
            rank_update_(panel, h[..., :hi, hi:], h[..., lo:hi, hi:])
        r, failed = _factor_corner_(corner)
        failures.append(failed)
        if lo:
            above = panel[..., :lo, :]
            above.copy_(above @ upper_inverse(r).mT)
    return torch.stack(failures).any(0)


def upper_cholesky_shared_(h: Tensor, sharing: Sharing) -> bool:
    """``upper_cholesky_`` of the same h [n, n] in several processes, all of which get the whole factor.

    Of each panel, a process computes its share of the rows above the corner; then they exchange these. Each computes the corner, whose
    arithmetic is little. Most of the arithmetic is divided by their number, and a process receives at most n² / 2 elements.
    """
    n = len(h)
    width = panel_width(on_gpu=h.is_cuda)
    failures = []
    with fp32_products(h, tf32=False):
        for hi in range(n, 0, -width):
            lo = max(0, hi - width)
            corner, right = h[lo:hi, lo:hi], h[lo:hi, hi:]
            if hi < n:
                rank_update_(corner, right, right)
            r, failed = _factor_corner_(corner)
            failures.append(failed)
            if lo:
                mine = sharing.rows(lo)
                part = h[mine.start : mine.stop, lo:hi]
                if hi < n and len(part):
                    rank_update_(part, h[mine.start : mine.stop, hi:], right, triangle=False)
                h[:lo, lo:hi] = sharing.joined(part @ upper_inverse(r).mT, lo)
    # All of them repeat it, or none.
    return not sharing.number(int(torch.stack(failures).any()))


def _factor_corner_(corner: Tensor) -> tuple[Tensor, Tensor]:
    """Overwrite the upper triangles of corners [..., k, k] with R, which is returned too, with whether it failed [...]."""
    # Flipping both axes turns the problem into an ordinary lower Cholesky factorization.
    lower, failed = torch.linalg.cholesky_ex(corner.flip(-2, -1))
    r = lower.flip(-2, -1)
    corner.tril_(-1).add_(r)
    return r, failed


def upper_inverse(r: Tensor) -> Tensor:
    """The inverses of small upper triangular matrices [..., k, k]."""
    eye = torch.eye(r.shape[-1], dtype=r.dtype, device=r.device)
    inverse: Tensor = torch.linalg.solve_triangular(r, eye, upper=True)
    return inverse.contiguous()


def diagonal_inverses(r: Tensor, blocks: Sequence[tuple[int, int]]) -> Tensor:
    """The inverses of the diagonal blocks [a, b) of upper triangular matrices [..., n, n]: [..., number of blocks, k, k].

    k is the widest block. The inverse of a narrower block is in the upper left corner of its [k, k].
    """
    k = max(b - a for a, b in blocks)
    eye = torch.eye(k, dtype=r.dtype, device=r.device)
    corners = eye.repeat(*r.shape[:-2], len(blocks), 1, 1)
    for i, (a, b) in enumerate(blocks):
        corners[..., i, : b - a, : b - a] = r[..., a:b, a:b]
    return upper_inverse(corners.triu_())
