"""Rates of the kernels and of whole Linears, beside the ceilings; the measurements are those of ``scripts/gpu_check``."""

from __future__ import annotations

import json

import torch
from gpu_bench import Bench
from gpu_check import targets
from kernel_benchmarks import BENCHMARKS

from gpu_steps.setting import Findings, Setting

#: What says most comes first: a short limit cuts off the end.
ORDER = ("syrk", "linears", "cholesky", "products", "column_loop", "matvec", "packing", "profile")


def run(setting: Setting, found: Findings) -> None:
    bench = Bench(torch.device(setting.device), setting.smoke)
    ceilings = json.loads(setting.ceilings.read_text())["ceilings"] if setting.ceilings.exists() else {}
    for name in ORDER[:1] if setting.smoke else ORDER:
        torch.manual_seed(0)
        with found.attempt(name):
            found[name] = BENCHMARKS[name](bench)
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
        found["targets"] = targets({"ceilings": ceilings, **found.values})
