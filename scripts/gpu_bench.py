"""Timing on a device, the rates that it reaches at best, and what it is: shared by the GPU benchmarks."""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from facts import revision, said

import bigq
from bigq.kernels.precision import fp32_products


@dataclass
class Bench:
    """The device of a measurement, and whether its sizes are tiny (``smoke``)."""

    device: torch.device
    smoke: bool
    started: float = field(default_factory=time.monotonic)

    def size(self, n: int) -> int:
        """n, or a tiny size for a smoke run."""
        return max(256, n // 64 // 256 * 256) if self.smoke else n

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], object], rounds: int = 5) -> float:
        """The median time of a run, after one warm-up. On a GPU, the L2 cache is overwritten before each run."""
        run()
        flush = torch.empty(64 * 2**20 if self.device.type == "cuda" else 1, device=self.device)
        times = []
        for _ in range(1 if self.smoke else rounds):
            flush.zero_()
            self.sync()
            begin = time.perf_counter()
            run()
            self.sync()
            times.append(time.perf_counter() - begin)
        return statistics.median(times)

    def device_seconds(self, run: Callable[[], object], repeats: int = 20) -> float:
        """The mean time of a run, from CUDA events around ``repeats`` of them: for runs that take longer than their launch."""
        if self.device.type != "cuda":
            return self.seconds(run)
        run()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for _ in range(repeats):
            run()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / repeats

    def graph_seconds(self, runs: Sequence[Callable[[], object]]) -> float:
        """The mean device time of short runs, captured as one CUDA graph, so that launches cost nothing.

        Runs that read different memory, together more than the caches hold, are timed with cold caches.
        """
        if self.device.type != "cuda":
            return sum(self.seconds(run) for run in runs) / len(runs)
        for run in runs:
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for run in runs:
                run()
        return self.device_seconds(graph.replay, 10) / len(runs)

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=self.device)

    def peak(self, run: Callable[[], object]) -> float:
        """The peak of device memory during a run, above what was allocated before it, in bytes; 0 on a CPU."""
        if self.device.type != "cuda":
            run()
            return 0.0
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return float(torch.cuda.max_memory_allocated() - before)


def relative(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm())


def ceilings(bench: Bench) -> dict[str, Any]:
    """The device's best rates: products in TFLOP/s, copy in GB/s (bytes read plus bytes written)."""
    n = bench.size(8192)
    result: dict[str, Any] = {}
    for name, dtype, tf32 in (("bf16", torch.bfloat16, False), ("tf32", torch.float32, True), ("fp32", torch.float32, False)):
        a, b = bench.randn(n, n, dtype=dtype), bench.randn(n, n, dtype=dtype)
        with fp32_products(a, tf32=tf32):
            result[f"{name}_tflops"] = 2 * n**3 / bench.device_seconds(lambda a=a, b=b: a @ b, 10) / 1e12
    source = torch.empty(bench.size(2**30), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    result["copy_gbs"] = 2 * source.numel() / bench.device_seconds(lambda: target.copy_(source), 10) / 1e9
    return result


def machine(bench: Bench) -> dict[str, Any]:
    """Device, driver, versions and revision."""
    found: dict[str, Any] = {
        "bigq": bigq.__version__,
        "revision": revision(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if bench.device.type == "cuda":
        import triton

        driver = said("nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader")
        properties = torch.cuda.get_device_properties(bench.device)
        found |= {
            "device": properties.name,
            "memory_gib": properties.total_memory / 2**30,
            "driver_clock_power": driver,
            "triton": triton.__version__,
        }
    return found
