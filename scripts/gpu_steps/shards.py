"""The inputs of the steps bloom and llama: written beside the other steps, so that those two only measure."""

from __future__ import annotations

import subprocess
import time

from gpu_steps.setting import Findings, Setting, need
from gpu_steps.slices import PACKAGES, SLICES, bench, slice_of


def run(setting: Setting, found: Findings) -> None:
    need(*PACKAGES)
    begun = time.monotonic()
    writers = {name: subprocess.Popen(bench(setting, slice_of(setting, name), "--inputs-only")) for name in SLICES}
    for name, writer in writers.items():
        found.require(f"{name}: inputs are written", writer.wait() == 0)
        found[f"{name}: seconds"] = round(time.monotonic() - begun, 1)
