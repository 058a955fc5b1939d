"""Compiled functions on all threads that torch may use."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


def in_parts(total: int, step: int, run: Callable[[int, int], None]) -> None:
    """Call ``run(start, stop)`` for parts of [0, total), one per thread. Parts begin at multiples of ``step``.

    ``run`` must release Python's global lock. Errors of all parts are raised after all have ended.
    """
    steps = -(-total // step)
    parts = max(1, min(torch.get_num_threads(), steps))
    cuts = [min(total, steps * i // parts * step) for i in range(parts + 1)]
    others = [_pool().submit(run, start, stop) for start, stop in itertools.pairwise(cuts[1:])]
    try:
        run(cuts[0], cuts[1])
    finally:
        for part in others:
            part.result()


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, torch.get_num_threads()), thread_name_prefix="kernel")
