"""Keeping the host's memory in check."""

from __future__ import annotations

import ctypes
import sys

#: mallopt's parameter number for the mmap threshold (malloc.h).
_M_MMAP_THRESHOLD = -3
_THRESHOLD_BYTES = 2**20


def return_freed_memory() -> None:
    """Make glibc hand large freed allocations back to the system at once.

    By default its mmap threshold grows with what is freed, so that block-sized buffers stay in the process: resident
    memory then grows by 165–367 MiB over the blocks of small models.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _THRESHOLD_BYTES)
