"""Symmetric matrices in one buffer: half of it is enough, and the other half can hold a copy. All in place, tile by tile."""

from __future__ import annotations

from torch import Tensor

TILE = 256

#: Elements of the matrix that ``permute_`` moves at a time.
MOVED = 2**24


def mirror_(h: Tensor) -> None:
    """Copy the upper triangle of a square matrix onto the lower one."""
    n = h.shape[0]
    for lo in range(0, n, TILE):
        hi = min(lo + TILE, n)
        corner = h[lo:hi, lo:hi]
        corner.copy_(corner.triu() + corner.triu(1).T)
        h[lo:hi, :lo] = h[:lo, lo:hi].T


def restore_upper_(h: Tensor, diagonal: Tensor) -> None:
    """Undo what happened above the diagonal since ``mirror_``: the lower triangle and ``diagonal`` are the copy."""
    n = h.shape[0]
    for lo in range(0, n, TILE):
        hi = min(lo + TILE, n)
        corner = h[lo:hi, lo:hi]
        corner.copy_(corner.tril(-1) + corner.tril(-1).T)
        h[:lo, lo:hi] = h[lo:hi, :lo].T
    h.diagonal().copy_(diagonal)


def permute_(h: Tensor, perm: Tensor) -> None:
    """Bring rows and columns of a square matrix into the order ``perm``."""
    n = h.shape[0]
    step = max(1, MOVED // n)
    for lo in range(0, n, step):
        h[:, lo : lo + step] = h[perm, lo : lo + step]
    for lo in range(0, n, step):
        h[lo : lo + step] = h[lo : lo + step, perm]
