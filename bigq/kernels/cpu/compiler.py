"""numba's compiler with the settings of all kernels."""

from __future__ import annotations

from numba import njit


def compiled(**options):
    """A decorator: compile at the first call, release Python's global lock while running, and cache the machine code.

    The cache is ``__pycache__`` beside the source or, where that is not writable, a folder of the user or NUMBA_CACHE_DIR. If none of
    them is writable, every process compiles for itself.
    """

    def decorate(function):
        try:
            return njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:
            return njit(nogil=True, **options)(function)

    return decorate
