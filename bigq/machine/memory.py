"""Keeping the host's memory in check."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable

#: mallopt's parameter numbers (malloc.h), and what they are set to in bytes.
_M_TRIM_THRESHOLD, _TRIM_BYTES = -1, 2**30
_M_MMAP_THRESHOLD, _MMAP_BYTES = -3, 2**25


def hold_heap() -> None:
    """Let glibc serve buffers below 32 MiB from its heap and keep what is freed there until ``return_freed_memory``.

    Mapping each afresh costs a page fault for every 4 KiB: a job on a small model spent a fifth of its CPU time on them.
    """
    mallopt = _libc("mallopt")
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES)
        mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)


def return_freed_memory() -> None:
    """Hand the heap's free pages back to the system, those between live allocations too.

    Called between blocks, it keeps resident memory from growing with their number.
    """
    malloc_trim = _libc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


@functools.cache
def _libc(name: str) -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
