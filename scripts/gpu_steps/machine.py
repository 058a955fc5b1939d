"""What the machine is, and what it can do at best. The only step that measures ceilings."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import ceilings
import torch
from facts import said, version_of

from gpu_steps.setting import Findings, Setting

TOOLS = ("nvidia-smi", "nvcc", "gcc", "compute-sanitizer", "ncu")
PACKAGES = ("numpy", "tokenizers", "accelerate", "psutil", "pytest", "pytest-xdist", "hypothesis", "gguf")


def run(setting: Setting, found: Findings) -> None:
    found["python"] = sys.version.split()[0]
    found["packages"] = {name: version_of(name) for name in PACKAGES}
    found["tools"] = [tool for tool in TOOLS if shutil.which(tool)]
    for name, folder in (("work", setting.work), ("temporary", Path(tempfile.gettempdir()))):
        usage = shutil.disk_usage(folder)
        found[f"{name} folder"] = {"path": str(folder), "free_gb": usage.free / 1e9, "total_gb": usage.total / 1e9}
    found["memory"] = said("free", "-g").splitlines()[1:2]
    if not setting.smoke:
        query = "name,memory.total,memory.used,driver_version,clocks.max.sm,power.limit"
        found["gpu"] = said("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")
        found["cuda_start_s"] = seconds_of(lambda: torch.zeros(1, device=setting.device))
        found["pin_256_mib_s"] = seconds_of(lambda: torch.empty(2**28, dtype=torch.uint8, pin_memory=True))
    block = os.urandom(2**20 if setting.smoke else 2**26)
    found["sha256_gbs"] = len(block) / seconds_of(lambda: hashlib.sha256(block)) / 1e9
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "disk-rate"
        count = 1 if setting.smoke else 16
        found["disk_write_gbs"] = count * len(block) / seconds_of(lambda: write(file, block, count)) / 1e9
        measured = ceilings.measured(torch.device(setting.device), file)
    setting.ceilings.write_text(json.dumps(measured))
    found["ceilings"] = measured["ceilings"]
    found["machine"] = measured["machine"]


def seconds_of(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def write(path: Path, block: bytes, count: int) -> None:
    with open(path, "wb") as file:
        for _ in range(count):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
