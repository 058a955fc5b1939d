"""In-place operations on symmetric matrices, tile by tile. One triangle defines the matrix; the other can hold a copy of it."""

from __future__ import annotations

from torch import Tensor

from bigq.kernels.pick import piece

TILE = 256


def mirror_(h: Tensor) -> None:
    """Copy the upper triangle of square matrices [..., n, n] onto the lower one."""
    n = h.shape[-1]
    for lo in range(0, n, TILE):
        hi = min(lo + TILE, n)
        corner = h[..., lo:hi, lo:hi]
        corner.copy_(corner.triu() + corner.triu(1).mT)
        h[..., lo:hi, :lo] = h[..., :lo, lo:hi].mT


def restore_upper_(h: Tensor, diagonal: Tensor) -> None:
    """Restore the upper triangle and the diagonal to their values at ``mirror_``, from the lower triangle and ``diagonal`` [n]."""
    n = h.shape[0]
    for lo in range(0, n, TILE):
        hi = min(lo + TILE, n)
        corner = h[lo:hi, lo:hi]
        corner.copy_(corner.tril(-1) + corner.tril(-1).T)
        h[:lo, lo:hi] = h[lo:hi, :lo].T
    h.diagonal().copy_(diagonal)


def permute_(h: Tensor, perm: Tensor) -> None:
    """Permute rows and columns of a square matrix: ``h[perm][:, perm]``."""
    n = h.shape[0]
    step = max(1, piece(on_gpu=h.is_cuda) // n)
    for lo in range(0, n, step):
        h[:, lo : lo + step] = h[perm, lo : lo + step]
    for lo in range(0, n, step):
        h[lo : lo + step] = h[lo : lo + step, perm]
