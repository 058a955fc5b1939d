#!/usr/bin/env python3
"""Measure the best rates of a machine: products, copies, reading a file. Prints one JSON object. On a CPU, sizes are small.

python scripts/ceilings.py --device cuda:0 --file SHARD
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import gpu_bench
from facts import drop_from_cache, host, versions

PIECE = 16 * 2**20
READERS = 4


def disk_read_gbs(path: Path) -> float:
    """The rate of reading a whole file with several readers, after dropping it from the page cache."""
    size = path.stat().st_size
    drop_from_cache(path)

    def read(first: int) -> int:
        buffer, got = bytearray(PIECE), 0
        with open(path, "rb", buffering=0) as file:
            for position in range(first * PIECE, size, READERS * PIECE):
                got += os.preadv(file.fileno(), [buffer], position)
        return got

    begin = time.perf_counter()
    with ThreadPoolExecutor(READERS) as pool:
        total = sum(pool.map(read, range(READERS)))
    assert total == size, f"{path}: {total} of {size} bytes were read"
    return size / (time.perf_counter() - begin) / 1e9


def host_to_device_gbs(bench: gpu_bench.Bench) -> float:
    """The rate of copies from pinned memory to the device; on a CPU, of copies within memory."""
    source = torch.empty(bench.size(2**30), dtype=torch.uint8, pin_memory=bench.device.type == "cuda")
    target = torch.empty_like(source, device=bench.device, pin_memory=False)
    return source.numel() / bench.device_seconds(lambda: target.copy_(source, non_blocking=True), 10) / 1e9


def measured(device: torch.device, file: Path) -> dict[str, Any]:
    """``ceilings``: rates of the device, of the bus and of reading ``file``. ``machine``: host, versions, device."""
    bench = gpu_bench.Bench(device, smoke=device.type != "cuda")
    found = gpu_bench.ceilings(bench) | {
        "host_to_device_gbs": host_to_device_gbs(bench),
        "disk_read_gbs": disk_read_gbs(file),
        "small_sizes": bench.smoke,
    }
    return {"ceilings": found, "machine": host() | versions() | gpu_bench.machine(bench)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", required=True)
    parser.add_argument("--file", type=Path, required=True, help="a large file on the disk that the benchmark reads")
    args = parser.parse_args()
    print(json.dumps(measured(torch.device(args.device), args.file)))


if __name__ == "__main__":
    main()
