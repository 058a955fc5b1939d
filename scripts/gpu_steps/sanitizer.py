"""The kernels at small sizes under compute-sanitizer: accesses out of bounds, and races for shared memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from gpu_steps.kernels import SMALL
from gpu_steps.setting import ROOT, Findings, NotPossible, Setting

TOOLS = ("memcheck", "racecheck")
SECONDS = 110


def run(setting: Setting, found: Findings) -> None:
    if shutil.which("compute-sanitizer") is None:
        raise NotPossible("compute-sanitizer is not installed")
    folders = ["--out", str(setting.work), "--work", str(setting.work)]
    kernels = [sys.executable, str(ROOT / "scripts/gpu_session.py"), *folders, "--step", SMALL]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # every tensor is its own allocation
    for tool in TOOLS:
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--kernel-name-exclude", "kernel_substring=at::"]
        with found.attempt(tool):
            done = subprocess.run([*command, *kernels], env=environment, capture_output=True, text=True, timeout=SECONDS)
            found[f"{tool}: report"] = [line for line in done.stdout.splitlines() if line.startswith("=====")][-12:]
            found.require(f"{tool}: no errors", done.returncode == 0)
