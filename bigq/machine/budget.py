"""How much memory and disk space a job may use."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

#: Reserved for the CUDA context, library workspaces and fragmentation.
GPU_RESERVE = 2 * 2**30
#: Reserved for other processes on the host.
HOST_RESERVE = 256 * 2**20


def host_budget(resident: int, root: Path = Path("/")) -> int:
    """Bytes of host memory that this process may hold: what it holds now (``resident``), plus what is free on the machine and in its
    cgroups. root: the root of the file system, which tests replace.
    """
    free = psutil.virtual_memory().available - HOST_RESERVE
    for limit, used in _cgroup_limits(root):
        free = min(free, limit - used)
    return max(0, resident + free)


def _cgroup_limits(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, bytes in use without page cache) of this process's memory cgroups and their ancestors, v1 and v2."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        v2 = controllers == ""
        top = root / ("sys/fs/cgroup" if v2 else "sys/fs/cgroup/memory")
        folder = top / path.lstrip("/")
        while True:
            found = _limit(folder, v2)
            if found is not None:
                yield found
            if folder == top or top not in folder.parents:
                break
            folder = folder.parent


def _limit(folder: Path, v2: bool) -> tuple[int, int] | None:
    limit_name, used_name = ("memory.max", "memory.current") if v2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    try:
        limit = (folder / limit_name).read_text().strip()
        used = int((folder / used_name).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if limit == "max":
        return None
    cache = int(stat.get("file", 0)) if v2 else int(stat.get("total_cache", 0))
    return int(limit), max(0, used - cache)


def gpu_budget(device: torch.device) -> int:
    """Bytes of device memory that tensors may take; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    return max(0, int(torch.cuda.mem_get_info(device)[0]) - GPU_RESERVE)


def disk_budget(out: Path) -> int:
    """Free bytes on the file system of ``out``, which need not exist yet."""
    folder = out.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
