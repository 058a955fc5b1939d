"""Compiled functions on all threads that torch may use."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

#: Parts per thread. A thread that wakes up late, since torch's own threads still spin, takes fewer of them.
PARTS = 4


def in_parts(total: int, step: int, run: Callable[[int, int], None]) -> None:
    """Call ``run(start, stop)`` for parts of [0, total) on all threads. Parts begin at multiples of ``step``.

    ``run`` must release Python's global lock. An error is raised after all threads have ended.
    """
    steps = -(-total // step)
    threads = max(1, min(torch.get_num_threads(), steps))
    parts = min(steps, threads * PARTS) if threads > 1 else 1
    cuts = [min(total, steps * i // parts * step) for i in range(parts + 1)]
    left = itertools.pairwise(cuts)

    def work() -> None:
        for start, stop in left:
            run(start, stop)

    others = [_pool().submit(work) for _ in range(threads - 1)]
    try:
        work()
    finally:
        for other in others:
            other.result()


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, torch.get_num_threads()), thread_name_prefix="kernel")
