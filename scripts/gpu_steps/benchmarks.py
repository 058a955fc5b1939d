"""Rates of the kernels and of whole Linears, beside the ceilings and the aims."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import torch
from gpu_bench import Bench

from gpu_steps.aims import AIMS, Aim, as_finding
from gpu_steps.kernel_benchmarks import BENCHMARKS
from gpu_steps.runner import PROFILE
from gpu_steps.setting import ROOT, Findings, Setting

#: What says most comes first: a short limit cuts off the end.
ORDER = ("syrk", "linears", "batches", "cholesky", "products", "column_loop", "matvec", "packing", "profile")
#: The kernel that a benchmark is about, as Nsight Compute names it.
KERNELS = {"syrk": "_syrk", "profile": "_gptq_block", "matvec": "_dequant_matvec", "linears": "_rank_update"}
NCU_SECONDS = 60


def run(setting: Setting, found: Findings) -> None:
    bench = Bench(torch.device(setting.device), setting.smoke)
    ceilings = json.loads(setting.ceilings.read_text())["ceilings"] if setting.ceilings.exists() else {}
    for name in setting.focus or ORDER:
        torch.manual_seed(0)
        with found.attempt(name):
            if setting.mode == PROFILE:
                found[f"{name}: kernels"] = profiled(bench, name)
                found[f"{name}: hardware"] = hardware(setting, name)
            else:
                found[name] = BENCHMARKS[name](bench)
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
        found[AIMS] = as_finding(aims_of({"ceilings": ceilings, **found.values}))


def profiled(bench: Bench, name: str) -> dict[str, Any]:
    """The benchmark under torch's profiler: time and launches by kernel."""
    on_gpu = bench.device.type == "cuda"
    kind = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    if name == "profile":  # it is a profile already
        return BENCHMARKS[name](bench)
    from bench_slice import kernel_times  # imported here: it needs all that a job needs

    with torch.profiler.profile(activities=[kind]) as profiler:
        BENCHMARKS[name](bench)
        bench.sync()
    return kernel_times(profiler, on_gpu=on_gpu)


def hardware(setting: Setting, name: str) -> str | list[str]:
    """What limits the benchmark's kernel, by Nsight Compute where it is installed."""
    if name not in KERNELS or shutil.which("ncu") is None:
        return "ncu is not installed" if name in KERNELS else "no kernel of its own"
    chosen = ["--kernel-name", f"regex:{KERNELS[name]}", "--launch-skip", "3", "--launch-count", "1"]
    sections = ["--section", "SpeedOfLight", "--section", "Occupancy", "--section", "WarpStateStats"]
    step = [str(ROOT / "scripts/gpu_session.py"), "--out", str(setting.work), "--work", str(setting.work / "ncu"), "--step", "benchmarks"]
    command = ["ncu", *chosen, *sections, sys.executable, *step, "--focus", name, *["--smoke"] * setting.smoke]
    (setting.work / "ncu").mkdir(exist_ok=True)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=NCU_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"ncu took longer than {NCU_SECONDS} s"
    return [line.rstrip() for line in done.stdout.splitlines() if line.strip() and not line.startswith("==PROF")][-60:]


def aims_of(result: Mapping[str, Any]) -> list[Aim]:
    """The aims of what this run has measured. A name begins with the benchmark that measured it."""
    found: list[Aim] = []

    def add(name: str, *path: str, over: tuple[str, ...] = (), low: float | None = None, high: float | None = None) -> None:
        values = [number_at(result, names) if names else 1.0 for names in (path, over)]
        if values[0] is not None and values[1] is not None:
            found.append(Aim(name=name, value=values[0] / values[1], low=low, high=high))

    for n in ("8192", "14336", "28672"):
        add(f"syrk: rate over bf16 product's, n = {n}", "syrk", n, "tflops", over=("ceilings", "bf16_tflops"), low=0.7)
    for name, seconds in (("4096 × 4096", 0.03), ("14336 × 57344", 2.5)):
        parts = [number_at(result, ("linears", name, part)) for part in ("factor_s", "solve_s")]
        if None not in parts:
            value = sum(part for part in parts if part is not None)
            found.append(Aim(name=f"linears: factor + solve of {name}, seconds", value=value, high=seconds))
    for matrix in ("4096 × 7168", "7168 × 2048", "3072 × 4096"):
        for part in ("factor", "solve"):
            eight, one = (("batches", f"{matrix}, {count} at once", f"{part}_s") for count in (8, 1))
            add(f"batches: {part} of {matrix}, 8 at once over single", *eight, over=one, high=0.5)
    largest = ("linears", "14336 × 57344")
    add("linears: peak over H and W, 14336 × 57344", *largest, "peak_bytes", over=(*largest, "h_and_w_bytes"), high=1.1)
    for name in ("4096 × 4096", "8192 × 28672"):
        add(f"profile: column loop's share of the solve of {name}", "profile", name, "column_loop_share", high=0.15)
    for name in ("8192², 4 bits, 1 vectors", "16384², 4 bits, 1 vectors", "16384², 4 bits, 16 vectors"):
        add(f"matvec: rate over the copy rate, {name}", "matvec", name, "gbs", over=("ceilings", "copy_gbs"), low=0.8)
    return found


def number_at(result: Mapping[str, Any], path: tuple[str, ...]) -> float | None:
    """The number at a path of nested dicts, if there is one."""
    value: Any = result
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, (int, float)) else None
